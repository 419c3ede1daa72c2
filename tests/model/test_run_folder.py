"""The output folder: what may be replaced, when, and what a failing run leaves of it."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import neuroal
from neuroal import NeuroalError, PluginError, Recipe, UsageError, hookimpl
from neuroal.model import files, pretrained, run_folder

Tree = Callable[[], dict[str, str]]


@pytest.fixture
def prune(models: Mapping[str, Path], recipe: Recipe, tmp_path: Path) -> Callable[..., Any]:
    """A run that needs no data, into `out`."""
    quick = dataclasses.replace(recipe, pruner="magnitude", top_up="uniform", options={})

    def run(out: str | Path = "out", changes: Mapping[str, Any] | None = None, **how: Any) -> Any:
        asked = dataclasses.replace(quick, **(changes or {}))
        return neuroal.prune(models["phi"], recipe=asked, out=tmp_path / out, **how)

    return run


@dataclasses.dataclass(frozen=True, eq=False)
class Fails:
    """Fails at once."""

    @hookimpl
    def score_weights(self) -> None:
        raise RuntimeError("no")


def test_existing_folder_is_refused(prune: Any, tmp_path: Path, tree: Tree) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep me")
    (tmp_path / "file").write_text("keep me too")
    before = tree()
    for name in ("empty", "mine", "file"):
        with pytest.raises(UsageError, match="exists: choose another or add --overwrite"):
            prune(name)
    for name in ("mine", "file"):
        with pytest.raises(UsageError, match="was not written by neuroal"):
            prune(name, overwrite=True)
        with pytest.raises(UsageError, match="was not written by neuroal") as error:
            prune(name, resume=True)
        assert "\n" not in str(error.value)
    assert tree() == before
    prune("empty", overwrite=True)
    assert (tmp_path / "empty" / "neuroal.json").is_file()


def test_every_file_may_be_read_by_the_same_people(prune: Any, tmp_path: Path) -> None:
    prune()
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in modes
    assert len(set(modes.values())) == 1, modes


def test_the_report_begins_with_its_schema(prune: Any, tmp_path: Path) -> None:
    prune()
    assert next(iter(files.read_report(tmp_path / "out"))) == "schema"


def test_refusal_comes_before_the_model_is_loaded(
    prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "load", None)
    monkeypatch.setattr(pretrained, "skeleton", None)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        prune()


def test_overwrite_replaces_an_earlier_run(prune: Any, tmp_path: Path, tree: Tree) -> None:
    prune(changes={"sparsity": 0.5})
    prune("fresh")
    prune(overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "out"]
    saved = {p: d for p, d in tree().items() if p.endswith(".safetensors")}
    assert saved["out/model.safetensors"] == saved["fresh/model.safetensors"]


@pytest.mark.parametrize("where", ["search", "save", "publish"])
def test_failing_run_leaves_the_earlier_one(
    where: str, prune: Any, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(changes={"sparsity": 0.5})
    before = tree()
    if where == "search":
        with pytest.raises(PluginError):
            prune(changes={"pruner": Fails()}, overwrite=True)
        assert tree() == before
        return

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    replace = os.replace

    def not_the_checkpoint(a: Path, b: Path) -> None:
        if Path(a).name == "checkpoint":
            full()
        replace(a, b)

    with monkeypatch.context() as patch:
        if where == "save":
            patch.setattr(pretrained, "save", full)
        else:
            patch.setattr(os, "replace", not_the_checkpoint)
        with pytest.raises(OSError, match="No space left"):
            prune(overwrite=True)
    now = tree()
    assert {p: d for p, d in now.items() if not p.startswith("out.partial")} == before
    # The disk has room again.
    prune(resume=True)
    prune("fresh")
    now = tree()
    assert now["out/model.safetensors"] == now["fresh/model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "out"]


def unfinished(out: Path, mark: str, *names: str) -> Path:
    """What a kill left beside `out`."""
    work = out.with_name("out.partial")
    for name in ("", *names):
        (work / name).mkdir()
    if mark:
        (work / "run.json").write_text(mark)
    return work


def test_what_a_kill_leaves_of_a_finished_run_is_removed(tmp_path: Path) -> None:
    """Killed once the folder stood under its name: whoever goes on finds a finished run."""
    out = tmp_path / "out"
    out.mkdir()
    work = unfinished(out, '{"decides": {}, "published": true}', "journal")
    run_folder.check(out, overwrite=False, resume=True)
    assert out.is_dir() and not work.exists()
    unfinished(out, '{"decides": {}, "published": true}', "journal", "checkpoint")
    run_folder.check(out, overwrite=False, resume=True)  # killed before, and made by another
    assert work.exists()


def test_what_a_kill_leaves_of_a_run_that_had_not_begun_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = unfinished(out, "", "journal")
    run_folder.check(out, overwrite=False, resume=False)
    assert not work.exists()
    unfinished(out, "", "replaced")  # the earlier run is all that there is
    with pytest.raises(UsageError, match="holds an unfinished run: add --resume"):
        run_folder.check(out, overwrite=False, resume=False)
    assert (work / "replaced").is_dir()


def test_a_command_that_cannot_go_on_does_not_say_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unfinished(out, '{"decides": {}}', "journal")
    with pytest.raises(UsageError, match=r"unfinished run: --overwrite begins anew$"):
        run_folder.check(out, overwrite=False, resume=None)


def test_a_damaged_mark_does_not_stop_who_begins_anew(prune: Any, tmp_path: Path) -> None:
    work = unfinished(tmp_path / "out", '{"dec', "journal")
    for how in ({}, {"resume": True}):
        with pytest.raises(NeuroalError, match=r"run\.json. is damaged or of another run"):
            prune(**how)
    prune(overwrite=True)
    assert (tmp_path / "out" / "neuroal.json").is_file() and not work.exists()


def test_neighbours_are_left_alone(prune: Any, tmp_path: Path) -> None:
    for name in ("out.old", "out.tmp", "out.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("keep me")
    prune()
    prune(overwrite=True)
    for name in ("out.old", "out.tmp", "out.bak"):
        assert (tmp_path / name / "file").read_text() == "keep me"


def test_a_folder_that_happens_to_be_in_the_way(prune: Any, tmp_path: Path, tree: Tree) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "file").write_text("keep me")
    before = tree()
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match=r"out\.partial'.* is not neuroal's"):
            prune(**how)
    assert tree() == before


def test_a_folder_made_while_the_run_went_on(
    prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = pretrained.save

    def meanwhile(*given: Any) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("keep me")
        save(*given)

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "save", meanwhile)
        with pytest.raises(neuroal.NeuroalError, match="made meanwhile: move it away"):
            prune()
    assert (tmp_path / "out" / "file").read_text() == "keep me"
    assert (tmp_path / "out.partial" / "checkpoint" / "neuroal.json").is_file()
    (tmp_path / "out" / "file").unlink()
    (tmp_path / "out").rmdir()
    prune(resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_parents_are_made_when_there_is_something_to_keep(
    prune: Any, tmp_path: Path, tree: Tree
) -> None:
    with pytest.raises(PluginError):
        prune("a/b/out", changes={"pruner": Fails()})
    assert tree() == {}
    prune("a/b/out")
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["..", "/"])
def test_a_folder_without_a_name(name: str, prune: Any, tmp_path: Path) -> None:
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match="output folder") as error:
            prune(Path(name) if name == "/" else tmp_path / name, **how)
        assert "\n" not in str(error.value)


def test_a_place_that_cannot_hold_a_folder(
    prune: Any, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    before = tree()
    for name in ("file/out", "file/a/out"):
        with pytest.raises(UsageError, match="cannot be made") as error:
            prune(name)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="no folder to write in"):
        prune("a/out")
    assert tree() == before


def test_relative_paths(
    prune: Any, models: Mapping[str, Path], recipe: Recipe, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    quick = dataclasses.replace(recipe, pruner="magnitude", top_up="uniform", options={})
    neuroal.prune(models["phi"], recipe=quick, out="out")
    with pytest.raises(UsageError, match=r"output folder '\.' has no name"):
        neuroal.prune(models["phi"], recipe=quick, out=".")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_unfit_disk(prune: Any, monkeypatch: pytest.MonkeyPatch, tree: Tree) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(neuroal.NeuroalError, match="iB of disk"):
        prune()
    assert tree() == {}
