"""The device of a run, and the memory that its process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from neuroal.errors import UsageError

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory(device: str = "cpu") -> int | None:
    """Return the bytes that this process can still take; None where the system does not say.

    The least of what the machine has, what its container (cgroup) and its own limits (RLIMIT_AS,
    RLIMIT_DATA) leave, and what an accelerator has free.
    """
    limits = [_machine(), *_containers(), *_limits()]
    if device.startswith("cuda"):
        limits.append(torch.cuda.mem_get_info(device)[0])
    known = [max(n, 0) for n in limits if n is not None]
    return min(known, default=None)


def resident_memory() -> int:
    """Return the bytes that this process has in memory now; 0 where the system does not say."""
    return _table(_PROC / "self/status").get("VmRSS", 0) * 1024


def _machine() -> int | None:
    kib = _table(_PROC / "meminfo").get("MemAvailable")
    return None if kib is None else kib * 1024


def _limits() -> Iterator[int]:
    """Yield what the limits of the process leave."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    status = _table(_PROC / "self/status")
    for kind, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - status.get(used, 0) * 1024


def _containers() -> Iterator[int]:
    """Yield what every memory cgroup of the process leaves; file cache that it can drop is free."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0":
            yield from _container(_CGROUPS, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _container(_CGROUPS / "memory", path, *names)


def _container(root: Path, path: str, limit: str, used: str, files: str) -> Iterator[int]:
    inner = Path(path.lstrip("/"))
    for folder in (root / inner, *(root / p for p in inner.parents), root):
        most, now = _number(folder / limit), _number(folder / used)
        if most is not None and now is not None:
            yield most - now + _table(folder / "memory.stat").get(files, 0)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _table(file: Path) -> dict[str, int]:
    """Return the numbers of a file of lines such as `MemAvailable:  5 kB` by name."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    rows = [line.replace(":", " ").split() for line in lines]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def device_of(name: str) -> str:
    """Return a torch device for "auto" or a name.

    Raises:
        UsageError: There is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"device '{name}' is not available: {why}") from None
    return name
