"""Block-ratio proposals: how much of each linear to prune."""
