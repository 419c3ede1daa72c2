"""What commands share: grouped options, errors in one line, quiet libraries."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import click

from neuroal.errors import NeuroalError, UsageError
from neuroal.escape import terminal
from neuroal.recipe import DTYPES, no_ratio
from neuroal.types import Bos

SOURCES = (
    "a .txt, .jsonl, .json or .parquet file (also .gz), c4, wikitext2, ptb, demo, "
    "or a hub data set owner/name[:config][:split][:column]"
)
_VERBOSE = "neuroal.verbose"
# What the system says where a library cannot be loaded into what memory there is.
_NO_ROOM = (
    *("failed to map segment", "cannot allocate memory", "Cannot allocate memory"),
    *("can't allocate memory", "out of memory", "bad alloc", "bad_alloc", "Unable to allocate"),
)
_NO_DISK = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "PytorchStreamWriter",
    "unexpected pos",
    "iostream error",
)
_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


class Stopped(NeuroalError):
    """The user pressed Ctrl-C."""

    exit_code = 130


class GroupedOption(click.Option):
    """An option that `--help` lists under a heading."""

    def __init__(self, *names: Any, group: str = "Options", **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.group = group


class _WithExamples(click.Command):
    """A command whose help ends in examples."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples at the end of the help, each as it is typed: never wrapped."""
        with formatter.section("Examples"):
            for line in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Command(_WithExamples):
    """A command whose options come in groups and whose errors are one line."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings, in order of declaration."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.params:
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, GroupedOption):
                groups.setdefault(parameter.group, []).append(record)
        groups.setdefault("Messages", []).append(("--help", "Show this message and exit."))
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error becomes one line on stderr and an exit code."""
        verbose: int = ctx.meta.get(_VERBOSE, 0)
        caught: BaseException
        with _messages(verbose):
            try:
                result = super().invoke(ctx)
                sys.stdout.flush()  # a broken pipe shows here and not at exit
                return result
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except NeuroalError as error:
                caught, line, status = error, str(error), error.exit_code
            except KeyboardInterrupt as error:
                caught, line, status = error, "interrupted", Stopped.exit_code
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.EPIPE:
                    raise  # click ends quietly
                caught, line, status = error, _unexpected(error, verbose), 1
        _close_bars()
        if not leads() and isinstance(caught, UsageError):
            ctx.exit(status)  # the first process says the same
        if verbose:
            traceback.print_exception(caught)
        say(f"Error: {line}")
        ctx.exit(status)


class Group(_WithExamples, click.Group):
    """A group of commands, that shows its help where no command is given."""

    command_class = Command

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, invoke_without_command=True, **attributes)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with their first sentences, which click would cut to one line."""
        with formatter.section("Commands"):
            commands = sorted(self.commands.items())
            formatter.write_dl([(name, x.get_short_help_str(1000)) for name, x in commands])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, or show the help."""
        result = super().invoke(ctx)
        if ctx.invoked_subcommand is None:
            click.echo(ctx.get_help())
        return result


