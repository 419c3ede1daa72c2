"""What every test runs under: no network, one thread, and nothing of the user's own caches."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

PROJECT = Path(__file__).resolve().parent.parent

# Before anything imports torch or a hub client; the commands that tests start inherit it.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
# One thread a process: sums in one order, and as many processes as there are cores (pytest -n).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# One vector width on every x86 machine: float32 sums round alike, and so do masks made from them.
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
# Triton reads this when it is imported, by whatever test comes first: kernels need no device.
os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from neuroal import Recipe, progress  # noqa: E402
from neuroal.testing import STRUCTURES, tiny_model, tiny_tokenizer  # noqa: E402
from neuroal.testing import windows as random_windows  # noqa: E402

progress.SECONDS = 3600.0  # what is said depends on no machine's speed

settings.register_profile("neuroal", deadline=None, database=None, derandomize=True)
settings.load_profile("neuroal")


def pytest_configure(config: pytest.Config) -> None:
    """Gives the run a hub cache of its own; pytest-xdist's workers share their controller's."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        cache = tempfile.mkdtemp(prefix="neuroal-tests-")
        os.environ |= {
            "HF_HOME": cache,
            "HF_HUB_CACHE": f"{cache}/hub",
            "HF_DATASETS_CACHE": f"{cache}/datasets",
        }
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


def pytest_report_header() -> str:
    return f"neuroal: {installed_at()}"


def pytest_sessionstart() -> None:
    """Stops a run that is meant for an installed wheel but would test another copy."""
    if os.environ.get("NEUROAL_TEST_WHEEL") == "1":
        site = Path(sysconfig.get_path("purelib")).resolve()
        for package in ("neuroal", "neuroal_plugins"):
            if not installed_at(package).is_relative_to(site):
                raise pytest.UsageError(
                    f"NEUROAL_TEST_WHEEL=1, but {package} is {installed_at(package)}, not in {site}"
                )


def installed_at(package: str = "neuroal") -> Path:
    """The folder that `package` would be imported from, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise pytest.UsageError(f"{package} is not installed: see CONTRIBUTING.md")
    return Path(spec.origin).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as `shared` each test that uses the fixture, so that `-m "not shared"` finds them."""
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the checkout."""
    return PROJECT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models, texts and reference results that stands beside the project."""
    path = Path(os.environ.get("NEUROAL_SHARED") or PROJECT.parent / "shared")
    if not (path / "models").is_dir():
        pytest.skip(f"no models/ in {path}; set NEUROAL_SHARED to the folder that has them")
    return path


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Installs a distribution: metadata, entry points and modules in a folder on the path.

    Its modules are called `stranger` and something, so that the next test imports its own.
    """
    before = set(sys.modules)

    def make(
        name: str,
        points: dict[str, dict[str, str]],
        modules: dict[str, str] | None = None,
        version: str = "1.0",
        requires: tuple[str, ...] = (),
    ) -> Path:
        folder = tmp_path / f"site-{name}"
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        lines = []
        for group, entries in points.items():
            lines += [f"[neuroal.{group}]", *(f"{k} = {v}" for k, v in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, source in (modules or {}).items():
            (folder / f"{module}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(str(folder))
        return folder

    yield make
    for module in set(sys.modules) - before:
        if module.startswith(("stranger", "neuroal_file_")):
            del sys.modules[module]


@pytest.fixture
def from_source(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Makes packages look installed, their metadata too, from the source that they are built from.

    Returns the environment of the processes that see them; nothing is built or downloaded.
    """

    def make(*folders: Path) -> dict[str, str]:
        path = []
        for folder in folders:
            project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
            name, version = project["name"], project["version"]
            info = tmp_path / "metadata" / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir(parents=True)
            needs = "".join(f"Requires-Dist: {x}\n" for x in project["dependencies"])
            head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            (info / "METADATA").write_text(head + needs)
            lines = []
            for group, entries in project["entry-points"].items():
                lines += [f"[{group}]", *(f"{k} = {v}" for k, v in entries.items())]
            (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
            path += [str(folder.resolve() / "src"), str(info.parent)]
        path.append(os.environ.get("PYTHONPATH", ""))
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}

    return make


# Seconds after which something hangs. No machine is so slow: a test waits for what a process does,
# and for no time to pass.
HANGS = 1800


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it started: politely first, for what has sessions of its own."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)


