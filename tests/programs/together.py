"""One of the processes that prune together: `torchrun ... together.py < given.json`.

given.json (a file's path as the only argument): `runs`, each a recipe, `stream`, `spill` and the
name of its output, `folder` for outputs, and `in memory`: the recipe of a
tiny model in memory.
"""

import json
import sys
from pathlib import Path

import torch

from neuroal import NeuroalError, Recipe, engine
from neuroal.testing import tiny_model, windows


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    folder, reports = Path(given["folder"]), {}
    for name, run in given["runs"].items():
        recipe = Recipe.from_json(run["recipe"])
        try:
            report = engine.prune(
                recipe.model, recipe=recipe, out=folder / name, stream=run["stream"],
                spill=run["spill"], resume=run.get("resume", False),
            )  # fmt: skip
            reports[name] = report.to_json()
        except NeuroalError as error:
            reports[name] = {"error": str(error)}
    model = tiny_model("llama")
    recipe = Recipe.from_json(given["in memory"])
    report = engine.prune(model, None, recipe, windows=windows(recipe.samples, 16))
    reports["in memory"] = report.to_json()
    weights = {k: v.double().sum().item() for k, v in model.state_dict().items()}
    rank = torch.distributed.get_rank()
    text = json.dumps({"reports": reports, "weights": weights})
    (folder / f"rank-{rank}.json").write_text(text)


if __name__ == "__main__":
    main()
