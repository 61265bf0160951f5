"""vt: a chain of variable assignments scattered over noise, behind one worked example.

As in the official builder: names of five letters, a value of five digits, four hops; the example
has names of three letters and a context of 500 tokens. Ours: the example is drawn for every
document rather than renamed.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

from rad.evaluation.ruler import words
from rad.evaluation.ruler.needles import Lines, noise_lines
from rad.evaluation.ruler.sizing import Draft, Meter
from rad.evaluation.ruler.tasks import VT, Variant


def _chain(names: list[str], value: str) -> list[str]:
    # official: an assignment from a variable ends in a space
    copies = [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
    return [f"VAR {names[0]} = {value}", *copies]


def _texts(context: str, value: str, count: int) -> tuple[str, str]:
    text, prefix = (part.format(context=context, value=value, count=count) for part in VT)
    return text, prefix


def _example(hops: int, tokens: int, taken: str, rng: Random, meter: Meter) -> str:
    """A worked example: as many lines of noise as fit into so many tokens, at least one per hop."""
    names = words.letters(hops + 1, 3, rng)
    value = words.number(rng, 5)
    while value == taken:
        value = words.number(rng, 5)
    lines = noise_lines(_chain(names, value), rng, meter, tokens, ordered=True)
    size = lines.least
    shortest = meter.tokens(*_texts(lines.write(size, 0), value, hops + 1))
    if tokens > shortest:
        size += (tokens - shortest) // lines.estimate(1)
    text, prefix = _texts(lines.write(size, 0), value, hops + 1)
    return f"{text}{prefix} {' '.join(names)}\n\n"


def draft(variant: Variant, rng: Random, meter: Meter, room: int) -> Draft:
    """A document with a context of any size up to `room` tokens."""
    hops = variant["hops"]
    names = words.letters(hops + 1, 5, rng)
    value = words.number(rng, 5)
    example = _example(hops, variant["example_tokens"], value, rng, meter)
    context: Lines = noise_lines(_chain(names, value), rng, meter, room, ordered=True)

    def render(size: int, extra: int) -> str:
        return example + _texts(context.write(size, extra), value, hops + 1)[0]

    return Draft(
        render=render,
        prefix=_texts("", value, hops + 1)[1],
        references=names,
        target=" ".join(names),
        least=context.least,
        most=context.most,
        estimate=context.estimate,
        extras=context.extras,
    )
