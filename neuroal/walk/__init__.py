"""Running the blocks of a model; the only place that does."""