def option(*names: str, group: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return `click.option` with a heading for `--help`."""
    attributes.setdefault("show_default", True)
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


def ratios(text: str) -> float | tuple[float, ...]:
    """Return one ratio in [0, 1), or several with commas between; the type of an option.

    Raises:
        BadParameter: It is neither.
    """
    try:
        found = tuple(float(x) for x in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"'{text}' is not a number, nor several with commas between."
        ) from None
    for number in found:
        if not 0 <= number < 1:
            raise click.BadParameter(no_ratio(number))
    return found[0] if len(found) == 1 else found


def seconds(text: str) -> float:
    """Return the seconds of `90s`, `10m` or `1.5h`; the type of an option.

    Raises:
        BadParameter: It is no such time.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not match or not float(match[1]) > 0:
        raise click.BadParameter(f"'{text}' is not a time such as 90s, 10m or 1.5h.")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def message_options(
    json: str = "", quiet: bool = False, progress: bool = False
) -> Callable[[Any], Any]:
    """Return the options of what a command prints; `-v` is always among them.

    Args:
        json: What `--json` prints, passed as `as_json`; "" leaves it out.
        quiet: Add `--quiet`.
        progress: Add `--progress / --no-progress`, passed as whether to show any: as asked, else
            it is shown; never with `--quiet`.
    """

    def shown(ctx: click.Context, _: click.Parameter, asked: bool | None) -> bool:
        return not ctx.params.get("quiet") and asked is not False

    def keep(ctx: click.Context, _: click.Parameter, value: int) -> None:
        ctx.meta[_VERBOSE] = value  # for `Command.invoke`

    message = partial(option, group="Messages")
    options = []
    if json:
        help = f"Print {json} as one JSON object on stdout, and nothing else there."
        options.append(message("--json", "as_json", is_flag=True, help=help))
    if quiet:  # eager: known when progress is decided
        help = "No progress and no summary."
        options.append(message("-q", "--quiet", is_flag=True, is_eager=True, help=help))
    if progress:
        help = "Bars on stderr, or a line every 30 seconds where it is no terminal.  [default: on]"
        flags = "--progress/--no-progress"
        options.append(message(flags, default=None, callback=shown, help=help))
    help = "Tracebacks of errors, and logs on stderr; -vv for more."
    kept = partial(message, count=True, show_default=False, expose_value=False, callback=keep)
    return _all([*options, kept("-v", "--verbose", help=help)])


def _all(options: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Return one decorator for several options, in the order of `--help`."""

    def add(function: Any) -> Any:
        for decorate in reversed(options):
            function = decorate(function)
        return function

    return add


trust_option = option(
    "--trust-remote-code",
    group="Model",
    is_flag=True,
    help="Let code that comes with the model run.",
)
allow_option = option(
    "--allow-plugin-files",
    group="Run",
    is_flag=True,
    help="Run the code that the file names: plugins as ./mine.py:Mine, folders of task "
    "definitions.",
)
_PATTERNS = "a name or glob, first:2, last:1, attention or mlp"
keep_options = _all(
    [
        option(
            "--keep",
            multiple=True,
            metavar="PATTERN",
            group="Linears",
            help=f"Leave linears dense under every method: {_PATTERNS}. May be repeated.",
        ),
        option(
            "--only",
            multiple=True,
            metavar="PATTERN",
            group="Linears",
            help="Prune these linears and no others, patterns as for --keep. May be repeated.",
        ),
    ]
)
_DTYPE = (
    "Dtype to load the weights in; auto is the checkpoint's own, or for a perplexity float32 on a "
    "CPU that computes faster in it."
)
load_options = _all(
    [
        option("--device", default="auto", group="Model", help="auto, cpu, cuda, cuda:0 or mps."),
        option("--dtype", type=click.Choice(DTYPES), default="auto", group="Model", help=_DTYPE),
    ]
)


def window_options(group: str, unless: str = "") -> Callable[[Any], Any]:
    """Return the options of how text becomes windows: `--bos` and `--pack-documents`.

    Args:
        group: Their heading.
        unless: Where "auto" puts no token.
    """
    shared = partial(option, group=group, default=None)
    bos = (
        "Begin every window with the beginning-of-sequence token; auto does so where the tokenizer "
        f"begins a text with it{unless}.  [default: auto]"
    )
    packed = (
        "Join documents by the end-of-sequence token.  [default: conversations are joined, texts "
        "are not]"
    )
    return _all(
        [
            shared("--bos", type=click.Choice(typing.get_args(Bos)), help=bos),
            shared("--pack-documents/--no-pack-documents", help=packed),
        ]
    )


def text_options(what: str) -> Callable[[Any], Any]:
    """Return the options of a text to measure perplexity on: `--data` and how it is cut."""
    text = partial(option, group="Perplexity")
    tokens = "Tokens per window.  [default: the smaller of 2048 and the model's context]"
    most = "At most so many windows.  [default: all]"
    return _all(
        [
            text("--data", metavar="SOURCE", help=f"{what}: {SOURCES}."),
            text("--length", type=int, help=tokens),
            text("--windows", type=int, help=most),
            window_options("Perplexity"),
        ]
    )


def check_needed(needed: str, given: str | None, **options: object) -> None:
    """Refuse options whose values would not be read.

    Raises:
        UsageError: `needed` is not given, and one of the options is.
    """
    for name, value in options.items():
        if value is not None and given is None:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is for {needed}, which is not given")


def leads() -> bool:
    """Return whether this process is the first of those that `torchrun` started, or alone."""
    return os.environ.get("RANK", "0") == "0"


def echo(text: str, err: bool = False, nl: bool = True) -> None:
    """Print text, whoever it is from, on stdout or stderr."""
    click.echo(terminal(text), err=err, nl=nl)


def say(text: str) -> None:
    """Print one line on stderr."""
    echo(" ".join(text.split()), err=True)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    echo(json.dumps(value, indent=1, ensure_ascii=False))


def clean_stdout(wanted: bool) -> AbstractContextManager[Any]:
    """Send to stderr what a library or plugin prints on stdout."""
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


@contextmanager
def _messages(verbose: int) -> Iterator[None]:
    """Show neuroal's own warnings; with -v also its logs and what libraries warn of."""
    log = logging.getLogger("neuroal")
    handler = logging.StreamHandler()
    handler.setFormatter(_LogLine())
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.propagate = False
    log.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    with warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
            for name, value in _LIBRARIES.items():
                os.environ.setdefault(name, value)
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate


class _LogLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return terminal(f"{record.levelname.capitalize()}: {super().format(record)}")


def _unexpected(error: Exception, verbose: int) -> str:
    """Return the line for an error that is not neuroal's own; what the system lacks has a cure."""
    name, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(x in text for x in _NO_ROOM):
        few = "--stream, --spill or a smaller --batch need less"
        return f"memory is too small for Python and its libraries, or for the run ({few}): {text}"
    if any(x in text for x in _NO_DISK):
        return f"the disk is too small: {text}: make room; --resume goes on with a run"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"'{error.filename}': {error.strerror}"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!a:.80} is no text that can be written: {error.reason}"
    if isinstance(error, RecursionError):
        return "what is read is nested too deeply"
    hint = "" if verbose else " (run with -v for the traceback)"
    return f"{name}: {text}{hint}" if text else f"{name}{hint}"


def _close_bars() -> None:
    """End progress bars that an error left open, so that it gets a line of its own."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
