"""niah_*: needles - a key and its value - hidden in noise, in running text or among other needles.

As in the official builder: in running text the needles stand between sentences at some of 40 even
depths, otherwise each at a random line; keys are an adjective and a noun, values numbers of seven
digits or UUIDs. Ours: the text starts at a random paragraph, and no key or value comes twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from rad.evaluation.ruler import words
from rad.evaluation.ruler.haystack import Haystack
from rad.evaluation.ruler.sizing import Draft, Meter
from rad.evaluation.ruler.tasks import NEEDLE, NIAH_MANY, NIAH_ONE, NOISE, RulerTask, Variant

_DEPTHS = [round(100 * step / 39) for step in range(40)]
_NOISE_LINE = " ".join(NOISE)
_SAMPLE = 32  # lines that tell how long one is


class Lines(NamedTuple):
    """A context made of lines: how it is written, its smallest and largest size, its tokens."""

    write: Callable[[int, int], str]
    least: int
    most: int
    estimate: Callable[[int], int]
    extras: Callable[[int], int]


def noise_lines(
    inserted: list[str], rng: Random, meter: Meter, room: int, *, ordered: bool = False
) -> Lines:
    """Noise of n lines with the inserted ones at random lines; a small unit is one noise sentence.

    `ordered` keeps the order of the inserted lines.
    """
    each = meter.cost(f"\n{_NOISE_LINE}")
    depths = sorted(rng.random() for _ in inserted) if ordered else [rng.random() for _ in inserted]
    return _lines(inserted, depths, lambda size: [_NOISE_LINE] * size, each, room // each + 1)


def _lines(
    inserted: list[str],
    depths: list[float],
    others: Callable[[int], list[str]],
    each: int,
    most: int,
) -> Lines:
    def write(size: int, extra: int) -> str:
        lines = others(size)
        places = [int(depth * size) for depth in depths]
        for place, index in sorted(
            ((place, index) for index, place in enumerate(places)), reverse=True
        ):
            lines.insert(place, inserted[index])
        if extra:
            lines.append(" ".join(NOISE[index % len(NOISE)] for index in range(extra)))
        return "\n".join(lines)

    # as many small units as one line can stand for, in any tokenizer
    return Lines(write, len(inserted), most, lambda size: size * each, lambda size: 4 * len(NOISE))


def _among_needles(
    inserted: list[str],
    kinds: tuple[str, str],
    taken: set[str],
    rng: Random,
    meter: Meter,
    room: int,
) -> Lines:
    """Other needles of the same form around the one that is asked for."""
    key_kind, value_kind = kinds

    def drawn(wanted: int) -> list[str]:
        keys = words.distinct(key_kind, wanted, rng, taken)
        values = words.distinct(value_kind, wanted, rng, taken)
        return [
            NEEDLE.format(kind=f"{value_kind}s", key=key, value=value)
            for key, value in zip(keys, values, strict=True)
        ]

    lines = drawn(_SAMPLE)
    each = max(1, meter.measure("".join(f"\n{line}" for line in lines)) // _SAMPLE)
    most = max(_SAMPLE, room * 5 // (4 * each))  # a quarter more than should fit
    lines += drawn(most - _SAMPLE)
    depths = [rng.random() for _ in inserted]
    return _lines(inserted, depths, lambda size: lines[:size], each, most)


def _in_text(inserted: list[str], hay: Haystack, rng: Random, meter: Meter, room: int) -> Lines:
    """Words of running text, with the needles between its sentences."""
    passage = hay.passage(rng.randrange(len(hay.paragraphs)), room)
    depths = sorted(rng.sample(_DEPTHS, len(inserted)))
    costs = meter.words(passage.words)

    def write(size: int, extra: int) -> str:
        whole = bisect_left(passage.ends, size)  # sentences before the last one, which may be cut
        ends = [0, *passage.ends[:whole], size]
        parts: list[str] = []
        last = 0
        for needle, depth in zip(inserted, depths, strict=True):
            place = ends[int((whole + 1) * depth / 100)]
            parts += [" ".join(passage.words[last:place])] * (place > last)
            parts.append(needle)
            last = place
        parts += [" ".join(passage.words[last:size])] * (size > last)
        return " ".join(parts)

    return Lines(write, 1, room, costs.__getitem__, lambda size: 0)


def draft(
    task: RulerTask, variant: Variant, rng: Random, meter: Meter, room: int, hay: Haystack | None
) -> Draft:
    """A document of a niah task with a context of any size up to `room` tokens."""
    key_kind, value_kind = task.options["key"], task.options["value"]
    queries = variant.get("queries", 1)
    per_key = variant.get("values", 1)
    taken: set[str] = set()
    keys = words.distinct(key_kind, max(variant.get("keys", 1), queries), rng, taken)
    values = {key: words.distinct(value_kind, per_key, rng, taken) for key in keys}
    needles = [
        NEEDLE.format(kind=f"{value_kind}s", key=key, value=value)
        for key in keys
        for value in values[key]
    ]
    rng.shuffle(needles)
    asked = rng.sample(keys, queries)
    references = [value for key in asked for value in values[key]]

    if task.options["haystack"] == "noise":
        context = noise_lines(needles, rng, meter, room)
    elif task.options["haystack"] == "needle":
        context = _among_needles(needles, (key_kind, value_kind), taken, rng, meter, room)
    else:
        assert hay is not None
        context = _in_text(needles, hay, rng, meter, room)

    query = asked[0] if queries == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    text, prefix = NIAH_ONE if queries * per_key == 1 else NIAH_MANY

    def render(size: int, extra: int) -> str:
        return text.format(kind=value_kind, query=query, context=context.write(size, extra))

    return Draft(
        render=render,
        prefix=prefix.format(kind=value_kind, query=query),
        references=references,
        target=" " + ", ".join(references),
        least=context.least,
        most=context.most,
        estimate=context.estimate,
        extras=context.extras,
        once=tuple(value for each in values.values() for value in each),
    )
