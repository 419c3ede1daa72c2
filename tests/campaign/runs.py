"""Runs that are killed, that meet a full disk, and two that write to one folder."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
from collections.abc import Callable
from itertools import cycle

from tests.campaign.attempts import Row, at_steps, attempt, end, start, until
from tests.campaign.world import Setting, World, finish, fresh, identity, settings

Table = dict[str, Row]


def references(world: World) -> list[tuple[Setting, dict[str, str], list[str]]]:
    """Every setting, the identity of its result, and the steps of its run."""
    found = []
    for setting in settings(world):
        out, log = fresh(world.root / "reference") / "out", world.root / "steps.txt"
        log.write_text("")

        def note(_: int, step: str, log: object = log) -> None:
            with open(str(log), "a") as file:
                file.write(f"{step}\n")

        ended = attempt(setting.words(out), at_steps(note))
        assert ended.status == 0, ended.said
        found.append((setting, identity(out), log.read_text().splitlines()))
    return found


def spread(n: int, rng: random.Random) -> list[int]:
    """The numbers below n in an order whose every beginning is spread over all of them."""
    numbers = list(range(n))
    rng.shuffle(numbers)
    return numbers


def kills(world: World, seconds: float, seed: int, table: Table) -> None:
    """Kill a run before a step, each of them in turn while there is time, and go on."""
    rng, clock = random.Random(seed), until(seconds)
    left = [(s, ref, steps, spread(len(steps), rng)) for s, ref, steps in references(world)]
    turns = cycle(left)
    for _ in clock:
        if not any(order for *_, order in left):
            return
        setting, reference, steps, order = next(x for x in turns if x[3])
        step = order.pop()
        row = table.setdefault(f"killed, {setting.name} ({len(steps)} steps)", Row())

        def die(n: int, _: str, step: int = step) -> None:
            if n == step:
                os.kill(os.getpid(), signal.SIGKILL)

        out = fresh(world.root / "killed") / "out"
        killed = attempt(setting.words(out), at_steps(die))
        wrong = "" if killed.status == -signal.SIGKILL else f"was not killed: {killed.last}"
        if not wrong:
            wrong = finish(setting, out, reference)[1]
        row.add("identical", wrong and f"{setting.name}, before {steps[step]}: {wrong}")


def no_room(step: int) -> Callable[[], None]:
    """Return what lets a disk be full from a step on that needs room."""

    def full(n: int, what: str) -> None:
        if n >= step and what.startswith(("open", "os.mkdir")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what.split()[-1])

    return at_steps(full)


def too_large(size: int) -> Callable[[], None]:
    """Return what lets no file be larger than a size in bytes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def disks(world: World, seconds: float, seed: int, table: Table) -> None:
    """Let the disk be full from a step on, or files be limited; then go on with room."""
    rng, clock = random.Random(seed), until(seconds)
    plans = []
    for setting, reference, steps in references(world):
        writes = [n for n, s in enumerate(steps) if s.startswith(("open", "os.mkdir"))]
        plans += [(setting, reference, f"full from {steps[n]}", no_room(n)) for n in writes]
        sizes = {int(1.1**k) for k in range(88, 139)}  # what is said has to fit
        plans += [(setting, reference, f"files of {n} bytes", too_large(n)) for n in sizes]
    rng.shuffle(plans)
    for n in clock:
        if n == len(plans):
            return
        setting, reference, what, fault = plans[n]
        kind = "full" if "full" in what else "file limit"
        row = table.setdefault(f"disk, {kind}, {setting.name}", Row())
        out = fresh(world.root / "full") / "out"
        ended = attempt(setting.words(out), fault)
        wrong, outcome = ended.wrong, "named, then identical"
        if not wrong and ended.status == 0:
            outcome = "identical"
            wrong = "" if identity(out) == reference else "another result with exit status 0"
        elif not wrong:
            wrong = "half a result" if setting.resume and out.exists() else ""
            named = ("space", "large", str(out.parent), "room", "full")
            if not wrong and not any(word in ended.said for word in named):
                wrong = f"does not say what is missing: {ended.last}"
            if not wrong:
                resume = out.with_name("out.partial").exists() or not setting.resume
                again = setting if resume else Setting(setting.name, setting.words, ())
                wrong = finish(again, out, reference)[1]
        row.add(outcome, wrong and f"{setting.name}, {what}: {wrong} | {ended.last}")


def writers(world: World, seconds: float, seed: int, table: Table) -> None:
    """Start two different runs with one output folder, one a moment after the other."""
    rng = random.Random(seed)
    results = []
    for other in (0, 1):
        out = fresh(world.root / "writer") / "out"
        assert attempt(world.prune(out, seed=other)).status == 0
        results.append(identity(out))
    row = table.setdefault("two writers", Row())
    for _ in until(seconds):
        out = fresh(world.root / "writers") / "out"
        flags = rng.choice([(), ("--overwrite",), ("--resume",)])
        moment = rng.randrange(4)  # how many steps the first one is ahead

        ahead, told = os.pipe()

        def tell(n: int, _: str, told: int = told, moment: int = moment) -> None:
            if n == moment:
                os.write(told, b".")

        first = start(world.prune(out, *flags, seed=0), at_steps(tell))
        os.close(told)
        os.read(ahead, 1)  # or it has ended
        second = start(world.prune(out, *flags, seed=1))
        ended = [end(first), end(second)]
        os.close(ahead)
        done = [k for k, x in enumerate(ended) if x.status == 0]
        wrong = next((x.wrong for x in ended if x.wrong), "")
        if not wrong and "--overwrite" in flags and len(done) == 2:
            wrong = "" if identity(out) in results else "a mixture"  # one after the other
        elif not wrong and len(done) != 1:
            wrong = f"{len(done)} of 2 finish: {[x.last for x in ended]}"
        elif not wrong and identity(out) != results[done[0]]:
            wrong = "another result with exit status 0"
        both = len(done) == 2
        row.add("one after the other" if both else "refused", wrong and f"{flags}: {wrong}")
