"""From text, conversations or rows of token ids to windows; the only door to `datasets`.

- `source`: what a source names (a file, a hub data set, c4, demo, ...), and its rows
- `columns`: which columns of a table are read, and what a row of them is
- `conversations`: chat data to text, by the model's own chat template
- `documents`: rows to token ids, one by one or packed
- `sizes`: how many windows there may be, and how long they are
- `windows`: what identifies windows, and what they begin with
- `calibration`: the calibration windows of a source
"""
