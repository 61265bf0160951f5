"""The verb `papers`: a study held against what was published, in numbers and in claims.

Nothing heavy is imported before the verb runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rad.commands.options import OPTIONAL, Verb, load_study, recorded_study

if TYPE_CHECKING:
    from rad.study import Study


def papers(args: argparse.Namespace) -> None:
    """Compare a study with the papers: their numbers (compare) or their claims (claims)."""
    from rad.papers.evidence import gather

    study = _study(args)
    root = args.root or Path("results") / study.folder
    output = args.output or root
    findings = gather(study, root)
    if args.what == "claims":
        from rad.papers.figures import forest
        from rad.papers.ledger import ledger
        from rad.papers.tables import tally, write_claims
        from rad.reporting.style import save, styled

        entries = ledger(findings)
        write_claims(entries, study.folder, output / "tables")
        with styled():
            save(forest(entries, study.folder), output / "figures", "claims")
        for entry in entries:
            print(f"{entry.verdict:14}  {entry.claim.id}")
        print(", ".join(f"{count} {verdict}" for verdict, count in tally(entries).items()))
        return
    from rad.papers.compare import MEASURED, compare, read_costs
    from rad.papers.tables import write_compared

    rows = compare(findings, read_costs(args.estimate) if args.estimate else None)
    table = write_compared(rows, study.folder, output / "tables")
    measured = sum(row.status == MEASURED for row in rows)
    print(f"{len({row.number.id for row in rows})} published numbers, {measured} rows measured")
    print(output / "tables" / f"{table.name}.md")


def _study(args: argparse.Namespace) -> Study:
    if (args.study is None) == (not args.config):
        raise ValueError("name the study by its YAML files, or by --study FILE (study.json)")
    return load_study(args.config) if args.study is None else recorded_study(args.study)


VERBS: dict[str, Verb] = {
    "papers": (
        papers,
        [
            ("what", {"choices": ["compare", "claims"], "help": "numbers, or claims in words"}),
            ("config", {"type": Path, "nargs": "*", "help": "YAML files, merged in order"}),
            ("--study", {**OPTIONAL, "help": "instead: study.json of a study's results"}),
            ("--root", {**OPTIONAL, "help": "its results (default: results/STUDY)"}),
            ("--output", {**OPTIONAL, "help": "folder for tables/ and figures/ (default: root)"}),
            ("--estimate", {**OPTIONAL, "help": "compare: costs, by `rad estimate --json`"}),
        ],
    ),
}
