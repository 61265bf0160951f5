"""The lists that papers published, read from `rad/assets/selections.json` (no torch).

Layer sets, layer rankings, head rankings, head sets and named heads, each with its source: facts,
transcribed. A list of skipped or converted layers stands for its complement.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

Pair = tuple[int, int]

# roles whose layers are what goes away, and roles that are no selection of full attention
COMPLEMENT = frozenset({"converted_to_mamba", "skipped_attention"})
WINDOWED = frozenset({"sliding_window_1152", "sliding_window_2048"})


@dataclass(frozen=True)
class Published:
    """One list; `layers` or `pairs` hold it, in order of importance when `ordered`.

    `num_layers` and `num_heads` are the shape of the model it was published for; `num_heads` is
    None for layer lists and both may be None where a paper named single heads only.
    """

    name: str
    paper: str
    model: str
    selector: str
    probe_mixer: str | None
    num_layers: int | None
    num_heads: int | None
    layers: tuple[int, ...] | None
    pairs: tuple[Pair, ...] | None
    ordered: bool
    complete: bool
    role: str
    record: dict[str, Any]

    @property
    def searchable(self) -> bool:
        """Whether it is found by paper and budget; the others by their name only."""
        return self.role not in WINDOWED and self.role != "named" and self.size > 0

    @property
    def size(self) -> int:
        """Layers or heads that it names, or keeps when it names those that go away."""
        return len(self.layers if self.layers is not None else self.pairs or ())


def load() -> dict[str, Any]:
    """The data file as it is."""
    text = resources.files("rad").joinpath("assets", "selections.json").read_text("utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


@functools.cache
def published() -> tuple[Published, ...]:
    """Every list of the data file, in its order."""
    data = load()
    found = [_layer_set(record) for record in data["layer_sets"]]
    found += [_ranking(record) for record in data["layer_rankings"]]
    for record in data["head_rankings"]:
        found.append(_heads(record, [tuple(pair) for pair in record["heads"]], ordered=True))
    for record in data["head_sets"]:
        pairs = [(int(k), h) for k, heads in record["heads_by_layer"].items() for h in heads]
        found.append(_heads(record, pairs, ordered=False))
    for record in data["named_components"]:
        if record["kind"] == "attention_head":
            pairs = [(layer, head) for layer, head in record["gather"] + record["aggregate"]]
            found.append(_heads(record, pairs, ordered=False))
    return tuple(found)


def without_list() -> dict[str, str]:
    """Names of the records that are no selection, and why."""
    data = load()
    found = {record["id"]: "only its size was published" for record in data["skip_counts"]}
    for record in data["named_components"]:
        if record["kind"] != "attention_head":
            found[record["id"]] = f"it names a {record['kind']}, not attention heads"
    return found


def _layer_set(record: dict[str, Any]) -> Published:
    layers = list(record["layers"])
    if record["role"] in COMPLEMENT:
        layers = [layer for layer in range(record["num_layers"]) if layer not in layers]
    return _published(
        record,
        layers=tuple(layers),
        ordered=bool(record["ordered"]) and record["role"] not in COMPLEMENT,
        role=record["role"],
    )


def _ranking(record: dict[str, Any]) -> Published:
    layers = tuple(record["ranking"])
    return _published(
        record, layers=layers, ordered=True, role="kept_softmax", complete=record["complete"]
    )


def _heads(record: dict[str, Any], pairs: list[Any], ordered: bool) -> Published:
    role = "kept_softmax" if "method" in record else "named"
    return _published(record, pairs=tuple(pairs), ordered=ordered, role=role)


def _published(
    record: dict[str, Any],
    *,
    role: str,
    ordered: bool,
    layers: tuple[int, ...] | None = None,
    pairs: tuple[Pair, ...] | None = None,
    complete: bool = False,
) -> Published:
    return Published(
        name=record["id"],
        paper=record["paper"],
        model=record["model"],
        selector=record.get("method", "named"),
        probe_mixer=record.get("probe_mixer"),
        num_layers=record.get("num_layers"),
        num_heads=record.get("num_heads"),
        layers=layers,
        pairs=pairs,
        ordered=ordered,
        complete=complete,
        role=role,
        record=record,
    )
