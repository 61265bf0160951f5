"""The ledger and the comparison as tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rad.files import write_json
from rad.papers.claims import Claim
from rad.papers.compare import MEASURED, NO_ESTIMATE, Comparison
from rad.papers.contrast import Effect
from rad.papers.ledger import ALPHA, SUPPORTED, VERDICTS, Entry, Finding
from rad.papers.published import published
from rad.reporting.writers import (
    MISSING,
    Column,
    Panel,
    Table,
    p_text,
    plain,
    signed,
    significant,
    write_table,
)
from rad.reporting.writers import (
    Entry as TableEntry,
)

CLAIMS, COMPARED = "claims", "paper_vs_measured"


def amount(claim: Claim, value: float, *, sign: bool = True) -> str:
    """A value in the unit of the claim's effect."""
    test = claim.test
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if test.effect == "ratio":
        return f"{100 * value:.1f} %" if test.kind == "score" else f"{significant(value)}×"
    text = f"{100 * value:.1f}" if test.kind == "score" else f"{value:.3f}"
    return signed(text) if sign else text


def unit_of(claim: Claim) -> str:
    """Unit of a difference, for headings."""
    test = claim.test
    if test.effect == "ratio":
        return "share" if test.kind == "score" else "ratio"
    return "points" if test.kind == "score" else "nats"


def interval(claim: Claim, effect: Effect) -> str:
    """The 95 % interval, empty for numbers without one."""
    if effect.low == effect.high == effect.value and not effect.identical:
        return ""
    if math.isinf(effect.error):
        return "no interval"
    return f"[{amount(claim, effect.low)}, {amount(claim, effect.high)}]"


def _sample(effect: Effect | None) -> tuple[str, str]:
    if effect is None:
        return "–", "–"
    documents = f"{effect.documents:,}" if effect.documents else "–"
    return documents, str(effect.seeds) if effect.seeds else "–"


def _row(entry: Entry, found: Finding, first: bool) -> tuple[TableEntry, ...]:
    claim, effect = entry.claim, found.effect
    documents, seeds = _sample(effect)
    single = len(entry.findings) == 1
    verdict = entry.verdict if first else ""
    if first and entry.verdict == SUPPORTED and not entry.survives:
        verdict += " (not after Holm)"
    where = found.where if single else f"{found.where}: {found.verdict}"
    note = f"{where}; {found.note}" if where and found.note else where or found.note
    return (
        TableEntry(claim.says if first else ""),
        TableEntry(verdict),
        TableEntry(note),
        TableEntry(
            "–" if effect is None else f"{amount(claim, effect.value)} {_unit_word(claim)}".strip(),
            "" if effect is None else interval(claim, effect),
        ),
        TableEntry(f"> {amount(claim, claim.test.margin)}"),
        TableEntry(documents),
        TableEntry(seeds),
        TableEntry(p_text(entry.p_adjusted) if first and entry.p_adjusted is not None else "–"),
        TableEntry(claim.published.text if first else ""),
    )


def _unit_word(claim: Claim) -> str:
    word = unit_of(claim)
    return word if word in ("points", "nats") else ""


def _claim_record(entry: Entry, found: Finding) -> dict[str, Any]:
    claim, effect = entry.claim, found.effect
    documents = seeds = value = low = high = basis = None
    if effect is not None:
        documents, seeds, basis = effect.documents, effect.seeds, effect.basis
        value, low, high = effect.value, effect.low, effect.high
    return {
        "claim": claim.id,
        "paper": claim.paper,
        "says": claim.says,
        "verdict": entry.verdict,
        "comparison": found.where,
        "comparison_verdict": found.verdict,
        "effect": value,
        "low": low,
        "high": high,
        "unit": unit_of(claim),
        "margin": claim.test.margin,
        "documents": documents,
        "seeds": seeds,
        "interval_over": basis,
        "p": found.p,
        "claim_p_holm": entry.p_adjusted,
        "published": claim.published.text,
        "published_value": claim.published.value,
        "note": found.note,
    }


CLAIM_FIELDS = (
    *("claim", "paper", "says", "verdict", "comparison", "comparison_verdict", "effect", "low"),
    *("high", "unit", "margin", "documents", "seeds", "interval_over", "p", "claim_p_holm"),
    *("published", "published_value", "note"),
)


def tally(entries: Sequence[Entry]) -> dict[str, int]:
    """How many claims have each verdict."""
    return {verdict: sum(entry.verdict == verdict for entry in entries) for verdict in VERDICTS}


def claims_table(entries: Sequence[Entry], study: str) -> Table:
    """The ledger, a panel per paper."""
    columns = (
        Column("claim", numeric=False),
        Column("verdict", numeric=False),
        Column("compared", numeric=False),
        Column("effect"),
        Column("claimed"),
        Column("documents"),
        Column("seeds"),
        Column("p, Holm"),
        Column("published", numeric=False),
    )
    papers = dict.fromkeys(entry.claim.paper for entry in entries)
    panels = []
    for paper in papers:
        rows = [
            _row(entry, found, index == 0)
            for entry in entries
            if entry.claim.paper == paper
            for index, found in enumerate(entry.findings)
        ]
        panels.append(Panel(published().papers[paper].title, columns, tuple(rows)))
    counted = ", ".join(f"{count} {verdict}" for verdict, count in tally(entries).items())
    return Table(
        CLAIMS,
        f"The papers' claims on the study {study}",
        f"{counted}. Effects count in the claimed direction, with 95 % intervals over seeds and "
        "documents. Supported: the whole interval is above what is claimed; not supported: none of "
        "it is; inconclusive: it has the margin inside, or there is no interval. A claim with "
        "several comparisons needs all of them (a claim that something exists needs one). "
        "Intervals are not adjusted for the number of claims; p is one-sided, adjusted by Holm's "
        f"rule over all claims with a p-value, and holds where it is below {ALPHA:g}.",
        tuple(panels),
        CLAIM_FIELDS,
        [_claim_record(entry, found) for entry in entries for found in entry.findings],
    )


