"""From a study to its cases: what is run, by which name, and which combinations are impossible."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import neuroal
from neuroal import layout
from neuroal.cost.preparation import Prepared, prepare
from neuroal.data.sizes import check_sizes
from neuroal.data.source import parse_source
from neuroal.errors import NeuroalError, PluginError, UsageError
from neuroal.model import files, pretrained
from neuroal.plugins import listing_of
from neuroal.recipe import TOP_UP_ROLES, Recipe
from neuroal.study.file import ModelEntry, PrunerEntry, Study, TopUpEntry, within

_WINDOWS = ("samples", "length", "window_bos", "pack_documents")  # what a source is cut into
# Of the linears that are pruned, and of their zeros.
_CHOICE = ("skip_indivisible", "keep_zeros", "keep", "only", "sparsity_over")
_SHARED = ("budget", "comparison", *_CHOICE, "requires")  # by all cases
DENSE = {"pruner": None, "top_up": None, "sparsity": 0.0, "pattern": None, "seed": None}


@dataclass(frozen=True)
class StudyCase:
    """One thing to run: a model, pruned by a recipe or as it is, to be evaluated.

    Attributes:
        id: The first 16 digits of the SHA-256 of everything that decides the model's weights.
            Cases that differ in name alone share it, and are run once.
        labels: model, pruner, top_up, sparsity, pattern and seed, as tables call them; of a dense
            model all but the first as in `DENSE`.
        recipe: How it is pruned, or None for the dense model.
        model: Folder, hub name, or "demo".
        model_sha256: Of its config and weights; None for a hub name.
        dtype: Dtype in which it is loaded.
        device: Where it runs; "auto" is resolved there.
    """

    id: str
    labels: Mapping[str, Any]
    recipe: Recipe | None
    model: str
    model_sha256: str | None
    dtype: str
    device: str

    @property
    def title(self) -> str:
        """Return one line that identifies the case."""
        return title(self.labels)


def title(labels: Mapping[str, Any]) -> str:
    """Return one line that identifies the case of these labels."""
    x = labels
    if x["pruner"] is None:
        return f"{x['model']}, dense"
    pattern = "" if x["pattern"] == "unstructured" else f" {x['pattern']}"
    method = f"{x['pruner']} + {x['top_up']} at {x['sparsity']:g}{pattern}"
    return f"{x['model']}, {method}, seed {x['seed']}"


@dataclass(frozen=True)
class SkippedCase:
    """A combination that cannot be run, and why."""

    labels: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Expansion:
    """All combinations of a study: models outermost, each after its dense baseline."""

    cases: tuple[StudyCase, ...]
    skipped: tuple[SkippedCase, ...]

    @property
    def distinct(self) -> tuple[StudyCase, ...]:
        """Return the cases that are run: the first of every id."""
        first: dict[str, StudyCase] = {}
        for case in self.cases:
            first.setdefault(case.id, case)
        return tuple(first.values())


def expand(study: Study, trust_remote_code: bool = False) -> Expansion:
    """Cross the lists of a study; reads configs, hashes files, and loads no weights.

    A combination that cannot be run is skipped. An entry of which no combination is left is an
    error: it is misspelt, or wrong by itself.

    Raises:
        UsageError: There is such an entry, or a source is wrong.
        NeuroalError: A model's structure cannot be read, or a plugin is broken.
    """
    cases: list[StudyCase] = []
    skipped: list[SkippedCase] = []
    for number, model in enumerate(study.models, 1):
        plain = Recipe(model=model.name, dtype=model.dtype or study.dtype, device=study.device)
        with within(f"models[{number}] '{model.label}'"):
            _check_lengths(study, pretrained.load_config(model.name, trust_remote_code))
            skeleton = pretrained.skeleton(model.name, trust_remote_code)
            prepare_recipe = partial(prepare, model=skeleton, layout=layout.find(skeleton))
            sha256 = files.fingerprint(model.name)
            plain = dataclasses.replace(plain, **_calibration(study, model))
            cases.append(_case({"model": model.label, **DENSE}, plain, sha256, None))
            for labels, recipe in _combinations(study, plain):
                labels = {"model": model.label, **labels}
                try:
                    prepared = prepare_recipe(recipe)
                except PluginError:
                    raise
                except NeuroalError as error:  # a combination that makes no sense
                    skipped.append(SkippedCase(labels, str(error)))
                    continue
                if recipe.calibration is None and prepared.reads_data:
                    raise UsageError(
                        "give it calibration: a source in [calibration], or one of its own"
                    )
                cases.append(_case(labels, recipe, sha256, prepared))
    _refuse_dead_entries(study, cases, skipped)
    return Expansion(tuple(cases), tuple(skipped))


def _check_lengths(study: Study, config: Any) -> None:
    """Refuse windows that are longer than the model's context."""
    context = pretrained.context_length(config)
    check_sizes(study.calibration.samples, study.calibration.length, context)
    for evaluation in study.evaluations:
        if evaluation.data is not None:
            with within(f"evaluation '{evaluation.label}'"):
                check_sizes(evaluation.windows, evaluation.length, context)


