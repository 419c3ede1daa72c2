"""Base pruners: which weights of a linear matter."""
