"""Errors: exit codes, and the half sentence after a misspelt name."""

import pytest

from neuroal.errors import NeuroalError, PluginError, UsageError, nearest


@pytest.mark.parametrize(("kind", "code"), [(NeuroalError, 1), (PluginError, 1), (UsageError, 2)])
def test_exit_code(kind: type[NeuroalError], code: int) -> None:
    assert issubclass(kind, NeuroalError)
    assert kind("x").exit_code == code


@pytest.mark.parametrize(
    ("name", "valid", "said"),
    [
        ("wnda", ["magnitude", "wanda"], "did you mean 'wanda'?"),
        ("zzz", ["b", "a"], "choose from a, b"),
        ("zzz", [], "there is nothing to choose from"),
        ("uniform", {"uniforn", "linear"}, "did you mean 'uniforn'?"),
    ],
)
def test_nearest(name: str, valid: list[str], said: str) -> None:
    assert nearest(name, valid) == said


def test_nearest_takes_an_iterator() -> None:
    assert nearest("wnda", iter(["wanda"])) == "did you mean 'wanda'?"