def _calibration(study: Study, model: ModelEntry) -> dict[str, Any]:
    """Return the fields of a recipe that say what the model is calibrated on."""
    values = dataclasses.asdict(study.calibration)
    del values["source"]
    return {**values, "calibration": study.source_for(model)}


def _combinations(study: Study, plain: Recipe) -> Iterator[tuple[dict[str, Any], Recipe]]:
    """Yield labels (but for the model's) and recipe of every combination for one model."""
    sparsities = study.sparsities or (None,)
    for pruner, top_up, pattern, sparsity, seed in itertools.product(
        study.pruners, study.top_ups, study.patterns, sparsities, study.seeds
    ):
        recipe = dataclasses.replace(
            plain,
            pruner=pruner.name,
            top_up=top_up.name,
            pattern=pattern,
            sparsity=sparsity,
            ratios=top_up.ratios,
            seed=seed,
            **{role: getattr(top_up, role) for role in TOP_UP_ROLES},
            **{key: getattr(study, key) for key in _SHARED},
        )
        labels = {
            "pruner": pruner.label,
            "top_up": top_up.label,
            "sparsity": recipe.wanted,
            "pattern": pattern,
            "seed": seed,
        }
        yield labels, dataclasses.replace(recipe, options=_options(pruner, top_up))


def _options(pruner: PrunerEntry, top_up: TopUpEntry) -> dict[str, dict[str, Any]]:
    options = {name: dict(values) for name, values in top_up.options.items()}
    if pruner.options:
        name = listing_of("pruner", pruner.name).name
        options[name] = options.get(name, {}) | dict(pruner.options)
    return options


def _refuse_dead_entries(
    study: Study, cases: Sequence[StudyCase], skipped: Sequence[SkippedCase]
) -> None:
    for key, label, values in (
        ("pruners", "pruner", [x.label for x in study.pruners]),
        ("top_ups", "top_up", [x.label for x in study.top_ups]),
        ("patterns", "pattern", study.patterns),
        ("sparsities", "sparsity", study.sparsities),
    ):
        for value in values:
            if not any(case.recipe and case.labels[label] == value for case in cases):
                reason = next(s.reason for s in skipped if s.labels[label] == value)
                raise UsageError(f"{reason} (no combination is left of {key} {value!r})")


def _case(
    labels: Mapping[str, Any], recipe: Recipe, model_sha256: str | None, prepared: Prepared | None
) -> StudyCase:
    """Return a case; the dense model's where nothing is prepared."""
    decides: dict[str, Any] = {
        "neuroal": neuroal.__version__,
        "model": model_sha256 or recipe.model,
        "dtype": recipe.dtype,
    }
    if prepared is not None:
        setup = prepared.setup
        fields = ("budget", "pattern", *_CHOICE, "wanted", "seed")
        decides |= {key: getattr(recipe, key) for key in (*fields, *_WINDOWS)}
        if recipe.ratios:
            decides["ratios"] = recipe.to_json()["ratios"]
        decides["search_samples"] = setup.search_samples
        decides["comparison"] = setup.comparison
        decides["plugins"] = setup.provenance
        decides["calibration"] = source_identity(recipe.calibration)
    text = json.dumps(decides, sort_keys=True)
    return StudyCase(
        id=hashlib.sha256(text.encode()).hexdigest()[:16],
        labels=labels,
        recipe=recipe if prepared is not None else None,
        model=str(recipe.model),
        model_sha256=model_sha256,
        dtype=recipe.dtype,
        device=recipe.device,
    )


def source_identity(text: str | None) -> object:
    """Return what identifies a source: the content of a file, else its name."""
    source = None if text is None else parse_source(text)
    if source is None or not Path(source.path).is_file():
        return text
    return [file_sha256(source.path), source.kind, source.column]


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file's bytes, read again where it has changed."""
    state = os.stat(path)
    return _sha256(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache
def _sha256(path: str, _mtime: int, _size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
