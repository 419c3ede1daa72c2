"""Plugins: found by name, checked, bound to their options, registered for one run, called alone.

Names come from the metadata of installed distributions: listing imports nothing, and what a run
does not choose has no effect on it. Every run has a pluggy registration of its own.
"""

from neuroal.plugins.calls import Plugin
from neuroal.plugins.listing import Listing, available, file_sha256, find, in_file, listing_of
from neuroal.plugins.loading import (
    Description,
    describe,
    listings,
    load,
    load_top_up,
    refuse_unused,
)
from neuroal.plugins.trust import check_requirements, refuse_code_of

__all__ = [
    "Description",
    "Listing",
    "Plugin",
    "available",
    "check_requirements",
    "describe",
    "file_sha256",
    "find",
    "in_file",
    "listing_of",
    "listings",
    "load",
    "load_top_up",
    "refuse_code_of",
    "refuse_unused",
]
