"""Tables of selection: what was kept, what choosing cost and was worth, where selectors agree."""

from __future__ import annotations

import math
from itertools import combinations

from rad.placement import Placement
from rad.reporting.collect import Results
from rad.reporting.describe import (
    CELL_FIELDS,
    ESTIMATE_FIELDS,
    budget_text,
    cell_record,
    estimate_fields,
    kept_text,
    seeds_note,
)
from rad.reporting.plan import CostGroup, cost_groups, shared_budgets
from rad.reporting.scores import documents_of, families, final_kl, mean_score, members
from rad.reporting.writers import (
    NO_DATA,
    Column,
    Entry,
    Panel,
    Table,
    count,
    duration,
    operations,
    plain,
    score_entry,
    size,
)
from rad.selection.agreement import jaccard, layer_scores, spearman


def placements(results: Results, view: str | None = None) -> dict[tuple[str, str, str], Placement]:
    """(base, selector, budget) -> placement, of all views or one, in grid order."""
    chosen: dict[tuple[str, str, str], Placement] = {}
    for result in results.runs.values():
        assert result.run is not None and result.placement is not None
        if view is None or view in result.run.views:
            key = (result.run.base, result.run.selector, result.run.budget.slug)
            chosen.setdefault(key, result.placement)
    return chosen


def flops_of(placement: Placement) -> float | None:
    """FLOPs of the selection; None when a model ran and nobody counted them."""
    cost = placement.cost
    ran = cost.tokens or cost.forward_passes
    return None if ran and not cost.flops else cost.flops


def trained_tokens_of(placement: Placement) -> int | None:
    """Tokens that the selection trained on; None where they were not counted."""
    # one version added both counts: a placement without FLOPs has no word on training either
    return None if flops_of(placement) is None else placement.cost.trained_tokens


def selection(results: Results) -> Table:
    """What each selector kept at each budget, and what choosing it cost."""
    names = ("base", "selector", "budget", "kept")
    columns = [Column(name, numeric=False) for name in names]
    columns += [Column(name) for name in ("heads", "KV heads cached", "KV bytes/token")]
    columns += [Column(name) for name in ("tokens", "trained tokens", "FLOPs", "time", "passes")]
    rows, records = [], []
    for (base, selector, budget), placement in placements(results).items():
        cost, footprint = placement.cost, placement.footprint
        kv = footprint.kv_bytes_per_token if footprint is not None else None
        flops, trained = flops_of(placement), trained_tokens_of(placement)
        heads = f"{len(placement.softmax)} of {placement.layers * placement.heads}"
        texts = (
            *(base, selector, budget_text(budget), kept_text(placement), heads),
            *(str(placement.cached_kv_heads()), size(kv), count(cost.tokens), count(trained)),
            *(operations(flops), duration(cost.seconds), count(cost.forward_passes)),
        )
        rows.append(tuple(map(Entry, texts)))
        records.append(
            {
                **{"base": base, "selector": selector, "budget": budget},
                "kept": kept_text(placement),
                "heads": len(placement.softmax),
                "fraction": placement.fraction(),
                "cached_kv_heads": placement.cached_kv_heads(),
                "kv_bytes_per_token": kv,
                "tokens": cost.tokens,
                "trained_tokens": trained,
                "flops": flops,
                "seconds": cost.seconds,
                "forward_passes": cost.forward_passes,
            }
        )
    return Table(
        "selection",
        "Selection: what was kept and what it cost",
        "Layers (L) and query heads that stay softmax attention. Cost: tokens through any model "
        "and those trained on, FLOPs (2 per weight and token, 6 when trained on), wall time, "
        "forward passes; a shared alignment is not included.",
        (Panel("", tuple(columns), tuple(rows)),),
        (
            *("base", "selector", "budget", "kept", "heads", "fraction", "cached_kv_heads"),
            *("kv_bytes_per_token", "tokens", "trained_tokens", "flops", "seconds"),
            "forward_passes",
        ),
        records,
    )


def cost_group_title(group: CostGroup) -> str:
    """What a group holds fixed, in words."""
    cell = group.cells[0]
    return (
        f"base: {cell.base} · mixer: {cell.mixer} · initialisation: {cell.initialisation} · "
        f"recipe: {cell.recipe} · teacher: {group.teacher}"
    )


