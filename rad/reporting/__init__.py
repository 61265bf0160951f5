"""Reporting: tidy results, intervals, tables, figures and one self-contained `report.html`.

`outputs(study)` says which files a report consists of and imports neither torch nor matplotlib;
`build_report(study, root)` reads `results/<study>/` and writes them, in seconds, without torch.
"""

from __future__ import annotations

from pathlib import Path

from rad.reporting.plan import outputs
from rad.study import Study

__all__ = ["build_report", "outputs"]


def build_report(study: Study, root: Path, output: Path | None = None) -> None:
    """Write tables, figures and `report.html` of the results under `root` to `output` or `root`.

    Raises `ValueError` naming the file when a result is missing or malformed.
    """
    # matplotlib takes half a second to import: not while Snakemake parses its files
    from rad.reporting.report import build

    build(study, Path(root), Path(output) if output is not None else Path(root))
