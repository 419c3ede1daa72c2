"""Row-ratio proposals: how a linear's ratio is spread over its rows."""
