"""text_nano: running text from a small grammar; also the filler of retrieval contexts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from rad.data.nano.example import Example
from rad.data.nano.words import ADJECTIVES, NOUNS

FAMILY = "text_nano"
_MOVES = ("sat", "ran", "hid")
_SIDES = ("by", "in", "to")


def sentence(rng: random.Random, nouns: Sequence[str] = NOUNS) -> str:
    """One sentence with a leading space, using only `nouns`; 5 to 9 words."""
    subject, other = rng.sample(nouns, 2)
    adjective = rng.choice(ADJECTIVES)
    form = rng.randrange(4)
    if form == 0:
        return f" The {subject} {rng.choice(_MOVES)}."
    if form == 1:
        return f" The {adjective} {subject} saw the {other}."
    if form == 2:
        return f" The {subject} {rng.choice(_MOVES)} {rng.choice(_SIDES)} the {other}."
    return f" The {subject} was {adjective}."


def build(rng: random.Random, level: int) -> Example:
    """A chain story: every sentence begins with what the one before ended with."""
    cast = rng.sample(NOUNS, 7 if level else 4)
    colour = {noun: rng.choice(ADJECTIVES) for noun in cast}
    sentences = []
    for subject, other in itertools.pairwise(cast):
        move, side = rng.choice(_MOVES), rng.choice(_SIDES)
        sentences.append(f" The {colour[subject]} {subject} {move} {side} the {other}.")
    # The last sentences recall each colour: predictable only for a reader of the whole story.
    recall = [f" The {noun} was {colour[noun]}." for noun in rng.sample(cast[:-1], 2)]
    prompt = "Story:" + sentences[0]
    return Example(FAMILY, prompt, "".join(sentences[1:] + recall), {"sentences": len(cast) + 1})
