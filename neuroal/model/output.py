"""Where a command writes: the name of its output folder, and the one process that writes there."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from neuroal.errors import UsageError

log = logging.getLogger(__name__)

_LONGEST = 255 - len(".partial.lock")  # bytes of a name, with what is made beside it


def output_folder(name: str | Path, in_place: bool = False) -> Path:
    """Return the folder that a name means, with `~` as the home directory.

    Args:
        name: As it was given.
        in_place: What is there stays and is added to, so that a link to a folder will do.

    Raises:
        UsageError: No folder of this name can be made here, or it is a link.
    """
    text = str(name)
    try:
        encoded = os.fsencode(text)
        out = Path(text).expanduser()
    except UnicodeEncodeError:
        raise UsageError(f"output folder {text!a:.80} is no text that a path can hold") from None
    except RuntimeError as error:
        raise UsageError(f"output folder '{text}': {error}") from None
    if b"\0" in encoded:
        raise UsageError(f"output folder {text!a:.80} holds a NUL character")
    if out.name in ("", ".."):
        raise UsageError(f"output folder '{out}' has no name of its own")
    long = next((p for p in out.parts if len(os.fsencode(p)) > _LONGEST), None)
    if long is not None:
        raise UsageError(
            f"output folder '{long:.40}...' has a name of {len(os.fsencode(long))} bytes: give one "
            f"of at most {_LONGEST}"
        )
    try:
        _check_place(out, in_place)
    except OSError as error:  # a path that is too long as a whole, a loop of links
        raise UsageError(f"output folder '{text:.80}': {error.strerror or error}") from error
    return out


def _check_place(out: Path, in_place: bool) -> None:
    """Refuse a link, and a place where no folder can be made."""
    if out.is_symlink() and not (in_place and out.is_dir()):
        raise UsageError(
            f"output folder '{out}' is a link to '{os.readlink(out)}': name the folder itself"
        )
    parent = next(p for p in out.absolute().parents if os.path.lexists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"output folder '{out}' cannot be made: '{parent}' is no folder to write in"
        )


@contextmanager
def one_writer(out: Path, in_place: bool = False) -> Iterator[None]:
    """Keep all other processes from writing an output folder, until the context ends.

    The system's lock on the file `OUT.lock` keeps them out, not its being there: a process that is
    killed holds nothing. Every command that writes an output folder does so in here. It is not
    reentrant.

    Args:
        out: The folder.
        in_place: As in `output_folder`.

    Raises:
        UsageError: Another process writes it, or it cannot be written.
    """
    output_folder(out, in_place)
    real = out.resolve()
    file = real.with_name(f"{real.name}.lock")
    made = [p for p in file.absolute().parents if not p.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = _hold(file, out)
    except OSError as error:
        raise UsageError(f"cannot write '{file}': {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        held.close()
        with suppress(OSError):  # parents that are empty, as they are where nothing was written
            for parent in made:
                parent.rmdir()


def _hold(file: Path, out: Path) -> BinaryIO:
    """Return the file, open and locked; it is the one that stands under its name."""
    while True:
        held = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666), "r+b")
        if not _lock(held):
            with held:
                holder = held.read(200).decode(errors="replace") or "another process"
            raise UsageError(
                f"output folder '{out}' is being written by {holder}: wait for it, or choose "
                "another"
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held.fileno()), file.stat()):
                break
        held.close()  # its last holder has removed it meanwhile
    held.truncate()
    held.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    held.flush()
    return held


if sys.platform == "win32":
    import msvcrt

    _NO_LINK = 0

    def _lock(file: BinaryIO) -> bool:
        try:
            file.seek(1 << 20)  # a byte that nobody reads
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            file.seek(0)
        return True
else:
    import fcntl

    _NO_LINK = os.O_NOFOLLOW

    def _lock(file: BinaryIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # a file system that has no locks
            log.warning("'%s' keeps no other process out: %s", file.name, error.strerror)
        return True
