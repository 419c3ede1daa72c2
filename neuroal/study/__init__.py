"""Studies: the cases of one file, each run once, where there is room, and shown in tables.

- `file`: the study file
- `mistakes`: what is wrong with it, as far as it is known before torch is imported
- `cases`: from a study to its cases, and to the combinations that are skipped
- `run`: prepares a study and runs what is left of it
- `texts`: the windows that its models would read, for the plan
- `bench`: runs cases one after the other
- `scores`: what a case is measured by
- `executors`: where cases run: in processes of this machine, or (`cluster`) on Ray
- `results`: the results folder
- `estimate`: how long the rest of a study will take
- `table`: mean and deviation over seeds
"""
