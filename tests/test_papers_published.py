"""The shipped published numbers, and the rules that say which run each stands for."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from subprocess import run

import pytest
import yaml

from rad.papers.data import parse
from rad.papers.matching import quantity_of, rules
from rad.papers.published import Published, numbers, published
from rad.selection.published import published as published_lists
from rad.settings import MIXER_SETTINGS, SELECTOR_SETTINGS, TASK_SETTINGS

SOURCE = Path(__file__).parents[2] / "shared" / "papers" / "published.yaml"


def test_the_file_is_complete() -> None:
    found = numbers()
    assert len(found) == 989
    assert len({number.id for number in found}) == 989
    assert Counter(number.method for number in found) == {
        "retrieval_aware": 539,
        "kl_guided": 280,
        "rad": 170,
    }
    assert Counter(number.trust for number in found) == {"primary": 817, "secondary": 172}
    # nothing is declared that no number uses
    used = {number.paper for number in found}, {number.source for number in found}
    assert used == (set(published().papers), set(published().sources))


def test_headline_numbers_keep_their_digits() -> None:
    by_id = {number.id: number for number in numbers()}
    assert by_id["rad.t1.base.winogrande"].printed == "67.40"
    assert by_id["rad.abstract.rad.gsm8k"].value == 71.27
    assert by_id["rad.abstract.convergence"].relation == "<="
    assert by_id["kl.qwen3b.k9.ga_s2"].value == 0.8631
    k10 = by_id["ra.t1.llama.k10.cov_retrieval"]
    assert (k10.value, k10.kept, k10.state) == (95.0, "10/512 heads", 64)
    assert k10.share == 10 / 512
    assert by_id["ra.t1.llama.k0.mmlu"].share == 0.0


@pytest.mark.skipif(not SOURCE.is_file(), reason="the collection of published numbers is not here")
def test_facts_are_those_of_the_collection() -> None:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries = yaml.load(SOURCE.read_text(encoding="utf-8"), Loader=loader)["entries"]
    mine = {number.id: number for number in numbers()}
    assert {entry["id"] for entry in entries} == set(mine)
    same = ("paper", "model", "arm", "teacher", "mixer", "benchmark", "metric", "relation", "unit")
    for entry in entries:
        number = mine[entry["id"]]
        assert [getattr(number, key) for key in same] == [entry[key] for key in same], number.id
        assert number.value == pytest.approx(float(entry["value"]), rel=1e-12), number.id
        assert (number.trust, number.source) == (entry["provenance"], entry["source"])
        budget = entry["budget"]
        if budget is not None:
            assert number.state == budget["d_state"]
            assert number.kept is not None and number.kept.split("/")[0].split()[0] == str(
                budget["kept"]
            )


SMALL = """
schema: 1
papers: {p: {title: P}}
sources: {s: somewhere}
notes: {}
tables:
  - paper: p
    place: Table 1
    source: s
    trust: primary
    method: rad
    rows:
      - {id: p.a, unit: percent, values: [[x, x, acc, "1.0"]]}
      - {id: p.b, unit: percent, kept: 1/2 layers, values: [[x, x, acc, "~2"]]}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("p.b, ", "p.a, ", "p.a.x: this id is there twice"),
        ('"1.0"', '"one"', "p.a.x: 'one' is not a number as printed"),
        ('"1.0"', '"1000"', "p.a.x: 1000 percent is out of range"),
        ("1/2 layers", "half", "p.b: kept 'half', expected as 20/28 layers"),
        ("source: s", "source: t", "p, Table 1: unknown paper or source"),
        ("unit: percent, v", "unit: percent, note: n, v", "p.a.x: unknown note 'n'"),
        ("unit: percent, v", "unit: per cent, v", "tables.0.rows.0.unit"),
    ],
)
def test_faults_name_the_key(old: str, new: str, message: str) -> None:
    assert len(parse(Published, SMALL, "small").numbers()) == 2
    with pytest.raises(ValueError, match="small: ") as error:
        parse(Published, SMALL.replace(old, new, 1), "small")
    assert message in str(error.value)


def test_rules_name_what_exists() -> None:
    found = rules()
    assert set(found.mixers.values()) <= set(MIXER_SETTINGS)
    declared = [*found.arms, *found.studies.values()]
    settings = [each for rule in found.arms for each in rule.selectors]
    settings += [each for wanted in found.studies.values() for each in wanted]
    assert declared and all(
        each["method"] in SELECTOR_SETTINGS for each in settings if "method" in each
    )
    lists = {entry.name for entry in published_lists()}
    for each in settings:
        name = each.get("name", "")
        if name and "*" not in name:
            assert name in lists
    for quantity in found.quantities:
        assert set(quantity.kinds) <= set(TASK_SETTINGS)


def test_most_scores_of_the_three_papers_can_be_measured() -> None:
    for paper, least in (("rad", 48), ("kl_guided", 20), ("retrieval_aware", 430)):
        own = [number for number in numbers() if number.paper == paper]
        assert sum(quantity_of(number) is not None for number in own) >= least


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, rad.papers.tables, rad.papers.compare; "
        "bad = {'torch', 'transformers', 'lm_eval'} & set(sys.modules); assert not bad, bad"
    )
    run([sys.executable, "-c", code], check=True)
