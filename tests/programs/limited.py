"""Prunes under a hard limit of memory: `limited.py < given.json > said.json`.

A script and no test module, since a limit lasts as long as its process. The limit counts from what
the process holds after a first, small run, when every library is loaded.

given.json: `recipe`, `folder` for the outputs, `small` and `model` to prune, `limit` in bytes, and
`runs`: by the name of its output what `stream` and `spill` are. said.json: by run its notes, or
its error.
"""

import json
import resource
import sys
from pathlib import Path

from neuroal import NeuroalError, Recipe, engine


def held() -> int:
    """What RLIMIT_DATA counts, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmData:"))


def main() -> None:
    given = json.load(sys.stdin)
    recipe, folder = Recipe.from_json(given["recipe"]), Path(given["folder"])
    engine.prune(given["small"], recipe=recipe, out=folder / "small", stream=True)
    limit = held() + given["limit"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    said = {}
    for name, how in given["runs"].items():
        try:
            report = engine.prune(given["model"], recipe=recipe, out=folder / name, **how)
            said[name] = " ".join(report.notes)
        except NeuroalError as error:
            said[name] = str(error)
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
