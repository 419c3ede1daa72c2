"""One plugin of a run: its hooks are called alone, and what goes wrong bears its name.

pluggy finds and runs the implementation; every result, exception and write to an input is
attributed to plugin, distribution, version and hook.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from neuroal import options
from neuroal.errors import NeuroalError, PluginError
from neuroal.hookspecs import ROLES
from neuroal.plugins import contract
from neuroal.plugins.listing import one_line
from neuroal.plugins.trust import FILE, INSTANCE
from neuroal.types import Accumulator, Generation, Proposal, Proposals

_Traits = TypeVar("_Traits")


@dataclass(frozen=True, eq=False)
class Plugin:
    """A checked, option-bound plugin of one run.

    Attributes:
        role: Its role.
        name: Its name, by which options are given.
        distribution: Who declares it.
        version: The distribution's version.
        instance: The frozen dataclass instance.
        source: File that its class comes from, if there is one.
        sha256: Of the source file's bytes.
    """

    role: str
    name: str
    distribution: str
    version: str
    instance: Any
    source: Path | None
    sha256: str | None
    _callers: Mapping[str, Callable[..., Any]] = field(repr=False)

    @property
    def label(self) -> str:
        """Return role, name, distribution and version, as every error begins."""
        return f"{self.role} '{self.name}' ({self.distribution} {self.version})"

    @property
    def cure(self) -> str:
        """Return what helps against a mistake of the plugin's own."""
        own = self.version in (FILE, INSTANCE)
        return "correct it" if own else f"upgrade {self.distribution} or use another plugin"

    def has(self, hook: str) -> bool:
        """Return whether the plugin implements a hook."""
        return hook in self._callers

    @property
    def proposes(self) -> str:
        """Return the `propose_*` hook of a strategy."""
        return f"propose_{self.role}"

    def call(self, hook: str, /, **arguments: Any) -> Any:
        """Return the answer of one hook.

        Args:
            hook: One that the plugin has.
            **arguments: Every argument of the hook's specification.

        Raises:
            PluginError: The hook raised, returned None, or wrote to an input tensor.
        """
        if hook not in self._callers:
            raise self.error(hook, "the plugin does not have it")
        wanted = contract.arguments(ROLES[self.role].hooks[hook])
        if set(arguments) != set(wanted):  # the engine's fault, not the plugin's
            raise TypeError(f"{hook} takes {', '.join(wanted)}; given {', '.join(arguments)}")
        with self._blamed(hook, arguments):
            result = self._callers[hook](**arguments)
        if result is None:
            raise self.error(hook, "returned None: return the result")
        return result

    def proposals(self, hook: str, /, **arguments: Any) -> Proposals:
        """Return the generator of a `propose_*` hook, every step of it checked.

        What it yields is a `Generation` of one or more proposals, what it returns a `Proposal` or
        None; an error in any step is raised as from `call`.
        """
        generator = self.call(hook, **arguments)
        if not isinstance(generator, Generator):
            raise self.error(
                hook,
                f"returned {type(generator).__name__}, not a generator: yield a Generation "
                "(or have `yield from ()` before the return)",
            )
        return self._steps(hook, generator, arguments)

    def required_statistics(self) -> frozenset[str | Accumulator]:
        """Return the statistics that the plugin's hooks read; empty where it names none.

        Raises:
            PluginError: The answer is not a set of names and accumulators.
        """
        if not self.has("required_statistics"):
            return frozenset()
        answer = self.call("required_statistics")
        if not isinstance(answer, (set, frozenset)):
            kind = type(answer).__name__
            raise self.error("required_statistics", f"returned {kind}: return a set of names")
        return frozenset(answer)

    def statistic_names(self) -> frozenset[str]:
        """Return the names of the required statistics."""
        required = self.required_statistics()
        return frozenset(s if isinstance(s, str) else s.name for s in required)

    def traits(self, kind: type[_Traits]) -> _Traits:
        """Return what the plugin says of itself; the defaults where it has no `describe`.

        Args:
            kind: the traits class of its role, such as `PrunerTraits`.

        Raises:
            PluginError: `describe` answered something else.
        """
        if not self.has("describe"):
            return kind()
        answer = self.call("describe")
        if not isinstance(answer, kind):
            raise self.error("describe", f"returned {type(answer).__name__}, not {kind.__name__}")
        return answer

    def error(self, hook: str, problem: str) -> PluginError:
        """Return the error that says what a hook did wrong: a wrong shape, a NaN."""
        return PluginError(f"{self.label}, hook {hook}: {problem}")

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the plugin, as JSON values."""
        return {
            "role": self.role,
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "options": options.values(self.instance),
            "sha256": self.sha256,
        }

    def _steps(
        self, hook: str, generator: Generator[Any, Any, Any], arguments: Mapping[str, Any]
    ) -> Proposals:
        measurements = None
        try:
            while True:
                finished = False
                with self._blamed(hook, arguments):
                    try:
                        answer = generator.send(measurements)
                    except StopIteration as stop:
                        finished, answer = True, stop.value
                if finished:
                    if answer is not None and not isinstance(answer, Proposal):
                        name = type(answer).__name__
                        raise self.error(hook, f"returned {name}: return a Proposal or None")
                    return answer
                with self._blamed(hook, {}):
                    problem = _generation_problem(answer)
                if problem:
                    raise self.error(hook, problem)
                measurements = yield answer
        finally:
            with self._blamed(hook, {}):
                generator.close()

    @contextmanager
    def _blamed(self, hook: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        before = [(label, tensor, _version(tensor)) for label, tensor in _tensors("", arguments)]
        try:
            yield
        except (Exception, SystemExit) as error:
            problem = f"{one_line(error)}{self._line(error)}"
            if not isinstance(error, NeuroalError):  # which ends in a cure
                problem = f"{problem}: {self.cure}"
            raise self.error(hook, problem) from error
        for label, tensor, version in before:
            if _version(tensor) != version:
                raise self.error(hook, f"wrote to its input '{label}': work on a copy (clone())")

    def _line(self, error: BaseException) -> str:
        if self.source is None:
            return ""
        frames = traceback.walk_tb(error.__traceback__)
        lines = [n for frame, n in frames if frame.f_code.co_filename == str(self.source)]
        return f" ({self.source.name}, line {lines[-1]})" if lines else ""


def _generation_problem(value: object) -> str | None:
    if not isinstance(value, Generation):
        return f"yielded {type(value).__name__}: yield a Generation"
    proposals = value.proposals
    if not isinstance(proposals, Sequence) or not proposals:
        return "yielded a Generation without proposals: give a list of one or more"
    strange = next((p for p in proposals if not isinstance(p, Proposal)), None)
    if strange is not None:
        return f"yielded a Generation of {type(strange).__name__}: give a list of Proposal"
    if value.windows is not None and value.windows < 1:
        return f"yielded windows={value.windows}: it must be at least 1"
    if value.reuse_first_weights and not value.probe:
        return "yielded reuse_first_weights=True with proposals that can win: give it probe=True"
    return None


def _tensors(label: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every tensor in an argument with the path to it; what has a `_version` is a tensor."""
    if _version(value) is not None:
        yield label, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{label}[{key}]" if label else str(key), item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors(f"{label}[{i}]", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from _tensors(f"{label}.{f.name}", getattr(value, f.name))
    elif callable(getattr(type(value), "tensors", None)):  # Statistics
        for key, item in value.tensors().items():
            yield from _tensors(f"{label}.{key}", item)


def _version(value: Any) -> int | None:
    try:
        version = value._version
    except (AttributeError, RuntimeError):  # no tensor, or an inference tensor without a counter
        return None
    return version if isinstance(version, int) else None