def selection_cost(results: Results) -> Table:
    """Quality of the students against what choosing their attention cost."""
    names = ("selector", "kept")
    columns = [Column(name, numeric=False) for name in names]
    prices = ("FLOPs", "time", "tokens", "trained tokens")
    columns += [Column(name, group="cost of the selection") for name in prices]
    quality = "quality after distillation"
    columns.append(Column("held-out KL, nats/token ↓", group=quality))
    documents = sum(documents_of(results, each) for each in families(results) if each.is_share)
    columns.append(Column("mean score % ↑", group=quality, detail=f"n = {documents:,}"))
    panels, records = [], []
    for group in cost_groups(results.study):
        rows = []
        for cell in group.cells:
            students = members(results, cell)
            placement = students[0].placement
            assert placement is not None
            cost, kl = placement.cost, final_kl(students)
            value = mean_score(results, students)
            flops, trained = flops_of(placement), trained_tokens_of(placement)
            texts = (
                *(cell.selector, budget_text(cell.budget), operations(flops)),
                *(duration(cost.seconds), count(cost.tokens), count(trained), plain(kl, 4)),
            )
            score = NO_DATA if value is None else score_entry(value, share=True)
            rows.append((*map(Entry, texts), score))
            records.append(
                {
                    **cell_record(cell),
                    **{"flops": flops, "seconds": cost.seconds, "tokens": cost.tokens},
                    **{"trained_tokens": trained, "forward_passes": cost.forward_passes},
                    "held_out_kl": kl,
                    **estimate_fields(value, "no task was scored"),
                }
            )
        panels.append(Panel(cost_group_title(group), tuple(columns), tuple(rows)))
    return Table(
        "selection_cost",
        "Quality against the cost of the selection",
        "Held-out KL from the base at the end of distillation (mean over seeds), and the mean of "
        "the families' scores with its 95 % interval (perplexity is left out), beside what "
        "choosing cost. A shared alignment is not included. "
        f"{seeds_note(record['seeds'] for record in records if record['seeds'])}",
        tuple(panels),
        (
            *("view", *CELL_FIELDS, "flops", "seconds", "tokens", "trained_tokens"),
            *("forward_passes", "held_out_kl", *ESTIMATE_FIELDS),
        ),
        records,
    )


# --- agreement ------------------------------------------------------------------------------


def rank_correlation(first: Placement, second: Placement) -> float | None:
    """Spearman's coefficient of the layer scores of two placements; None where it means nothing.

    Both must have finite scores of the same kind, layers or heads: a layer of scored heads counts
    as its best head. One side that is constant has no ranks.
    """
    if first.scores is None or second.scores is None or first.scores.kind != second.scores.kind:
        return None
    mine, other = layer_scores(first) or [], layer_scores(second) or []
    if not len(mine) == len(other) == first.layers or not all(map(math.isfinite, [*mine, *other])):
        return None
    return spearman(mine, other)


Pairs = dict[tuple[str, str], float | None]


def pairwise(results: Results) -> dict[tuple[str, str], tuple[list[str], Pairs, Pairs]]:
    """(base, budget) -> selectors, Jaccard overlap and rank correlation of each pair, both orders.

    Raises `ValueError` when placements of one base have different shapes.
    """
    chosen = placements(results)
    found: dict[tuple[str, str], tuple[list[str], Pairs, Pairs]] = {}
    for (base, budget), names in shared_budgets(results.study).items():
        overlap: Pairs = {}
        correlation: Pairs = {}
        for first, second in combinations(names, 2):
            a, b = chosen[base, first, budget], chosen[base, second, budget]
            if (a.layers, a.heads) != (b.layers, b.heads):
                raise ValueError(
                    f"selectors {first} and {second} at budget {budget}: {a.layers} x {a.heads} "
                    f"and {b.layers} x {b.heads} layers x heads cannot both be of base {base}; "
                    "select again"
                )
            overlap[first, second] = overlap[second, first] = jaccard(a, b)
            correlation[first, second] = correlation[second, first] = rank_correlation(a, b)
        found[base, budget] = (names, overlap, correlation)
    return found


def correlated(names: list[str], correlation: Pairs) -> list[str]:
    """The selectors of a matrix that have at least one number."""
    return [
        name
        for name in names
        if any(correlation[name, other] is not None for other in names if other != name)
    ]


def _matrix(title: str, names: list[str], values: Pairs) -> Panel:
    columns = (Column("selector", numeric=False), *map(Column, names))

    def entry(first: str, second: str) -> Entry:
        return Entry("" if first == second else plain(values[first, second]))

    rows = tuple((Entry(first), *(entry(first, second) for second in names)) for first in names)
    return Panel(title, columns, rows)


def agreement(results: Results) -> Table:
    """Which selectors keep the same heads, and which rank the layers alike."""
    panels, records = [], []
    chosen = placements(results)
    for (base, budget), (names, overlap, correlation) in pairwise(results).items():
        where = f"base: {base} · kept: {budget_text(budget)}"
        panels.append(_matrix(f"{where} · overlap of kept heads (Jaccard)", names, overlap))
        ranked = correlated(names, correlation)
        if ranked:
            title = f"{where} · rank correlation of layer scores (Spearman)"
            panels.append(_matrix(title, ranked, correlation))
        for first, second in combinations(names, 2):
            a, b = (set(chosen[base, name, budget].softmax) for name in (first, second))
            records.append(
                {
                    **{"base": base, "budget": budget, "first": first, "second": second},
                    **{"shared": len(a & b), "union": len(a | b)},
                    "jaccard": overlap[first, second],
                    "spearman": correlation[first, second],
                }
            )
    return Table(
        "agreement",
        "Where the selectors agree",
        "Jaccard: (layer, head) pairs that both keep, over those that either keeps; 1 is the same "
        "placement. Spearman: rank correlation of layer scores, turned so that larger is kept, "
        "where both selectors score layers or both score heads (a layer counts as its best head).",
        tuple(panels),
        ("base", "budget", "first", "second", "shared", "union", "jaccard", "spearman"),
        records,
    )
