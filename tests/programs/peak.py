"""Prunes a model, and says what memory that was said to take and what it took.

    python peak.py < given.json > said.json

A script and no test module: the peak is that of a whole process. given.json: `recipe` with the
model's folder, `out`, and what `prune` is given besides. said.json: bytes `estimated`, by the plan
made before anything else, and `used`, with the peak up to the end of every phase.
"""

import json
import sys
from pathlib import Path

from neuroal import Recipe, engine
from neuroal.cost.plan import plan
from neuroal.cost.preparation import prepare


def main() -> None:
    given = json.load(sys.stdin)
    recipe, how = Recipe.from_json(given["recipe"]), given.get("how", {})
    made = plan(prepare(recipe), **how)
    estimated = made.needs.memory(made.offload)
    report = engine.prune(str(recipe.model), recipe=recipe, out=Path(given["out"]), **how)
    said = {"estimated": estimated, "used": report.peak_memory_bytes}
    json.dump(said | {"phases": report.phase_memory_bytes}, sys.stdout)


if __name__ == "__main__":
    main()
