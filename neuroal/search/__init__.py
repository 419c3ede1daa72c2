"""NeuroAL: ask plugins for proposals, walk, measure the misalignment, keep the best."""
