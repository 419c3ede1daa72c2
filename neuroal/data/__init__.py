"""From text, or rows of token ids, to calibration windows; the only door to `datasets`.

- `source`: what a source names (a file, a hub data set, c4, demo, ...), and its rows
- `calibration`: rows to windows of token ids
"""
