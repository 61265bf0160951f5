"""A displayed table and its CSV, Markdown and LaTeX forms; number formats shared with figures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rad.files import write_text
from rad.reporting.statistics import LEVEL, Estimate

MINUS = "\u2212"


@dataclass(frozen=True)
class Entry:
    """One displayed entry: a value, its interval, and a difference in a line of its own."""

    text: str
    interval: str = ""
    difference: str = ""
    difference_interval: str = ""
    verdict: str = ""  # `better` or `worse` when the difference is beyond chance
    best: bool = False
    spread: str = ""  # between seeds
    p: str = ""  # of the difference, adjusted


MISSING = Entry("–")
NO_DATA = Entry("missing data")


@dataclass(frozen=True)
class Column:
    """A column; neighbours with the same `group` share a heading above theirs.

    `detail` is what holds for every entry, such as the number of documents.
    """

    title: str
    group: str = ""
    numeric: bool = True
    detail: str = ""

    @property
    def text(self) -> str:
        """Title and detail in one line."""
        return f"{self.title}, {self.detail}" if self.detail else self.title


@dataclass(frozen=True)
class Panel:
    """Rows that may be compared with each other."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Group headings with the number of columns that each spans."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans

    @property
    def has_groups(self) -> bool:
        """Whether any column has a group heading."""
        return any(column.group for column in self.columns)


@dataclass(frozen=True)
class Table:
    """A table in both forms: panels to be read, records to be computed with."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    fields: tuple[str, ...]
    records: Sequence[Mapping[str, Any]] = field(default_factory=list)


# --- numbers --------------------------------------------------------------------------------


def signed(text: str) -> str:
    """`text` of a number with an explicit sign, minus as a real minus; zero has none."""
    if not text.strip("-+0."):
        return text.lstrip("-+")
    return MINUS + text[1:] if text.startswith("-") else f"+{text}"


def plain(value: float | None, digits: int = 2) -> str:
    """Fixed decimals, an en dash when there is no value."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}".replace("-", MINUS)


