"""The memory accounting of retrieval-aware distillation as tables: published beside recomputed.

Try it: `rad efficiency --paper retrieval_aware`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rad.evaluation.memory_accounting import (
    AS_PRINTED,
    BASELINES,
    CONTEXTS,
    EVALUATED,
    HEADS,
    KIB,
    LAYERS,
    MB,
    TABLE_2,
    Measured,
    Point,
    layer_wise,
    retrieval_aware,
    saving,
)
from rad.reporting.writers import Column, Entry, Panel, Table

_TIMES = ("25 %", "50 %", "teacher")


def _times(value: float) -> str:
    return f"×{value:.2f}" if value < 0.995 else f"×{value:.1f}"


def published() -> Table:
    """Table 2 of the paper, every printed cell beside the recomputed one."""
    columns = [Column("model", numeric=False), Column("unit that gives the print", numeric=False)]
    for tokens in CONTEXTS:
        names = ("printed MB", "10⁶ bytes", "printed ratio", "ratio")
        columns += [Column(name, group=f"L = {tokens:,}") for name in names]
    rows, records = [], []
    for row in TABLE_2:
        entries = [Entry(row.point.name), Entry(row.unit)]
        for index, tokens in enumerate(CONTEXTS):
            size = row.point.bytes(tokens)
            ratio = saving(AS_PRINTED, row.point, tokens)
            printed = None if row.ratios is None else row.ratios[index]
            entries += [
                Entry(f"{row.megabytes[index]:.1f}"),
                Entry(f"{size / MB:.2f}"),
                Entry("–" if printed is None else f"×{printed:.1f}"),
                Entry("–" if printed is None else f"×{ratio:.1f}"),
            ]
            records.append(
                {
                    **{"model": row.point.name, "unit": row.unit, "tokens": tokens},
                    **{"printed_mb": row.megabytes[index], "bytes": size},
                    **{"printed_ratio": printed, "ratio": ratio},
                }
            )
        rows.append(tuple(entries))
    return Table(
        "memory_published",
        "Retrieval-aware distillation: Table 2 recomputed",
        "Formula of appendix A.4; ratios are to the first row, whose pair (10 heads, d_state 8) no "
        "table of the paper evaluates. One row is printed in KiB / 1000, the others in 10⁶ bytes.",
        (Panel("", tuple(columns), tuple(rows)),),
        ("model", "unit", "tokens", "printed_mb", "bytes", "printed_ratio", "ratio"),
        records,
    )


def _point_panel(
    title: str, points: Sequence[Point], baselines: Sequence[Point], records: list[dict[str, Any]]
) -> Panel:
    columns = [Column("model", numeric=False)]
    columns += [Column(name) for name in ("SSM heads", "COV_R", "state KiB", "KV KiB/token")]
    for tokens in CONTEXTS:
        names = ("MB", *(f"vs {name}" for name in _TIMES[: len(baselines)]))
        columns += [Column(name, group=f"L = {tokens:,}") for name in names]
    rows = []
    for point in points:
        entries = [
            Entry(point.name),
            Entry(str(point.ssm_heads)),
            Entry("not evaluated" if point.coverage is None else f"{point.coverage:.1f}"),
            Entry(f"{point.state_bytes / KIB:,.0f}"),
            Entry(f"{point.kv_bytes_per_token / KIB:g}"),
        ]
        for tokens in CONTEXTS:
            entries.append(Entry(f"{point.bytes(tokens) / MB:.2f}"))
            ratios = [saving(point, baseline, tokens) for baseline in baselines]
            entries += [Entry(_times(ratio)) for ratio in ratios]
            against = dict(zip(("vs_25", "vs_50", "vs_teacher"), ratios, strict=False))
            records.append(
                {
                    **{"panel": title, "model": point.name, "ssm_heads": point.ssm_heads},
                    **{"coverage": point.coverage, "tokens": tokens},
                    **{"bytes": point.bytes(tokens), **against},
                }
            )
        rows.append(tuple(entries))
    return Panel(title, tuple(columns), tuple(rows))


def points() -> Table:
    """The saving at every evaluated (k, d_state), and what the printed one rests on."""
    records: list[dict[str, Any]] = []
    counts = [
        replace(retrieval_aware(10, 8, ssm_heads=heads), name=f"k=10, d_state 8, {heads} SSM heads")
        for heads in (492, 502, 512)
    ]
    equal = (layer_wise(4, 8), layer_wise(8, 8))
    panels = (
        _point_panel("as printed", [AS_PRINTED], BASELINES, records),
        _point_panel("evaluated points", EVALUATED, BASELINES, records),
        _point_panel("SSM heads counted otherwise", counts, BASELINES, records),
        _point_panel("baselines with d_state 8 too", [AS_PRINTED, *equal], equal, records),
    )
    return Table(
        "memory_points",
        "Retrieval-aware distillation: the saving depends on the point",
        "M(L) of appendix A.4 and how many times that much the 25 % and 50 % layer-wise hybrids "
        "(d_state 64 unless said otherwise) and the teacher need. COV_R as published. 492 SSM "
        "heads are those of k = 20; for k = 10 they are 502, or 512 in the published architecture.",
        panels,
        (
            *("panel", "model", "ssm_heads", "coverage", "tokens", "bytes"),
            *("vs_25", "vs_50", "vs_teacher"),
        ),
        records,
    )


def measurements(found: Sequence[Measured]) -> Table:
    """Formula, formula with the convolution, and the tensors of a real cache."""
    names = ("model", "form")
    columns = [Column(name, numeric=False) for name in names]
    columns += [Column(name) for name in ("M(L) KiB", "with conv KiB")]
    columns += [Column(name, group="this package") for name in ("formula KiB", "tensors KiB")]
    rows, records = [], []
    for each in found:
        heads = LAYERS * HEADS if each.form == "parallel" else each.point.ssm_heads
        point = replace(each.point, ssm_heads=heads)
        paper, conv = point.bytes(each.tokens), point.bytes(each.tokens, conv=True)
        kib = [f"{size / KIB:,.1f}" for size in (paper, conv, each.formula, each.tensors)]
        rows.append((Entry(each.point.name), Entry(each.form), *map(Entry, kib)))
        records.append(
            {
                **{"model": each.point.name, "form": each.form, "tokens": each.tokens},
                **{"paper_bytes": paper, "with_conv_bytes": conv},
                **{"formula_bytes": each.formula, "tensor_bytes": each.tensors},
            }
        )
    return Table(
        "memory_measured",
        "Retrieval-aware distillation: measured cache tensors",
        f"One sequence of {found[0].tokens:,} tokens, Llama-3.2-1B shape in bfloat16. This package "
        "keeps recurrent states in float32 and W − 1 = 3 inputs of the convolution; the paper's "
        "formula counts bfloat16 states and no convolution (its code keeps W = 4 columns). Form "
        "`slots`: an SSM for every head that is not kept; `parallel`, as in that code: for all.",
        (Panel("", tuple(columns), tuple(rows)),),
        (
            *("model", "form", "tokens", "paper_bytes", "with_conv_bytes"),
            *("formula_bytes", "tensor_bytes"),
        ),
        records,
    )
