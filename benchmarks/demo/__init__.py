"""What makes the texts and the model of `neuroal.demo`: `python -m benchmarks.demo --help`."""
