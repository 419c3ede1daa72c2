"""Mutated inputs of seven kinds, and hostile ones."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaign.attempts import Row, attempt, until
from tests.campaign.world import World, fresh

Table = dict[str, Row]

STRANGE: Sequence[Any] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "0", "x" * 3000, "\0", "\ud800", "../..", "/", "~", "é" * 300, "%s{0}", "<b>|`", "\x1b[31m",
    [], {}, [[]], [None], {"": 0}, {"a": {"b": {}}}, ["x"] * 50, "auto", "cuda", "llama",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        name: What is mutated.
        file: Its path in a copy of the world.
        words: What reads it.
    """

    name: str
    file: Callable[[World], Path]
    words: Callable[[World, Path], list[object]]


KINDS = [
    Kind("recipe", lambda w: w.root / "recipe.json",
         lambda w, file: ["prune", "--recipe", file, "--dry-run", "-q"]),
    Kind("study file", lambda w: w.study, lambda w, file: ["study", "plan", file]),
    Kind("neuroal.json", lambda w: w.finished / "neuroal.json",
         lambda w, file: ["report", file.parent, "--out", file.parent.parent / "report.html"]),
    Kind("config.json", lambda w: w.model / "config.json",
         lambda w, file: ["layout", file.parent]),
    Kind("tokenizer", lambda w: w.model / "tokenizer.json",
         lambda w, file: dry_run(w, file.parent)),
    Kind("safetensors", lambda w: w.model / "model.safetensors",
         lambda w, file: magnitude(file.parent)),
    Kind("text data", lambda w: w.root / "rows.jsonl", lambda w, file: dry_run(w, w.model, file)),
]  # fmt: skip


def dry_run(world: World, model: Path, data: Path | None = None) -> list[object]:
    words = ["prune", model, "--calibration", data or world.text, "--samples", 2, "--length", 16]
    return [*words, "--top-up", "uniform", "--dry-run", "-q", "--device", "cpu"]


def magnitude(model: Path) -> list[object]:
    words = ["prune", model, "--pruner", "magnitude", "--top-up", "uniform", "--device", "cpu"]
    return [*words, "-q", "--out", model.parent / "pruned"]


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are changed, cut, doubled, or removed somewhere."""
    at = rng.randrange(len(data) + 1)
    some = rng.randrange(1, 40)
    how = rng.randrange(7)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + rng.randbytes(some) + data[at:]
    if how == 2:
        return data[:at] + data[at + some :]
    if how == 3:
        return data[:at] + bytes(some) + data[at + some :]
    if how == 4:
        return data[:at] + data[at : at + some] * 3 + data[at:]
    if how == 5:
        return rng.choice(
            (b"", b"\n", b"\xff\xfe", b"{}", b"[]", b"null", b"\0" * 8, b"\xef\xbb\xbf")
        )
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every value of a JSON tree: what holds it, and its key or index."""
    pairs = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    found = []
    for key, value in list(pairs):
        found.append((tree, key))
        found += places(value)
    return found


def strange(tree: Any, rng: random.Random) -> Any:
    """A JSON tree with a few values replaced, removed, or added."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = places(tree)
        if not found:
            return rng.choice(STRANGE)
        holder, key = rng.choice(found)
        how = rng.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "\0", "__proto__", "pruner", str(key).upper()))] = (
                holder.pop(key)
            )
        elif how == 2:
            other, name = rng.choice(found)
            if isinstance(other, dict) and name in other:
                holder[key] = json.loads(json.dumps(other[name], default=str))
        else:
            holder[key] = rng.choice(STRANGE)
    return tree


def mutated(data: bytes, kind: str, rng: random.Random) -> bytes:
    """A mutation of a file's bytes, or of the values in it."""
    if rng.random() < 0.35:
        return spoil(data, rng)
    if kind == "safetensors":
        size = int.from_bytes(data[:8], "little")
        header = dump(strange(json.loads(data[8 : 8 + size]), rng))
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    if kind == "text data":
        lines = data.decode().splitlines()
        at = rng.randrange(len(lines))
        rows = [dump(strange(json.loads(lines[at]), rng)).decode("utf-8", "surrogatepass"), *lines]
        return "\n".join(rows[: rng.randrange(1, len(rows) + 1)]).encode("utf-8", "surrogatepass")
    if kind == "study file":
        return of_toml(data.decode(), rng)
    return dump(strange(json.loads(data), rng))


