"""The generator and the trainer of what `neuroal.demo` ships: `python -m benchmarks.demo --help`."""
