"""`python -m neuroal` is the command `neuroal`."""

from neuroal.cli import main

if __name__ == "__main__":
    main(prog_name="neuroal")