def ledger_json(entries: Sequence[Entry], study: str) -> dict[str, Any]:
    """The ledger as an object; infinite numbers as text, since JSON has none."""

    def plain_record(record: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }

    return {
        "schema": 1,
        "study": study,
        "verdicts": tally(entries),
        "claims": [
            {
                "id": entry.claim.id,
                "verdict": entry.verdict,
                "survives_holm": entry.survives,
                "comparisons": [
                    plain_record(_claim_record(entry, found)) for found in entry.findings
                ],
            }
            for entry in entries
        ],
    }


# --- published beside measured --------------------------------------------------------------


def _decimals(printed: str) -> int:
    _, dot, rest = printed.partition(".")
    return len(rest) if dot and rest.isdigit() else 0


def _compared_row(row: Comparison) -> tuple[TableEntry, ...]:
    number, digits = row.number, _decimals(row.number.printed) + 1
    parts = (number.model, number.arm, number.mixer, number.kept)
    state = f"state {number.state}" if number.state else None
    named = ", ".join(part for part in (*parts, state) if part)
    if row.ours is not None:
        ours = TableEntry(
            plain(row.ours.value, digits),
            f"[{plain(row.ours.low, digits)}, {plain(row.ours.high, digits)}]",
        )
    else:
        ours = TableEntry(row.status)
    cost = MISSING
    if row.cost is not None:
        cost = TableEntry(f"{significant(row.cost.gpu_hours)} GPU-h, {row.cost.price:,.0f} USD")
    elif row.status != MEASURED and row.run:
        cost = TableEntry("unknown")
    return (
        TableEntry(named),
        TableEntry(number.teacher or "–"),
        TableEntry(f"{number.benchmark} ({number.metric})"),
        TableEntry(f"{number.printed} {'%' if number.unit == 'percent' else number.unit}"),
        ours,
        TableEntry(f"{row.ours.n:,}" if row.ours and row.ours.n else "–"),
        TableEntry(str(row.ours.seeds) if row.ours else "–"),
        cost,
        TableEntry(row.run if row.status == MEASURED else row.reason),
        TableEntry(number.trust),
    )


def _compared_record(row: Comparison) -> dict[str, Any]:
    number, ours, cost = row.number, row.ours, row.cost
    told = number.model_dump(exclude={"printed", "source", "method"})
    return {
        **{key: value for key, value in told.items() if key != "note"},
        "relation": number.relation,
        "published": number.value,
        "status": row.status,
        "run": row.run,
        "measured": ours.value if ours else None,
        "low": ours.low if ours else None,
        "high": ours.high if ours else None,
        "documents": ours.n if ours else None,
        "seeds": ours.seeds if ours else None,
        "published_in_interval": row.inside,
        "gpu_hours": cost.gpu_hours if cost else None,
        "cost_usd": cost.price if cost else None,
        "reason": row.reason,
        "note": number.note,
    }


COMPARED_FIELDS = (
    *("id", "paper", "place", "trust", "model", "arm", "teacher", "mixer", "kept", "state"),
    *("benchmark", "metric", "unit", "relation", "published", "status", "run", "measured", "low"),
    *("high", "documents", "seeds", "published_in_interval", "gpu_hours", "cost_usd", "reason"),
    "note",
)


def compared_table(rows: Sequence[Comparison], study: str) -> Table:
    """Published numbers beside the study's, a panel per place of a paper."""
    columns = (
        Column("published for", numeric=False),
        Column("teacher", numeric=False),
        Column("benchmark", numeric=False),
        Column("published"),
        Column("measured"),
        Column("documents"),
        Column("seeds"),
        Column("cost"),
        Column("run, or why not", numeric=False),
        Column("trust", numeric=False),
    )
    places = dict.fromkeys((row.number.paper, row.number.place) for row in rows)
    panels = tuple(
        Panel(
            f"{published().papers[paper].title}, {place}",
            columns,
            tuple(
                _compared_row(row)
                for row in rows
                if (row.number.paper, row.number.place) == (paper, place)
            ),
        )
        for paper, place in places
    )
    measured = sum(row.status == MEASURED for row in rows)
    unknown = any(row.status != MEASURED and row.run and row.cost is None for row in rows)
    return Table(
        COMPARED,
        f"Published and measured, study {study}",
        f"{measured} of {len(rows)} rows measured. Published numbers as printed; trust: primary is "
        "the paper itself, secondary an account of it. Measured values have 95 % intervals over "
        "documents, and seeds where there are several. Cost: of distilling and scoring all seeds "
        "of the run that would be needed; shared stages are not in it"
        + (f" ({NO_ESTIMATE})." if unknown else "."),
        panels,
        COMPARED_FIELDS,
        [_compared_record(row) for row in rows],
    )


def write_claims(entries: Sequence[Entry], study: str, folder: Path) -> Table:
    """`claims.csv`, `.md`, `.tex` and `.json`."""
    table = claims_table(entries, study)
    write_table(table, folder)
    write_json(folder / f"{CLAIMS}.json", ledger_json(entries, study))
    return table


def write_compared(rows: Sequence[Comparison], study: str, folder: Path) -> Table:
    """`paper_vs_measured.csv`, `.md` and `.tex`."""
    table = compared_table(rows, study)
    write_table(table, folder)
    return table