def significant(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without exponent, for values of any size."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def count(value: float | None) -> str:
    """A count with k, M or B."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def operations(value: float | None) -> str:
    """FLOPs with the prefixes of SI."""
    if value is None:
        return "–"
    for scale, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def duration(value: float | None) -> str:
    """Seconds as `8.1 s`, `3 min 05 s` or `2 h 07 min`."""
    if value is None:
        return "–"
    if value < 99.95:
        return f"{value:.1f} s"
    total = round(value)
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def score_text(value: float, share: bool) -> str:
    """A score: percent with one decimal, or three significant digits."""
    return f"{100 * value:.1f}" if share else significant(value)


def p_text(value: float) -> str:
    """A p-value with its sign of equality."""
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if value < 0.0995 else f"p = {min(value, 1.0):.2f}"


def score_entry(
    value: Estimate | None,
    share: bool,
    difference: Estimate | None = None,
    higher_is_better: bool = True,
    best: bool = False,
    adjusted: float | None = None,
) -> Entry:
    """Entry of an estimate and, when there is one, its paired difference and adjusted p-value.

    The difference is called better or worse by the p-value where there is one, else by its
    interval.
    """
    if value is None:
        return NO_DATA

    def change(number: float) -> str:
        return signed(f"{100 * number:.1f}" if share else f"{number:.3f}")

    def bounds(low: str, high: str) -> str:
        return f"[{low}, {high}]"

    text, ends, verdict = "", "", ""
    if difference is not None:
        text = change(difference.value)
        ends = bounds(change(difference.low), change(difference.high))
        beyond = difference.excludes_zero if adjusted is None else adjusted < 1 - LEVEL
        if beyond and difference.value != 0:
            verdict = "better" if (difference.value > 0) == higher_is_better else "worse"
    spread = ""
    if value.seed_sd is not None:
        spread = f"sd {score_text(value.seed_sd, share)}, {value.seeds} seeds"
    return Entry(
        text=score_text(value.value, share),
        interval=bounds(score_text(value.low, share), score_text(value.high, share)),
        difference=text,
        difference_interval=ends,
        verdict=verdict,
        best=best,
        spread=spread,
        p="" if adjusted is None else p_text(adjusted),
    )


# --- formats --------------------------------------------------------------------------------


def csv_text(fields: Sequence[str], records: Iterable[Mapping[str, Any]]) -> str:
    """CSV with a header; numbers keep their digits, None is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(fields), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(
            {
                key: f"{value:.8g}" if isinstance(value, float) else value
                for key, value in record.items()
            }
        )
    return stream.getvalue()


def _markdown_escape(text: str) -> str:
    for character in "\\|*_`<":
        text = text.replace(character, f"\\{character}")
    return text


def markdown_text(table: Table) -> str:
    """GitHub-flavoured Markdown; group headings are put in front of the column titles."""
    parts = [f"## {_markdown_escape(table.title)}", _markdown_escape(table.caption)]
    for panel in table.panels:
        if panel.title:
            parts.append(f"### {_markdown_escape(panel.title)}")
        titles = [
            _markdown_escape(f"{column.group}: {column.text}" if column.group else column.text)
            for column in panel.columns
        ]
        lines = ["| " + " | ".join(titles) + " |"]
        rules = ["---:" if column.numeric else ":---" for column in panel.columns]
        lines.append("| " + " | ".join(rules) + " |")
        for row in panel.rows:
            lines.append("| " + " | ".join(_markdown_entry(entry) for entry in row) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _markdown_entry(entry: Entry) -> str:
    text = _markdown_escape(entry.text)
    text = f"**{text}**" if entry.best else text
    if entry.interval:
        text += f" {entry.interval}"
    if entry.spread:
        text += f"<br>{entry.spread}"
    if entry.difference:
        text += f"<br>Δ {entry.difference} {entry.difference_interval}"
    if entry.p:
        text += f", {_markdown_escape(entry.p)}"
    return text


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "Δ": r"$\Delta$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "∞": r"$\infty$",
    "<": r"$<$",
    ">": r"$>$",
    "·": r"$\cdot$",
    MINUS: r"$-$",
    "–": "--",
}


def latex_escape(text: str) -> str:
    """Text as LaTeX, special characters escaped one by one."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex_text(table: Table) -> str:
    """One `tabular` per panel; needs booktabs, and nothing else."""
    parts = [f"% {table.title}. {table.caption}\n% needs \\usepackage{{booktabs}}"]
    for panel in table.panels:
        lines = [f"% {panel.title}"] if panel.title else []
        alignment = "".join("r" if column.numeric else "l" for column in panel.columns)
        lines += [f"\\begin{{tabular}}{{{alignment}}}", "\\toprule"]
        if panel.has_groups:
            heads, rules, start = [], [], 1
            for title, span in panel.groups:
                heads.append(f"\\multicolumn{{{span}}}{{c}}{{{latex_escape(title)}}}")
                if title:
                    rules.append(f"\\cmidrule(lr){{{start}-{start + span - 1}}}")
                start += span
            lines += [" & ".join(heads) + " \\\\", " ".join(rules)]
        lines += [" & ".join(latex_escape(column.text) for column in panel.columns) + " \\\\"]
        lines.append("\\midrule")
        for row in panel.rows:
            lines.append(" & ".join(_latex_entry(entry) for entry in row) + " \\\\")
        lines += ["\\bottomrule", "\\end{tabular}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _latex_entry(entry: Entry) -> str:
    text = latex_escape(entry.text)
    text = f"\\textbf{{{text}}}" if entry.best else text
    if entry.interval:
        # braces keep a leading [ from being read as the optional argument of \\
        text += f" {{\\scriptsize {{{latex_escape(entry.interval)}}}}}"
    lines = [text]
    if entry.spread:
        lines.append(f"{{\\scriptsize {latex_escape(entry.spread)}}}")
    if entry.difference:
        gap = f"{entry.difference} {entry.difference_interval}"
        gap = latex_escape(f"{gap}, {entry.p}" if entry.p else gap)
        lines.append(f"{{\\scriptsize $\\Delta$ {gap}}}")
    if len(lines) > 1:
        stacked = " \\\\ ".join(lines)
        text = f"\\shortstack[r]{{{stacked}}}"
    return text


def write_table(table: Table, folder: Path) -> None:
    """Write `<name>.csv`, `.md` and `.tex` into `folder`, each atomically."""
    write_text(folder / f"{table.name}.csv", csv_text(table.fields, table.records))
    write_text(folder / f"{table.name}.md", markdown_text(table))
    write_text(folder / f"{table.name}.tex", latex_text(table))
