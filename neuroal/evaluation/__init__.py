"""How good a model is: perplexity, each number with the protocol that it was measured by."""
