"""From text, or rows of token ids, to calibration windows; the only door to `datasets`."""
