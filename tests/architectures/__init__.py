"""Every causal language model of the installed transformers, tiny and of random weights, pruned."""
