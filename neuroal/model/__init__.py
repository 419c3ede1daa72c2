"""A model or a run on disk: load, stream, save, resume; the only door to `transformers`."""
