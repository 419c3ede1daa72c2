"""Tries to break the program: `make campaign SECONDS=900`, or `python -m tests.campaign`.

Every attempt is the program in a forked child, which costs no imports. What holds of all of them:
a finished result is the right one, or the program says in a line what to do. Never a wrong result
with exit status 0, never a traceback, never a hang.

attempts   one attempt, and what is wrong with how it ended
world      the models, texts, recipes and studies that attempts run on
runs       killed before every step, disks that are full, two writers of one folder
inputs     mutated inputs of seven kinds, and hostile ones
"""

import os

# Before torch: a child that was forked has no pool of threads, and would wait for it.
os.environ["OMP_NUM_THREADS"] = "1"
