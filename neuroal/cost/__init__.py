"""What a run will cost: block runs, seconds, memory and disk."""
