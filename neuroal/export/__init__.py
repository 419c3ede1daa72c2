"""Finished runs in other forms: those of runtimes, or adapters beside them.

linears   `FinishedRun`: a run in front of an exporter, its linears read one by one
exporting `export`: an exporter's files, in the output folder when all of them are there
"""

from neuroal.export.exporting import export

__all__ = ["export"]
