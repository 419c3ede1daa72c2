"""What is wrong with a study, as far as it is known before torch is imported."""

from __future__ import annotations

from pathlib import Path

from neuroal.model.places import locate
from neuroal.recipe import TOP_UP_ROLES, Recipe
from neuroal.run.mistakes import check_names, check_text
from neuroal.study.file import Study, read, within


def read_checked(file: Path) -> Study:
    """Read a study file, and refuse names, folders, columns and lengths that are wrong.

    Of a text no more than a row is read, of a model its config.json.

    Raises:
        UsageError: The file, a name or a number is wrong.
        NeuroalError: A model or a text is not there, or a text has not the column.
    """
    study = read(file)
    with within(f"study '{file}'"):
        _check_methods(study)
        for number, evaluation in enumerate(study.evaluations, 1):
            with within(f"evaluations[{number}]"):
                if evaluation.data is not None:
                    check_text(evaluation.data, None, evaluation.windows, evaluation.length)
        _check_models(study)
    return study


def _check_methods(study: Study) -> None:
    """Refuse pruners and top-ups that name a plugin that is not there."""
    check_names(Recipe(requires=study.requires))
    for number, pruner in enumerate(study.pruners, 1):
        with within(f"pruners[{number}]"):
            check_names(Recipe(pruner=pruner.name))
    for number, top_up in enumerate(study.top_ups, 1):
        with within(f"top_ups[{number}]"):
            roles = {role: getattr(top_up, role) for role in TOP_UP_ROLES}
            check_names(Recipe(top_up=top_up.name, **roles))


def _check_models(study: Study) -> None:
    """Refuse models that are not there, and texts that they cannot read."""
    for number, model in enumerate(study.models, 1):
        with within(f"models[{number}] '{model.label}'"):
            locate(model.name)
            source, how = study.source_for(model), study.calibration
            if source is not None:
                check_text(source, model.name, how.samples, how.length)
            for evaluation in study.evaluations:
                if evaluation.data is not None:
                    with within(f"evaluation '{evaluation.label}'"):
                        sizes = evaluation.windows, evaluation.length
                        check_text(evaluation.data, model.name, *sizes)
