"""Two processes on the CPU find what one finds: the same search, and masks within rounding."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import neuroal
from neuroal import Recipe
from neuroal.distributed import ALONE, Team
from neuroal.walk.statistics import Collector, resolve

Read = Callable[[Path], dict[str, Tensor]]

WEIGHED = {
    "block_ratios": ("uniform",),
    "row_ratios": f"{Path(__file__).parents[1] / 'programs/weighs.py'}:Weighs",
}
RUNS: dict[str, dict[str, Any]] = {
    "neuroal": {},
    "dense walk": {"top_up": "owl"},
    "moves weights": {"pruner": "sparsegpt", "top_up": "uniform"},
    "reconstructs": {"reconstruction": "refit", "top_up": "uniform"},
    "trains blocks": {"reconstruction": "block", "top_up": "uniform"},
    "no statistics": {"pruner": "magnitude", "top_up": "neuroal"},
    "weighs rows": {"pruner": "sparsegpt", "top_up": "uniform", **WEIGHED},
    "output metric": {"alignment": "output_kl"},
    "streamed": {},
    "evaluated": {"evaluate": ("demo",), "evaluate_length": 16, "evaluate_windows": 5},
    "evaluated, streamed": {"evaluate": ("demo",), "evaluate_length": 16, "evaluate_windows": 1},
    "spilled": {"alignment": "relative_l2"},
    "too few windows": {"samples": 1, "search_samples": 1},
}


@pytest.fixture(scope="module")
def recipes(models: Mapping[str, Path], from_file: Recipe) -> dict[str, Recipe]:
    made = {}
    for name, changes in RUNS.items():
        keeps = changes.get("top_up", "neuroal") == "neuroal"
        options = from_file.options if keeps else {}
        given = {"model": str(models["llama"]), "options": options} | changes
        made[name] = dataclasses.replace(from_file, **given)
    return made


@pytest.fixture(scope="module")
def together(
    recipes: dict[str, Recipe],
    recipe: Recipe,
    tmp_path_factory: pytest.TempPathFactory,
    run_process: Callable[..., Any],
) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the outputs of two processes, and what each of them returned."""
    folder = tmp_path_factory.mktemp("together")
    runs = {
        name: {
            "recipe": r.to_json(),
            "stream": "streamed" in name,
            "spill": name == "spilled",
        }
        for name, r in recipes.items()
    }
    (folder / "taken").mkdir()
    runs["taken"] = runs["neuroal"]
    given = {"folder": str(folder), "runs": runs, "in memory": recipe.to_json()}
    (folder / "given.json").write_text(json.dumps(given))
    done = run_process(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(Path(__file__).parents[1] / "programs/together.py", folder / "given.json"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank-{r}.json").read_text()) for r in (0, 1)]


@pytest.fixture(scope="module")
def alone(recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the outputs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, recipe in recipes.items():
        if "few" not in name:
            neuroal.prune(recipe.model, recipe=recipe, out=folder / name)  # type: ignore[arg-type]
    return folder


WORKS = [name for name in RUNS if "few" not in name]


@pytest.mark.parametrize("name", WORKS)
def test_the_search_is_the_same_to_the_bit(
    name: str, together: tuple[Path, Any], alone: Path
) -> None:
    both = [json.loads((f / name / "neuroal.json").read_text()) for f in (together[0], alone)]
    for key in ("candidates", "recipe_sha256", "model", "data", "plugins"):
        assert both[0][key] == both[1][key], key
    if name != "dense walk":  # its ratios come from merged statistics
        files = [f / name / "allocation.safetensors" for f in (together[0], alone)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert (both[0]["environment"]["processes"], both[1]["environment"]["processes"]) == (2, 1)


# A block is trained by every process on its own windows: the mean is another weight.
@pytest.mark.parametrize("name", [name for name in WORKS if name != "trains blocks"])
def test_the_weights_are_the_same_within_rounding(
    name: str, together: tuple[Path, Any], alone: Path, read: Read
) -> None:
    a, b = read(together[0] / name), read(alone / name)
    assert a.keys() == b.keys()
    differ = sum(int(((a[n] == 0) != (b[n] == 0)).sum()) for n in a)
    assert differ <= 1e-3 * sum(t.numel() for t in a.values())
    for n, weight in a.items():
        both = (weight != 0) & (b[n] != 0)
        torch.testing.assert_close(weight[both], b[n][both], rtol=1e-3, atol=1e-4)
    report = json.loads((together[0] / name / "neuroal.json").read_text())
    zeros = sum(int((t == 0).sum()) for n, t in a.items() if "proj" in n)
    assert zeros == report["counts"]["pruned"]


@pytest.mark.parametrize("name", [name for name in WORKS if "evaluated" in name])
def test_windows_to_evaluate_are_shared_out(
    name: str, together: tuple[Path, Any], alone: Path
) -> None:
    """However many there are: five windows for two processes, and one."""
    two, one = (json.loads((f / name / "neuroal.json").read_text()) for f in (together[0], alone))
    for a, b in zip(two["evaluation"], one["evaluation"], strict=True):
        assert (a["sha256"], a["windows"]) == (b["sha256"], b["windows"])
        assert a["dense_perplexity"] == pytest.approx(b["dense_perplexity"], rel=1e-6)
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-2)


def test_block_runs_are_shared_out(together: tuple[Path, Any], alone: Path) -> None:
    """2 candidates a step on a process each: the first block runs dense once in each."""
    both = [json.loads((f / "neuroal/neuroal.json").read_text()) for f in (together[0], alone)]
    runs = [r["counts"]["block_runs"] for r in both]
    search, final = 2 * 2 * (2 * (3 + 2) + 1), 6 * (2 * 3 - 1)
    assert runs == [search + final + 2 * 2, search + final]


def test_all_processes_return_the_same(together: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = together
    assert first["weights"] == second["weights"]  # of the model in memory
    for name in [*WORKS, "in memory"]:
        assert first["reports"][name] == second["reports"][name]
        assert first["reports"][name]["sparsity"]["achieved"] == pytest.approx(0.6, abs=1e-4)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted([*WORKS, "taken"])


def test_what_the_first_process_refuses_all_refuse(together: tuple[Path, Any]) -> None:
    for said in together[1]:
        assert "choose another or add --overwrite" in said["reports"]["taken"]["error"]


def test_more_processes_than_windows_are_refused(together: tuple[Path, Any]) -> None:
    for said in together[1]:
        assert said["reports"]["too few windows"]["error"] == (
            "2 processes share 1 windows: start fewer"
        )


# -- without processes -----------------------------------------------------------------------


def test_alone() -> None:
    assert Team.join() == ALONE and ALONE.leads
    assert ALONE.mine([1, 2, 3]) == [1, 2, 3]
    assert ALONE.exchange(b"x") == [b"x"]
    assert ALONE.first(lambda: None) is None and ALONE.first(lambda: b"") == b""
    assert ALONE.device("cuda") == "cuda"


def test_shares() -> None:
    """Every item is someone's, and comes back in order; windows stay in order."""
    for size in (1, 2, 3, 5):
        team = [Team(rank, size) for rank in range(size)]
        for count in range(8):
            items = list(range(count))
            assert team[0].interleaved([t.mine(items) for t in team]) == items
            ids = torch.arange(3 * count).reshape(count, 3)
            assert torch.cat([t.part(ids) for t in team]).equal(ids)


class Pair(Team):
    """Two processes in one: the other one gives what it is asked for beforehand."""

    other: Mapping[str, Tensor]

    def exchange_tensors(self, tensors: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        return [tensors, self.other] if self.rank == 0 else [self.other, tensors]


@pytest.mark.parametrize("name", ["input_norm", "input_sum", "input_var", "gram"])
def test_statistics_of_two_processes(name: str) -> None:
    """Those of all windows, whichever has how many of them."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn((5, 7, 4), generator=rng)
    made: list[Collector] = [Collector(resolve([name]), 4) for _ in range(3)]
    given: dict[str, Tensor] = {}

    class Second(Pair):
        def exchange_tensors(self, tensors: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
            given.update(tensors)
            return [tensors]

    for collector, part in zip(made, (x[:2], x[2:], x), strict=True):
        collector.update(part)
    made[1].statistics(Second(1, 2))
    pair = Pair(0, 2)
    object.__setattr__(pair, "other", given)
    merged, whole = made[0].statistics(pair), made[2].statistics()
    torch.testing.assert_close(merged[name], whole[name])
    assert (merged.windows, merged.tokens) == (5, 35)