@pytest.fixture
def start_process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command, of which nothing is left when the test ends: `start_process(command)`."""
    with contextlib.ExitStack() as stack:

        def start(command: Sequence[object], **options: Any) -> subprocess.Popen[str]:
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
            process = subprocess.Popen([str(x) for x in command], start_new_session=True, **options)
            stack.enter_context(process)
            stack.callback(_end, process)
            return process

        yield start


@pytest.fixture(scope="session")
def run_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command to its end, or ends it and all that it started: `run_process(command)`."""

    def run(
        command: Sequence[object], *, input: str | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        given = subprocess.DEVNULL if input is None else subprocess.PIPE
        words = [str(x) for x in command]
        with subprocess.Popen(words, stdin=given, start_new_session=True, **options) as process:
            try:
                stdout, stderr = process.communicate(input, timeout=HANGS)
            finally:
                _end(process)
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """Waits for something to be so, however slow the machine: `until(lambda: file.exists())`.

    A process whose end makes that impossible may be given: its end then fails the test.
    """

    def wait(so: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
        end = time.monotonic() + HANGS
        while not so():
            if process is not None and process.poll() is not None and not so():
                pytest.fail(f"{process.args} ended with {process.returncode}")
            assert time.monotonic() < end, "it hangs"
            time.sleep(0.01)

    return wait


@pytest.fixture(autouse=True)
def torch_globals() -> Iterator[None]:
    """Seeds torch's global generator, and fails a test that leaves torch's settings changed."""

    def settings_now() -> dict[str, object]:
        return {
            "threads": torch.get_num_threads(),
            "default dtype": torch.get_default_dtype(),
            "grad mode": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    torch.manual_seed(0)
    before = settings_now()
    yield
    after = settings_now()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    assert after == before


# Tiny models of every structure, in memory and on disk, and a recipe that takes a blink.

SAMPLES, SEARCH_SAMPLES, LENGTH = 6, 2, 16

Tensors = dict[str, Tensor]
State = dict[str, str]


@pytest.fixture(scope="session")
def streaming() -> None:
    """Skips what streams a model where transformers cannot."""
    pytest.importorskip("transformers.conversion_mapping", reason="streaming needs transformers 5")


@pytest.fixture(params=STRUCTURES)
def structure(request: pytest.FixtureRequest) -> str:
    """Each structure in turn; mistral has fewer key/value heads, opt tied embeddings."""
    return str(request.param)


@pytest.fixture(scope="session")
def save() -> Callable[[nn.Module, Path], Path]:
    """Writes a model and the tiny tokenizer as a checkpoint."""

    def write(model: Any, folder: Path) -> Path:
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, save: Callable[[nn.Module, Path], Path]
) -> Mapping[str, Path]:
    """The folder of a saved model per structure: what `tiny_model` makes."""
    root = tmp_path_factory.mktemp("models")
    return {s: save(tiny_model(s), root / s) for s in STRUCTURES}


@pytest.fixture(scope="session")
def windows() -> Tensor:
    """Calibration token ids for a model in memory."""
    return random_windows(SAMPLES, LENGTH)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Wanda with NeuroAL on top, both grids cut to two candidates; wants `windows`."""
    return Recipe(
        sparsity=0.6,
        samples=SAMPLES,
        search_samples=SEARCH_SAMPLES,
        options={"linear_schedule": {"lambdas": [0.05, 0.1]}, "neuroal": {"lambdas": [0.0, 0.1]}},
        device="cpu",
    )


@pytest.fixture(scope="session")
def from_file(recipe: Recipe, windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The same recipe, reading the same windows from a file, for models given by path."""
    file = tmp_path_factory.mktemp("data") / "windows.jsonl"
    file.write_text("".join(json.dumps({"input_ids": w.tolist()}) + "\n" for w in windows))
    return dataclasses.replace(recipe, calibration=str(file))


@pytest.fixture(scope="session")
def read() -> Callable[[Path], Tensors]:
    """Reads every tensor of a checkpoint, without neuroal."""

    def tensors(folder: Path) -> Tensors:
        files = sorted(folder.glob("model*.safetensors"))
        return {name: t for file in files for name, t in load_file(file).items()}

    return tensors


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], State]:
    """The SHA-256 of every safetensors file in a folder, by name."""

    def sha256(folder: Path) -> State:
        files = sorted(folder.glob("*.safetensors"))
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    return sha256


@pytest.fixture(scope="session")
def linears() -> Callable[[nn.Module], dict[str, Tensor]]:
    """The weight of every `nn.Linear` in the decoder blocks by full name, without neuroal."""

    def weights(model: nn.Module) -> dict[str, Tensor]:
        return {
            name: module.weight.detach()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name
        }

    return weights


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[], State]:
    """Everything in the test's folder: path to SHA-256, or to "" for a folder."""

    def state() -> State:
        return {
            str(p.relative_to(tmp_path)): (
                hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
            )
            for p in sorted(tmp_path.rglob("*"))
        }

    return state


@pytest.fixture(scope="session")
def weights_of() -> Callable[[nn.Module], Tensors]:
    """A copy of everything a model holds."""

    def copies(model: nn.Module) -> Tensors:
        return {name: t.detach().clone() for name, t in model.state_dict().items()}

    return copies


@pytest.fixture(scope="session")
def same() -> Callable[[Tensors, Tensors], bool]:
    """Whether two sets of tensors are the same to the bit, names, shapes and dtypes included."""

    def equal(a: Tensors, b: Tensors) -> bool:
        return a.keys() == b.keys() and all(
            a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
        )

    return equal
