"""Zero-shot tasks of own text: one of four endings, and the seven of the paper in their schemas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ENDINGS = """\
task: endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.5
"""
# A definition of the harness's own, on other data.
OWN_DATA = """\
include: {definition}
task: {name}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    validation: {data}
    test: {data}
training_split: null
"""
_ENTAILMENT = [
    {"sentence1": "The ferry left at noon.", "sentence2": "The ferry left.", "label": 0},
    {"sentence1": "The bridge is old.", "sentence2": "The bridge is new.", "label": 1},
    {"sentence1": "Ana sold her boat.", "sentence2": "Ana had a boat.", "label": 0},
]
_PRONOUNS = [
    {
        "sentence": "The jar fits the box since the _ is wide.",
        "option1": "jar",
        "option2": "box",
        "answer": "2",
    },
    {
        "sentence": "Mia thanked Eva because _ was helped.",
        "option1": "Mia",
        "option2": "Eva",
        "answer": "1",
    },
]
_YES_NO = [
    {"passage": "Snow is ice.", "question": "is snow ice", "label": 1},
    {"passage": "Pines keep green.", "question": "do they go bare", "label": 0},
]
_ACTIVITIES = [
    {
        "activity_label": "Baking bread",
        "ctx_a": "A baker kneads the dough.",
        "ctx_b": "he",
        "endings": ["lets it rise.", "paints a wall.", "climbs [step] a tree.", "sings."],
        "label": "0",
    },
    {
        "activity_label": "Rowing",
        "ctx_a": "Two girls sit in a boat.",
        "ctx_b": "they",
        "endings": ["bake.", "pull the oars.", "type.", "ski."],
        "label": "1",
    },
]


def _choices(field: str) -> list[dict[str, Any]]:
    return [
        {
            field: "What melts in the sun",
            "choices": {"text": ["stone", "ice", "iron", "sand"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        {
            field: "What do bees make",
            "choices": {"text": ["milk", "honey", "silk"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        {
            field: "What floats on water",
            "choices": {
                "text": ["cork", "lead", "a coin", "a brick"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "A",
        },
    ]


DOCUMENTS = {
    "rte": _ENTAILMENT,
    "winogrande": _PRONOUNS,
    "boolq": _YES_NO,
    "hellaswag": _ACTIVITIES,
    "arc_easy": _choices("question"),
    "arc_challenge": _choices("question"),
    "openbookqa": _choices("question_stem"),
}
DEFINITIONS = {
    "rte": "glue/rte/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def endings() -> list[dict[str, Any]]:
    """Documents `{ctx, endings: [4], label}`."""
    places = ["mill", "harbour", "orchard", "chapel", "market"]
    return [
        {
            "ctx": f"{who} went down to the {place}",
            "endings": [f"and {does} {what}." for what in ("at dawn", "twice", "alone", "again")],
            "label": (n + k) % 4,
        }
        for n, place in enumerate(places)
        for k, (who, does) in enumerate([("Otto", "waited"), ("The miller", "sang a song")])
    ]


@pytest.fixture(scope="session")
def definitions(endings: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the definition of the task `endings` and its data."""
    folder = tmp_path_factory.mktemp("definitions")
    data = write(folder / "endings.jsonl", endings)
    (folder / "endings.yaml").write_text(ENDINGS.format(data=data), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def documents() -> dict[str, list[dict[str, Any]]]:
    """Documents by task of the paper."""
    return DOCUMENTS


@pytest.fixture(scope="session")
def paper_definitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the harness's own definitions of the paper's tasks, on documents of ours."""
    import lm_eval.tasks

    folder = tmp_path_factory.mktemp("paper")
    shipped = Path(lm_eval.tasks.__file__).parent
    for name, file in DEFINITIONS.items():
        definition = shipped / file
        data = write(folder / f"{name}.jsonl", DOCUMENTS[name])
        text = OWN_DATA.format(definition=definition, name=name, data=data)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder
