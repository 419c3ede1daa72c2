"""One run: its plugins, its final pruning, its report and model card."""
