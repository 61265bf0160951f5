"""One look for every figure: colours and markers per selector, fonts, and reproducible saving.

Colours are those of Okabe and Ito (2008), told apart with every common colour vision deficiency;
markers and dashes differ as well, so that figures survive grey printing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rad.files import replacing
from rad.study import Study

INK = "#2b2f36"
MUTED = "#767c87"
GRID = "#e3e6ea"

# Any: the stubs of matplotlib list every key as a literal type
RC: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: same text width everywhere
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.0,
    "figure.facecolor": "white",
    "svg.hashsalt": "rad",  # ids derive from it; random ones would change at every build
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Mark:
    """How a selector is drawn."""

    color: str
    marker: str
    dashes: tuple[float, ...]  # on, off, ... in points; empty is a full line

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments of a line."""
        style: Any = (0, self.dashes) if self.dashes else "-"
        return {"color": self.color, "linestyle": style}


_KNOWN = {
    "uniform": Mark("#5c6470", "s", (4, 1.6)),
    "rad": Mark("#d55e00", "^", ()),
    "kl_guided": Mark("#0072b2", "o", ()),
    "retrieval_aware": Mark("#009e73", "D", ()),
}
_SPARE = (
    Mark("#cc79a7", "v", ()),
    Mark("#e69f00", "P", ()),
    Mark("#56b4e9", "X", ()),
    Mark("#7f4f24", "<", ()),
    Mark("#000000", ">", (1.2, 1.2)),
)
_MORE_MARKERS = ("h", "*", "p", "d", "s")


def marks(study: Study) -> dict[str, Mark]:
    """Selector name -> how it is drawn, the same in every figure of the study."""
    chosen: dict[str, Mark] = {}
    spare = 0
    for name in study.selectors:
        if name in _KNOWN:
            chosen[name] = _KNOWN[name]
        else:
            turn, index = divmod(spare, len(_SPARE))
            mark = _SPARE[index]
            if turn:
                # colours repeat, so the marker and the dashes must not
                marker = _MORE_MARKERS[(index + turn - 1) % len(_MORE_MARKERS)]
                mark = Mark(mark.color, marker, (1.0 + 2.0 * turn, 1.4))
            chosen[name] = mark
            spare += 1
    return chosen


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style inside the block only: a library must not change global settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc would change the bytes
        matplotlib.rcParams.update(RC)
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of a size in inches that arranges its own margins."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.04)  # type: ignore[union-attr,call-arg]
    return figure


def panel_title(axes: Axes, text: str) -> None:
    """Title at the left of a panel."""
    axes.set_title(text, pad=6)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write `<name>.svg` and `<name>.pdf`, atomically and without dates."""
    # arranging the margins is most of the work: do it once for both formats
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for form, metadata in (("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
        with replacing(folder / f"{name}.{form}") as temporary:
            figure.savefig(temporary, format=form, metadata=metadata)
