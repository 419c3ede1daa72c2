"""Alignment metrics: how far the pruned model is from the dense one."""
