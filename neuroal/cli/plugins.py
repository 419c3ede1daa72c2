"""`neuroal plugins`: what is installed, what it does, whether it works."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroal.cli.command import Group, echo, message_options, option, print_json
from neuroal.cli.tables import table
from neuroal.hookspecs import ROLES

if TYPE_CHECKING:
    from neuroal.plugins import Listing


@click.group(
    cls=Group,
    examples=[
        "neuroal plugins list --role pruner",
        "neuroal plugins show neuroal",
        "neuroal plugins check",
    ],
)
def plugins() -> None:
    """List, explain and check the installed plugins."""


def _role(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    return None if value is None else value.replace("-", "_")


def _identity(x: Listing) -> dict[str, Any]:
    return {k: getattr(x, k) for k in ("role", "name", "distribution", "version")}


_role_option = option(
    "--role",
    group="Filter",
    callback=_role,
    metavar="ROLE",
    help=f"Only this role: {', '.join(ROLES)} or top_up.",
)


@plugins.command(
    "list", examples=["neuroal plugins list", "neuroal plugins list --role block-ratios"]
)
@_role_option
@message_options(json="the list")
def list_plugins(role: str | None, as_json: bool) -> None:
    """List the installed plugins by role, without importing them."""
    from neuroal.plugins import available

    listings = available(role)
    if as_json:
        print_json({"plugins": [_identity(x) | {"status": x.status} for x in listings]})
        return
    rows: list[tuple[object, ...]] = []
    for i, x in enumerate(listings):
        again = i > 0 and listings[i - 1].role == x.role
        cure = {"clash": f": write {x.qualified}", "incompatible": f": needs {x.needs}"}
        status = x.status + cure.get(x.status, "")
        rows.append(("" if again else x.role, x.name, f"{x.distribution} {x.version}", status))
    echo(table(rows, ("role", "name", "from", "status")))


@plugins.command(
    "show",
    examples=[
        "neuroal plugins show wanda",
        "neuroal plugins show uniform --role row-ratios",
        "neuroal plugins show ./mine.py:Mine",
    ],
)
@click.argument("name")
@_role_option
@message_options(json="the descriptions")
def show_plugin(name: str, role: str | None, as_json: bool) -> None:
    """Explain the plugins called NAME: what they do, their options and hooks.

    NAME is a name from the list, distribution:name, or ./file.py:Class.
    """
    from neuroal.plugins import Description, describe, listings

    descriptions = [describe(listing) for listing in listings(name, role)]

    def values(x: Description) -> dict[str, Any]:
        keys = ("name", "type", "default", "help")
        return _identity(x.listing) | {
            "doc": x.doc,
            "options": [dict(zip(keys, row, strict=True)) for row in x.options],
            "hooks": list(x.hooks),
            "source": str(x.source) if x.source else None,
            "sha256": x.sha256,
        }

    if as_json:
        print_json({"plugins": [values(x) for x in descriptions]})
        return
    echo("\n\n".join(_description(values(x)) for x in descriptions))


def _description(values: dict[str, Any]) -> str:
    lines = [
        f"{values['role']} {values['name']} ({values['distribution']} {values['version']})",
        "",
        *(f"  {line}".rstrip() for line in values["doc"].splitlines()),
        "",
    ]
    options = values["options"]
    if not values["hooks"]:  # a preset
        lines.append(table([(x["name"], x["default"]) for x in options]))
    else:
        lines.append("options (-o):" if options else "no options")
        for x in options:
            lines.append(f"  {values['name']}.{x['name']}: {x['type']}")
            lines += [f"    {x['help']}"] if x["help"] else []
            lines.append(f"    default: {x['default']}")
        lines += ["", f"hooks: {', '.join(values['hooks'])}"]
    if values["source"]:
        lines += [f"source: {values['source']}", f"sha256: {values['sha256']}"]
    return "\n".join(lines)


@plugins.command(
    "new",
    examples=[
        "neuroal plugins new my_score --role pruner",
        "neuroal plugins new my-search --role block-ratios --out here",
    ],
)
@click.argument("name")
@option(
    "--role",
    group="Plugin",
    required=True,
    callback=_role,
    metavar="ROLE",
    help=f"One of {', '.join(ROLES)}.",
)
@option(
    "--out",
    metavar="DIR",
    group="Plugin",
    help="Folder to write.  [default: neuroal- and the name]",
)
@message_options()
def new_plugin(name: str, role: str, out: str | None) -> None:
    """Write a package with a working plugin called NAME, its tests and all it takes to publish it.

    The plugin does something simple; put your own equation in its place.
    """
    from neuroal.plugins import scaffold

    folder = scaffold.write(name, role, Path(out) if out else None)
    echo(f"written to {folder}; go on with")
    for line in (
        f"cd {folder}",
        'pip install -e ".[test]"',
        "pytest",
        *scaffold.use(name, role),
    ):
        echo(f"  {line}")


@plugins.command(
    "check",
    examples=[
        "neuroal plugins check",
        "neuroal plugins check wanda evolution",
        "neuroal plugins check ./mine.py:Mine",
    ],
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_role_option
@message_options(json="the result")
@click.pass_context
def check_plugins(
    ctx: click.Context, names: tuple[str, ...], role: str | None, as_json: bool
) -> None:
    """Load plugins and run the checks of their roles; the exit code is 1 if one is broken.

    NAME is a name from the list, distribution:name, or ./file.py:Class; without one, every
    installed plugin is checked. Searches are not run to their end.
    """
    from neuroal.plugins import available, listings
    from neuroal.testing import check_installed

    chosen = [x for name in names for x in listings(name, role)] if names else available(role)
    results: list[tuple[Listing, str]] = []
    for x, error in check_installed(chosen):
        results.append((x, error))
        if not as_json:
            echo(error or f"{x}: ok")
    broken = sum(bool(error) for _, error in results)
    if as_json:
        values = [_identity(x) | {"error": error or None} for x, error in results]
        print_json({"broken": broken, "plugins": values})
    else:
        one = "plugin" if len(results) == 1 else "plugins"
        echo(f"{len(results)} {one}, {broken} broken")
    if broken:
        ctx.exit(1)
