"""The bookmarks of a run, which lie in its journal."""

from __future__ import annotations

from neuroal.model.run_folder import Journal
from neuroal.walk.bookmark import Bookmark


def bookmark(journal: Journal, key: str) -> Bookmark:
    """Return what keeps how far one walk has come; several processes keep nothing."""
    folder = journal.folder if journal.team.size == 1 else None
    return Bookmark(folder, f"at-{key}", journal.begin)
