"""Presets: every published list can be picked, for its shape and budget only."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rad.field_settings import PresetSettings
from rad.placement import Budget, Placement
from rad.selection import SelectionContext, SelectionError, select
from rad.selection.published import Published, load, published, without_list
from rad.selection.smart import violation
from rad.selection.uniform import uniform_layers

LISTS = {item.name: item for item in published()}
KV_HEAD_BYTES = 2 * 64 * 2


def _shape(item: Published) -> tuple[int, int]:
    return item.num_layers or 32, item.num_heads or 32


def _pick(shape: tuple[int, int], budget: Budget, kv_heads: int = 4, **keys: str) -> Placement:
    context = SelectionContext(
        base="base",
        layers=shape[0],
        heads=shape[1],
        kv_heads=kv_heads,
        budget=budget,
        settings=PresetSettings(**keys),  # type: ignore[arg-type]
        kv_head_bytes=KV_HEAD_BYTES,
    )
    return select(context)


def test_the_data_file_holds_what_the_sheet_lists() -> None:
    default = Path(__file__).resolve().parents[2] / "shared"
    sheet = Path(os.environ.get("RAD_SHARED", default)) / "papers" / "selections.yaml"
    if not sheet.exists():
        pytest.skip(f"no {sheet} to compare with")
    want = yaml.safe_load(sheet.read_text(encoding="utf-8"))
    have = load()
    for key in want:
        if key != "schema_version":
            assert have[key] == json.loads(json.dumps(want[key])), key


def test_every_record_is_a_list_or_says_why_not() -> None:
    data = load()
    kinds = [value for value in data.values() if isinstance(value, list)]
    names = {record["id"] for kind in kinds for record in kind if isinstance(record, dict)}
    assert names == set(LISTS) | set(without_list())
    assert not set(LISTS) & set(without_list())
    assert all(item.record["source"] for item in LISTS.values())


@pytest.mark.parametrize("name", sorted(LISTS))
def test_every_published_list_can_be_picked(name: str) -> None:
    item = LISTS[name]
    unit = "layers" if item.layers is not None else "heads"
    kv_heads = 1 if _shape(item)[1] % 4 else 4
    placement = _pick(_shape(item), Budget(**{unit: item.size}), kv_heads, name=name)
    if item.layers is not None:
        assert placement.kept_layers() == sorted(item.layers)
        assert {placement.kind(layer) for layer in item.layers} == {"softmax"}
    else:
        assert placement.softmax == sorted(item.pairs or ())
    assert placement.provenance["list"] == name
    assert placement.provenance["published"]["source"] == item.record["source"]


@pytest.mark.parametrize("ranking", [r["id"] for r in load()["layer_rankings"]])
def test_cuts_of_a_ranking_are_the_published_sets(ranking: str) -> None:
    item = LISTS[ranking]
    for cut in item.record["cuts"]:
        placement = _pick(_shape(item), Budget(layers=cut), name=ranking)
        twins = [
            other
            for other in LISTS.values()
            if other.size == cut
            and other.layers is not None
            and other.name.startswith("set.")
            and (other.paper, other.model, other.selector, other.probe_mixer)
            == (item.paper, item.model, item.selector, item.probe_mixer)
        ]
        assert [sorted(twin.layers or ()) for twin in twins] == [placement.kept_layers()]


@given(st.data())
def test_rankings_give_nested_sets(data: st.DataObject) -> None:
    ordered = [item for item in LISTS.values() if item.ordered]
    item = data.draw(st.sampled_from(ordered))
    unit = "layers" if item.layers is not None else "heads"
    small = data.draw(st.integers(0, item.size))
    large = data.draw(st.integers(small, item.size))
    few, many = (
        set(_pick(_shape(item), Budget(**{unit: k}), 1, name=item.name).softmax)
        for k in (small, large)
    )
    assert few <= many


def test_a_list_is_found_by_paper_and_budget() -> None:
    nine = _pick((36, 16), Budget(layers=9), paper="kl_guided", selector="ga_s2", probe_mixer="gdn")
    assert nine.kept_layers() == [5, 17, 19, 20, 21, 22, 25, 32, 33]
    assert nine.provenance["list"] == "set.kl.ga_s2.gdn.qwen3b.k9"
    assert "rank.kl.ga_s2.gdn.qwen3b" in nine.provenance["same_list"]
    ten = _pick((16, 32), Budget(heads=10), paper="retrieval_aware")
    assert (9, 25) in ten.softmax and ten.kept_heads(8) == [16, 19, 20]


def test_postnas_of_the_kl_study_is_full_and_windowed_layers_of_jet_nemotron() -> None:
    union = set(LISTS["set.jet.4b.full"].layers or ()) | set(LISTS["set.jet.4b.swa"].layers or ())
    assert union == set(LISTS["set.kl.postnas.qwen3b.k10"].layers or ())


def test_lists_of_what_goes_away_keep_the_rest() -> None:
    kept = LISTS["set.mambainllama.3b.mamba"].layers
    assert kept == LISTS["set.mambainllama.3b.attn"].layers
    skipped = LISTS["set.swift.llama2_13b.attn_skip"]
    assert set(skipped.layers or ()) == set(range(40)) - set(skipped.record["layers"])


def test_a_complete_ranking_comes_with_scores() -> None:
    placement = _pick((28, 16), Budget(layers=7), name="rank.halo.klls.qwen3_1_7b")
    assert placement.scores is not None and not placement.scores.higher_is_kept
    first = sorted(range(28), key=lambda layer: placement.scores.values[layer])[:7]  # type: ignore
    assert sorted(first) == placement.kept_layers()


@pytest.mark.parametrize("limit", [0, 5, 9, 21, 400])
def test_a_budget_in_bytes_takes_the_longest_prefix_that_fits(limit: int) -> None:
    name = "headrank.ra.llama32_1b"
    pairs = list(LISTS[name].pairs or ())
    budget = Budget(kv_bytes_per_token=limit * KV_HEAD_BYTES + 1)
    placement = _pick((16, 32), budget, 8, name=name)
    assert placement.softmax == sorted(pairs[:limit])


def test_a_budget_in_bytes_takes_the_largest_layer_set_that_fits() -> None:
    budget = Budget(kv_bytes_per_token=8 * 4 * KV_HEAD_BYTES)
    placement = _pick(
        (28, 28), budget, paper="kl_guided", model="Qwen2.5-7B-Instruct", selector="smart"
    )
    assert placement.kept_layers() == [2, 6, 10, 14, 18, 22, 27]


@pytest.mark.parametrize(
    ("keys", "budget", "message"),
    [
        ({"name": "set.kl.ga_s2.gdn.qwen3b.k7"}, "l7", "close to it: set.kl.ga_s2.gdn.qwen"),
        ({"name": "count.dv.llama-2-13b"}, "l7", "only its size was published"),
        ({"name": "comp.ga.llamba_8b"}, "l7", "names a ssm_head"),
        ({"paper": "nobody"}, "l7", "no list with paper 'nobody'; available: .*kl_guided"),
        ({"paper": "kl_guided", "selector": "rad"}, "l7", "available: act_mse, ar, ar_mh, ga_s2"),
        ({"paper": "halo"}, "l7", "the base has 36 layers x 16 heads|no list keeps budget l7"),
        ({"paper": "zebra_llama"}, "l7", "has 36 layers x 16 heads; the lists are for Llama-3.1"),
        ({"selector": "smart"}, "l7", "no list keeps budget l7; available: smart Qwen2.5-3B.* 5"),
        ({"paper": "kl_guided"}, "l9", "different lists fit budget l9; name one of set.kl"),
        ({"name": "set.kl.ar.qwen3b.k5"}, "l6", "no list keeps budget l6; available: ar .*up to 5"),
        ({"name": "set.kl.ar.qwen3b.k5"}, "h5", "not a whole number of layers"),
        ({"paper": "jet_nemotron", "selector": "postnas"}, "l7", "postnas Jet-Nemotron-4B .* 3"),
    ],
)
def test_what_cannot_be_picked_says_what_is_available(
    keys: dict[str, str], budget: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _pick((36, 16), Budget.parse(budget), **keys)
    assert "\n" not in str(caught.value)


def test_heads_that_the_base_lacks_are_named() -> None:
    with pytest.raises(SelectionError, match="layer 16 head 22, the base has 8 layers x 4 heads"):
        _pick((8, 4), Budget(heads=2), name="comp.ga.llama31_8b")


SMART = [item for item in LISTS.values() if item.selector == "smart"]


@pytest.mark.parametrize("item", SMART, ids=lambda item: item.name)
def test_every_published_smart_list_meets_its_constraints(item: Published) -> None:
    assert item.layers is not None and item.num_layers is not None
    assert violation(item.layers, item.num_layers) is None


def test_twenty_smart_lists_are_published() -> None:
    assert len(SMART) == 20


@pytest.mark.parametrize(
    "item", [i for i in LISTS.values() if i.selector == "uniform"], ids=lambda item: item.name
)
def test_an_offset_gives_every_published_uniform_list(item: Published) -> None:
    assert item.layers is not None and item.num_layers is not None
    found = uniform_layers(item.num_layers, item.size, item.layers[0])
    assert found == list(item.layers)
