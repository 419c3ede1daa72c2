"""What a run will cost, and the preparation that every run begins with.

- `preparation`: `prepare`: everything that is known, and can be refused, before a weight is read,
  and how many candidates every strategy starts with
- `work`: how much work there is of each kind, and how long one of each takes
- `timings`: seconds of each kind of work, measured on one block of the model's shapes
- `probes`: timing that is over in seconds, whatever is timed
- `estimate`: the work of every phase; bytes of memory and disk
- `offload`: what is kept on the disk so that a run fits into memory
- `plan`: all of it together, as `--dry-run` shows it
"""
