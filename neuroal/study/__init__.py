"""Studies: the cases of one file, each run once, where there is room, and read at a glance."""
