"""`python -m tests.campaign --seconds 900`: prints the table, and fails where something failed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

from tests.campaign.attempts import Row
from tests.campaign.inputs import hostile, inputs
from tests.campaign.runs import disks, kills, writers
from tests.campaign.world import World, make

Table = dict[str, Row]
# Each part with its share of the time.
PARTS: dict[str, tuple[float, Callable[[World, float, int, Table], None]]] = {
    "hostile": (0.0, hostile),
    "kills": (0.35, kills),
    "disks": (0.2, disks),
    "writers": (0.15, writers),
    "inputs": (0.3, inputs),
}


def campaign(seconds: float, seed: int, parts: list[str]) -> Table:
    """Return the table of a campaign that ends within about so many seconds."""
    table: Table = {}
    with tempfile.TemporaryDirectory(prefix="campaign-") as root:
        stop = time.monotonic() + seconds
        world = make(Path(root))
        for k, name in enumerate(parts):
            share, part = PARTS[name]
            whole = sum(PARTS[later][0] for later in parts[k:]) or 1.0
            part(world, max(stop - time.monotonic(), 1.0) * share / whole, seed, table)
    return table


def shown(table: Table) -> str:
    """Return the table, and what failed."""
    rows = [
        (name, row.tried, ", ".join(f"{n} {what}" for what, n in row.outcomes.most_common()))
        for name, row in table.items()
    ]
    rows.append(("in all", sum(row.tried for row in table.values()), ""))
    failures = [failure for row in table.values() for failure in row.failures]
    text = tabulate(rows, headers=("what", "tried", "ended"), tablefmt="github")
    return "\n".join([text, "", *(f"FAILED {failure}" for failure in failures)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=list(PARTS))
    given = parser.parse_args()
    table = campaign(given.seconds, given.seed, given.only or list(PARTS))
    print(shown(table))
    sys.exit(any(row.failures for row in table.values()))


if __name__ == "__main__":
    main()