def dump(tree: Any) -> bytes:
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def of_toml(text: str, rng: random.Random) -> bytes:
    """A study file with the value of a line replaced, or a line moved, doubled or removed."""
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        key = lines[at].partition("=")[0].strip() or "models"
        other = rng.choice(("pattern", "seeds", "options", "evaluations", "requires", "keep", "x"))
        value = rng.choice(STRANGE)
        text = json.dumps(value) if not isinstance(value, dict) else "{ a = { b = 1 } }"
        new = f"{rng.choice((key, key, other))} = {text}"
        lines[at : at + 1] = rng.choice(([new], [new], [lines[at]] * 2, [], [lines[at], "[" * 40]))
        if not lines:
            lines = [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def inputs(world: World, seconds: float, seed: int, table: Table) -> None:
    """Mutate inputs of every kind in turn while there is time."""
    recipe = json.loads((world.finished / "neuroal.json").read_text())["recipe"]
    (world.root / "recipe.json").write_text(json.dumps(recipe))
    rows = [
        json.dumps({"text": line, "id": i})
        for i, line in enumerate(world.text.read_text().split(". "))
    ]
    (world.root / "rows.jsonl").write_text("\n".join(rows))
    for n in until(seconds):
        kind = KINDS[n % len(KINDS)]
        rng = random.Random(f"{seed}/{n}")
        copy = fresh(world.root / "mutated")
        original = kind.file(world)
        file = copy / original.name
        if original.parent in (world.model, world.finished):
            shutil.copytree(original.parent, copy / "in")
            file = copy / "in" / original.name
        file.write_bytes(mutated(original.read_bytes(), kind.name, rng))
        ended = attempt(kind.words(world, file))
        wrong = ended.wrong
        if not wrong and ended.status and (copy / "pruned").exists():
            wrong = "half a result"
        row = table.setdefault(f"mutated, {kind.name}", Row())
        row.add(
            "refused" if ended.status else "taken",
            wrong and f"{kind.name}, seed {seed}/{n}: {wrong} | {ended.last}",
        )


EVIL = """
from dataclasses import dataclass
from pathlib import Path
from neuroal import hookimpl
Path({marker!r}).write_text("ran")

@dataclass(frozen=True, eq=False)
class Evil:
    @hookimpl
    def score_weights(self, weight):
        return weight.abs()
"""


def hostile(world: World, _seconds: float, _seed: int, table: Table) -> None:
    """What a stranger may send: no code of it runs, and everything is refused in a line."""
    root = fresh(world.root / "hostile")
    marker = root / "ran"
    (root / "evil.py").write_text(EVIL.format(marker=str(marker)))
    recipe = json.loads((world.finished / "neuroal.json").read_text())["recipe"]
    evil = f"{root / 'evil.py'}:Evil"
    (root / "recipe.json").write_text(json.dumps(recipe | {"pruner": evil}))
    (root / "study.toml").write_text(
        world.study.read_text().replace('"magnitude"', json.dumps(evil))
    )
    pickled = shutil.copytree(world.model, root / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    remote = shutil.copytree(world.model, root / "remote")
    config = json.loads((remote / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}
    (remote / "config.json").write_text(json.dumps(config))
    shutil.copy(root / "evil.py", remote / "evil.py")
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "file").write_text("")
    huge = 2_000_000_000
    cases: dict[str, list[object]] = {
        "a plugin file in a recipe": ["prune", "--recipe", root / "recipe.json", "--dry-run"],
        "and run": ["prune", "--recipe", root / "recipe.json", "--out", root / "a"],
        "a plugin file in a study": ["study", "plan", root / "study.toml"],
        "and its run": ["study", "run", root / "study.toml", "--out", root / "b"],
        "a pickle": magnitude(pickled),
        "remote code": magnitude(remote),
        "a dangling link": world.prune(root / "dangling"),
        "a file for a folder": world.prune(root / "file"),
        "NUL in a name": world.prune("a\0b"),
        "a long name": world.prune(root / ("x" * 300)),
        "a long source": [*dry_run(world, world.model, Path("y" * 3000))],
        "many samples": world.prune(root / "c", "--samples", huge),
        "many tokens": world.prune(root / "d", "--length", huge),
        "a huge batch": ["prune", world.model, "--batch", "-1", "--dry-run"],
    }
    row = table.setdefault("hostile", Row())
    for name, words in cases.items():
        ended = attempt(words)
        wrong = ended.wrong
        if marker.exists():
            marker.unlink()
            wrong = "code of a stranger ran"
        elif not wrong and ended.status == 0:
            wrong = "taken"
        row.add("refused", wrong and f"{name}: {wrong} | {ended.last}")
