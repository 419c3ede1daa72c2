"""The presets name plugins that exist."""

import importlib.util

import pytest

from neuroal import TopUp
from neuroal_plugins import top_up

PRESETS = {name: value for name, value in vars(top_up).items() if isinstance(value, TopUp)}


@pytest.mark.parametrize(
    ("name", "block_ratios", "row_ratios", "alignment", "refiner"),
    [
        ("UNIFORM", "uniform", "uniform", "neuron", None),
        ("NEUROAL", "linear_schedule", "neuroal", "neuron", None),
        ("NEUROAL_FAST", "lambda_parabola", "neuroal_parabola", "neuron", None),
        ("NEUROAL_BLOCK", "linear_schedule", "uniform", "neuron", None),
        ("NEUROAL_ROW", "uniform", "neuroal", "neuron", None),
        ("OWL", "owl", "uniform", "neuron", None),
        ("DLP", "dlp", "uniform", "neuron", None),
        ("ALPHAPRUNING", "alphapruning", "uniform", "neuron", None),
        ("DSNOT", "uniform", "uniform", "neuron", "dsnot"),
        ("EVOLUTION", "evolution", "uniform", "output_kl", None),
        ("BEST", "sensitivity", "uniform", "output_kl", None),
        ("BEST_SLOW", "sensitivity", "row_sensitivity", "output_kl", None),
    ],
)
def test_preset(
    name: str, block_ratios: str, row_ratios: str, alignment: str, refiner: str | None
) -> None:
    preset = PRESETS[name]
    assert preset.block_ratios == (block_ratios,)
    assert (preset.row_ratios, preset.alignment, preset.refiner) == (row_ratios, alignment, refiner)
    assert preset.reconstruction is None


@pytest.mark.parametrize("name", PRESETS)
def test_preset_names_files_that_exist(name: str) -> None:
    preset = PRESETS[name]
    named = [("block_ratios", plugin) for plugin in preset.block_ratios]
    named += [("row_ratios", preset.row_ratios), ("alignment", preset.alignment)]
    named += [("refiner", preset.refiner)] if preset.refiner else []
    named += [("reconstruction", preset.reconstruction)] if preset.reconstruction else []
    for role, plugin in named:
        assert importlib.util.find_spec(f"neuroal_plugins.{role}.{plugin}"), plugin


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_one_line_of_help(name: str) -> None:
    help_line = PRESETS[name].help
    assert help_line
    assert "\n" not in help_line
