"""What commands share: grouped options, errors in one line, quiet libraries."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from neuroal.errors import NeuroalError, UsageError
from neuroal.recipe import DTYPES

SOURCES = (
    "a .txt, .jsonl, .json or .parquet file (also .gz), c4, wikitext2, ptb, demo, "
    "or a hub data set owner/name[:config][:split][:column]"
)
_VERBOSE = "neuroal.verbose"
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


class Group(click.Group):
    """A group of commands with examples, that shows its help where no command is given."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        attributes.setdefault("invoke_without_command", True)
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with their first sentences, which click would cut to one line."""
        names = self.list_commands(ctx)
        commands = [(name, self.get_command(ctx, name)) for name in names]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, c.get_short_help_str(limit=1000)) for name, c in commands if c is not None]
            )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples at the end of the help."""
        _write_examples(self.examples, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, or show the help."""
        result = super().invoke(ctx)
        if ctx.invoked_subcommand is None:
            click.echo(ctx.get_help())
        return result


class Command(click.Command):
    """A command whose options come in groups and whose errors are one line."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples at the end of the help."""
        _write_examples(self.examples, formatter)

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


def option(*names: str, group: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return `click.option` with a heading for `--help`."""
    attributes.setdefault("show_default", True)
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


def json_option(what: str) -> Callable[[Any], Any]:
    """Return the flag `--json`, passed as `as_json`."""
    help = f"Print {what} as one JSON object on stdout, and nothing else there."
    return option("--json", "as_json", group="Messages", is_flag=True, help=help)


def quiet_option(function: Any) -> Any:
    """Add the flag `--quiet`."""
    help = "No progress bars and no summary."
    return option("-q", "--quiet", group="Messages", is_flag=True, help=help)(function)


def progress_option(function: Any) -> Any:
    """Add the flag `--progress / --no-progress`; None where neither is given."""
    help = "Progress bars on stderr.  [default: where it is a terminal]"
    flags = "--progress/--no-progress"
    return option(flags, group="Messages", default=None, show_default=False, help=help)(function)


def verbose_option(function: Any) -> Any:
    """Add `-v`, which `Command.invoke` reads."""

    def keep(ctx: click.Context, _: click.Parameter, value: int) -> None:
        ctx.meta[_VERBOSE] = value

    return option(
        "-v",
        "--verbose",
        group="Messages",
        count=True,
        show_default=False,
        expose_value=False,
        callback=keep,
        help="Tracebacks of errors, and logs on stderr; -vv for more.",
    )(function)


def trust_option(function: Any) -> Any:
    """Add the flag `--trust-remote-code`."""
    help = "Let code that comes with the model run."
    return option("--trust-remote-code", group="Model", is_flag=True, help=help)(function)


def text_options(what: str) -> Callable[[Any], Any]:
    """Return the options of a text to measure perplexity on: `--data`, `--length`, `--windows`."""

    def add(function: Any) -> Any:
        most = "At most so many windows.  [default: all]"
        function = option("--windows", type=int, group="Perplexity", help=most)(function)
        tokens = "Tokens per window.  [default: the smaller of 2048 and the model's context]"
        function = option("--length", type=int, group="Perplexity", help=tokens)(function)
        source = f"{what}: {SOURCES}."
        return option("--data", metavar="SOURCE", group="Perplexity", help=source)(function)

    return add


def load_options(function: Any) -> Any:
    """Add the options of how a model is loaded: `--device` and `--dtype`."""
    dtype = "Dtype to load the weights in; auto is the checkpoint's own."
    choice = click.Choice(DTYPES)
    function = option("--dtype", type=choice, default="auto", group="Model", help=dtype)(function)
    device = "auto, cpu, cuda, cuda:0 or mps."
    return option("--device", default="auto", group="Model", help=device)(function)


def shows_progress(asked: bool | None, quiet: bool) -> bool:
    """Return whether to show progress bars: as asked, else where stderr is a terminal."""
    return not quiet and (sys.stderr.isatty() if asked is None else asked)


def leads() -> bool:
    """Return whether this process is the first of those that `torchrun` started, or alone."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print one line on stderr."""
    click.echo(" ".join(text.split()), err=True)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


@contextmanager
def clean_stdout(wanted: bool) -> Iterator[None]:
    """Send to stderr what a library or plugin prints on stdout."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


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
        return f"{record.levelname.capitalize()}: {super().format(record)}"


def _write_examples(examples: Iterable[str], formatter: click.HelpFormatter) -> None:
    with formatter.section("Examples"):
        for line in examples:  # as it is typed: never wrapped
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def _unexpected(error: Exception, verbose: int) -> str:
    name, text = type(error).__name__, str(error)
    hint = "" if verbose else " (run with -v for the traceback)"
    return f"{name}: {text}{hint}" if text else f"{name}{hint}"


def _close_bars() -> None:
    """End progress bars that an error left open, so that it gets a line of its own."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
