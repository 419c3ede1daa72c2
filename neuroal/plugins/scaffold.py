"""A new plugin's package, complete and working: pyproject, source, tests, README, workflow.

The files are those of `templates/`, with names put in by `string.Template`: there is nothing in
them to branch or loop over.
"""

from __future__ import annotations

import importlib.resources
import keyword
import re
from pathlib import Path
from string import Template

import neuroal
from neuroal.errors import UsageError, nearest
from neuroal.hookspecs import ROLES
from neuroal.plugins import available

# A word of letters and digits that begins with a letter, and further ones.
NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
# What the templates import beside neuroal's own names.
IMPORTED = frozenset({"Generator", "Mapping", "Tensor"})


def write(name: str, role: str, out: Path | None = None) -> Path:
    """Write the package of a new plugin.

    Args:
        name: What the plugin will be called: `my_pruner`.
        role: Its role.
        out: The folder to write; by default one in the current folder, called as the
            distribution: `neuroal-my-pruner`.

    Returns:
        The folder.

    Raises:
        UsageError: The name will not do, or is taken; the role is unknown; the folder exists.
    """
    if role not in ROLES:
        raise UsageError(f"unknown role '{role}': {nearest(role, ROLES)}")
    names = _names(name, role)
    folder = Path(names["distribution"]) if out is None else out
    if folder.exists():
        raise UsageError(f"'{folder}' exists: give another folder (--out), or remove it")
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        ".gitignore": "gitignore",
        ".github/workflows/test.yml": "test.yml",
        f"src/{names['module']}/__init__.py": f"{role}.py",
        f"tests/test_{names['module']}.py": f"test_{role}.py",
    }
    templates = importlib.resources.files("neuroal.plugins") / "templates"
    texts = {
        path: Template((templates / f"{template}.in").read_text(encoding="utf-8"))
        for path, template in files.items()
    }
    for path, text in texts.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.substitute(names), encoding="utf-8")
    (folder / "src" / names["module"] / "py.typed").touch()
    return folder


def use(name: str, role: str) -> list[str]:
    """Return the commands that use a plugin."""
    if role == "exporter":
        return ["neuroal prune demo --out pruned", f"neuroal export pruned --to {name} --out other"]
    return [f"neuroal prune demo --{role.replace('_', '-')} {name} --out pruned"]


def _names(name: str, role: str) -> dict[str, str]:
    """Return everything that the templates have a place for."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' is no name for a plugin: write small letters and digits, a letter first, "
            "and _ or - between words"
        )
    words = re.split("[_-]", name)
    class_ = "".join(word.capitalize() for word in words)
    module = "neuroal_" + "_".join(words)
    if keyword.iskeyword(class_) or class_ in IMPORTED | set(neuroal.__all__):
        raise UsageError(f"'{name}' would make a class {class_}, which is taken: choose another")
    if module == "neuroal_plugins":
        raise UsageError(f"'{name}' would make the package {module}, which is taken")
    taken = [x for x in available(role) if x.name == name]
    if taken:
        raise UsageError(f"there is a {taken[0]}: choose another name")
    return {
        "name": name,
        "role": role,
        "flag": role.replace("_", "-"),
        "use": "\n".join(use(name, role)),
        "words": role.replace("_", "-"),
        "distribution": "-".join(["neuroal", *words]),
        "module": module,
        "class_": class_,
        "version": ".".join(neuroal.__version__.split(".")[:2]),
    }
