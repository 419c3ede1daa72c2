"""The study file: what it may say, and what a mistake in it is met with."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from string import Template

import pytest

from neuroal.errors import UsageError
from neuroal.plugins import listing_of
from neuroal.plugins.trust import FILE
from neuroal.study.file import EvaluationEntry, ModelEntry, PrunerEntry, TopUpEntry, read

SMALL = 'models = ["demo"]\n'
EVALUATION = '[[evaluations]]\ndata = "demo"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def test_entries_are_strings_or_tables(tmp_path: Path) -> None:
    (tmp_path / "models/llama").mkdir(parents=True)
    (tmp_path / "mine.py").touch()
    text = """
    models = ["models/llama", {name = "org/opt", label = "OPT", dtype = "float16"}]
    pruners = ["wanda", {name = "ria", label = "ria 1", options = {a = 1.0}}, "mine.py:Mine"]
    sparsities = [0, 0.5]
    evaluations = ["wikitext2", {tasks = ["rte", "boolq"], limit = 5}]

    [[top_ups]]
    name = "neuroal:owl"

    [[top_ups]]
    name = "uniform"
    label = "both"
    block_ratios = ["owl", "dlp"]
    row_ratios = "neuroal"
    options = {owl = {M = 4}}
    """
    study = read(write(tmp_path, text))
    assert study.models == (
        ModelEntry(f"{tmp_path}/models/llama", "llama"),  # beside the file
        ModelEntry("org/opt", "OPT", "float16"),
    )
    assert study.pruners == (
        PrunerEntry("wanda", "wanda"),
        PrunerEntry("ria", "ria 1", {"a": 1.0}),
        PrunerEntry(f"{tmp_path}/mine.py:Mine", "Mine"),
    )
    assert study.top_ups[0] == TopUpEntry("neuroal:owl", "owl")
    assert study.top_ups[1].block_ratios == ("owl", "dlp")
    assert study.top_ups[1].options == {"owl": {"M": 4}}
    assert study.sparsities == (0.0, 0.5)
    assert study.evaluations == (
        EvaluationEntry("wikitext2", label="wikitext2"),
        EvaluationEntry(tasks=("rte", "boolq"), limit=5, label="rte + boolq"),
    )


def test_how_windows_are_cut_is_said_for_calibration_and_each_text(tmp_path: Path) -> None:
    text = """
    models = ["llama"]

    [calibration]
    bos = "always"
    pack_documents = true

    [[evaluations]]
    data = "demo"

    [[evaluations]]
    data = "wikitext2"
    bos = "always"
    pack_documents = false
    """
    study = read(write(tmp_path, text))
    assert study.calibration.bos == "always" and study.calibration.pack_documents is True
    assert [e.bos for e in study.evaluations] == [None, "always"]
    assert [e.pack_documents for e in study.evaluations] == [None, False]
    # The paper's budget is the published protocol throughout, unless something else is said.
    published = read(write(tmp_path, 'budget = "paper"\n' + text))
    assert [e.bos for e in published.evaluations] == ["never", "always"]
    for old, new, says in (
        ('"always"', '"no"', "bos in calibration is 'no', not"),
        ('data = "demo"', 'tasks = ["rte"]\n    bos = "never"', "bos has no meaning beside tasks"),
    ):
        with pytest.raises(UsageError, match=says):
            read(write(tmp_path, text.replace(old, new, 1)))


def test_a_plugins_name_is_no_path(tmp_path: Path) -> None:
    text = """
    models = ["llama"]
    pruners = ["wanda", "mine.py:Mine"]
    evaluations = ["rows"]

    [[top_ups]]
    name = "best"

    [[top_ups]]
    name = "neuroal:owl"
    block_ratios = ["owl", "./mine.py:Blocks"]
    row_ratios = "neuroal"
    alignment = "neuron"
    refiner = "dsnot"
    reconstruction = "refit"

    [[top_ups]]
    name = "mine.py:TOP_UP"
    row_ratios = "mine.py:Rows"
    alignment = "mine.py:Distance"
    refiner = "mine.py:Refiner"
    reconstruction = "mine.py:Values"
    """
    for name in ("llama", "rows", "wanda", "best", "neuroal", "owl", "neuron", "dsnot", "refit"):
        (tmp_path / name).mkdir()  # such as the results of another study
    (tmp_path / "mine.py").touch()
    study = read(write(tmp_path, text))
    mine = f"{tmp_path}/mine.py"
    assert study.models[0].name == f"{tmp_path}/llama"
    assert study.evaluations[0].data == f"{tmp_path}/rows"
    assert [x.name for x in study.pruners] == ["wanda", f"{mine}:Mine"]
    best, owl, own = study.top_ups
    assert best == TopUpEntry("best", "best")
    assert owl == TopUpEntry(
        *("neuroal:owl", "owl", ("owl", f"{mine}:Blocks"), "neuroal", "neuron", "dsnot", "refit")
    )
    assert own == TopUpEntry(
        *(f"{mine}:TOP_UP", "TOP_UP", None, f"{mine}:Rows", f"{mine}:Distance"),
        *(f"{mine}:Refiner", f"{mine}:Values"),
    )


def test_a_study_can_remove_the_refiner_of_a_preset(tmp_path: Path) -> None:
    top_ups = '[[top_ups]]\nname = "dsnot"\nrefiner = "none"\n'
    study = read(write(tmp_path, SMALL + EVALUATION + top_ups))
    assert study.top_ups == (TopUpEntry("dsnot", "dsnot", refiner="none"),)


def test_a_study_can_remove_the_reconstruction_of_a_preset(tmp_path: Path) -> None:
    top_ups = '[[top_ups]]\nname = "best"\nreconstruction = "none"\n'
    study = read(write(tmp_path, SMALL + EVALUATION + top_ups))
    assert study.top_ups == (TopUpEntry("best", "best", reconstruction="none"),)


@pytest.mark.parametrize("name", ["wanda", "neuroal:wanda", "x.py:Mine", "x.py", "x.pyc", "x.py.d"])
def test_plugins_of_files_are_those_that_the_loader_takes_for_them(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name.partition(":")[0]).mkdir()
    study = read(write(tmp_path, f'pruners = ["{name}"]\n{SMALL}{EVALUATION}'))
    try:
        of_file = listing_of("pruner", name).version == FILE
    except UsageError as error:
        of_file = "unknown" not in str(error)
    assert study.pruners[0].name == (f"{tmp_path}/{name}" if of_file else name)


def test_what_is_left_out(tmp_path: Path) -> None:
    study = read(write(tmp_path, SMALL + EVALUATION))
    assert [x.name for x in study.pruners] == ["wanda"]
    assert [x.name for x in study.top_ups] == ["uniform", "neuroal"]
    assert (study.sparsities, study.patterns, study.seeds) == ((), ("unstructured",), (0,))
    assert (study.calibration.samples, study.calibration.search_samples) == (128, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('modells = ["demo"]', "unknown key 'modells': did you mean 'models'?"),
        ("sparsity = [0.5]", "unknown key 'sparsity': did you mean 'sparsities'?"),
        ("[[ratios]]", "ratios: they belong to one of top_ups, [[top_ups.ratios]]"),
        (
            'top_ups = [{name = "uniform", ratios = [{match = "mlp"}]}]',
            "top_ups[1]: an entry of ratios has no sparsity: give match and sparsity",
        ),
        ('top_ups = [{name = "uniform", ratios = 0.5}]', "top_ups[1]: ratios is 0.5: write a list"),
        (
            "[calibration]\nsample = 3",
            "unknown key 'sample' in calibration: did you mean 'samples'?",
        ),
        ('pruners = [{nam = "wanda"}]', "unknown key 'nam' in pruners[1]: did you mean 'name'?"),
        ('pruners = [{label = "w"}]', "no name in pruners[1]: at least one is needed"),
        ("pruners = [3]", "pruners[1] is 3: write a string or a table"),
        ('pruners = "wanda"', "pruners is 'wanda': write a list, ['wanda']"),
        ("pruners = []", "pruners is empty: leave it out, or name one"),
        ('sparsities = ["much"]', "sparsities is ['much'], not list of float"),
        ("sparsities = [1.5]", "sparsity 1.5 is outside [0, 1)"),
        ('patterns = ["2of4"]', "pattern '2of4' is neither 'unstructured' nor N:M such as 2:4"),
        ("seeds = [0, 1, 0]", "seeds has '0' twice"),
        ('pruners = ["a/x", "b/x"]', "pruners has 'x' twice: give one a label"),
        ('budget = "exct"', "budget is 'exct', not exact or paper"),
        ("[calibration]\nsamples = 0", "samples 0 is not a positive number"),
        ('top_ups = [{name = "owl", options = {M = 4}}]', "options in top_ups[1] are {'M': 4}"),
    ],
)
def test_a_mistake_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"{'' if 'modell' in text else SMALL}{text}\n{EVALUATION}")
    with pytest.raises(UsageError) as error:
        read(path)
    assert str(error.value).startswith(f"study '{path}': ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no evaluations: at least one is needed"),
        ("[[evaluations]]\nwindows = 3", "evaluations[1]: give data (a source, for perplexity) or"),
        ('evaluations = [{data = "c4", tasks = ["rte"]}]', "or tasks (zero-shot), one of them"),
        (
            'evaluations = [{data = "c4", limit = 3}]',
            "evaluations[1]: limit has no meaning beside data",
        ),
        ('evaluations = [{tasks = ["rte"], length = 3}]', "length has no meaning beside tasks"),
        ('evaluations = ["c4", "c4"]', "evaluations has 'c4' twice: give one a label"),
    ],
)
def test_a_mistake_in_an_evaluation_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read(write(tmp_path, SMALL + text))
    assert message in str(error.value)


def test_no_file_and_no_toml(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read study '.*none.toml': No such file"):
        read(tmp_path / "none.toml")
    with pytest.raises(UsageError, match=r"study '.*' is not TOML: Invalid value"):
        read(write(tmp_path, "models = ["))


@pytest.mark.parametrize("name", ["study", "paper"])
def test_templates_are_studies(name: str, tmp_path: Path) -> None:
    template = importlib.resources.files("neuroal.study") / "templates" / f"{name}.toml.in"
    text = Template(template.read_text("utf-8")).substitute(name="x.toml")
    study = read(write(tmp_path, text))
    if name == "paper":  # the paper's numbers
        assert study.sparsities == (0.6, 0.7, 0.8)
        assert (study.calibration.samples, study.calibration.search_samples) == (128, 8)
        assert study.calibration.length == 2048
        assert [e.label for e in study.evaluations] == ["wikitext2", "c4", "ptb", "zero-shot"]
