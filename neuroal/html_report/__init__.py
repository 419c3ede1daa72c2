"""One self-contained HTML file that shows runs and studies; needs the extra `neuroal[report]`.

- `writing`: `write`, from folders to the file
- `reading`: a finished run, read from its folder
- `runs`, `studies`: what the report says of a run, of a study
- `section`: the parts of what it says
- `allocation_figures`, `search_figures`, `walk_figures`: the figures of a run
- `study_figures`: the figures of a study
- `figure`: what a figure is made of
- `drawing`: from a Vega-Lite view to SVG
- `page`: sections laid out as one page, by the template of `templates/`
"""

from neuroal.html_report.writing import LARGEST, write

__all__ = ["LARGEST", "write"]
