"""From a ratio to counts, from counts to a mask, from a mask to new weights."""
