"""cwe and fwe: which words of a list come most often.

As in the official builder: `cwe` lists common words 30 times (6 in short contexts) among others
that come 3 times (once), behind a worked example; the words of `fwe` come n / (zeta(2) rank^2)
times, the most frequent one being `...`.
"""

from __future__ import annotations

import math
import string
from random import Random

from rad.evaluation.ruler import words
from rad.evaluation.ruler.sizing import Draft, Meter
from rad.evaluation.ruler.tasks import CWE, FWE, Variant

_ZETA = math.pi**2 / 6  # zeta(2)


def _numbered(listed: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))


def _cwe_texts(listed: list[str], common: int) -> tuple[str, str]:
    text, prefix = (part.format(context=_numbered(listed), count=common) for part in CWE)
    return text, prefix


def _cwe_example(variant: Variant, rng: Random) -> str:
    common, settings = variant["common"], variant["example"]
    drawn = rng.sample(words.word_lists().vocabulary, common + settings["others"])
    frequent, rare = drawn[:common], drawn[common:]
    listed = frequent * settings["often"] + rare * settings["seldom"]
    rng.shuffle(listed)
    text, prefix = _cwe_texts(listed, common)
    return f"{text}{prefix} {_numbered(frequent)}\n"


def draft_cwe(variant: Variant, rng: Random, meter: Meter, room: int) -> Draft:
    """A document whose size is the number of words that come seldom."""
    common, often, seldom = (int(variant[key]) for key in ("common", "often", "seldom"))
    example = _cwe_example(variant, rng)
    lists = words.word_lists()
    # every listed word takes two tokens or more: its number and itself
    most = room // (2 * seldom) + 1
    drawn = rng.sample(lists.vocabulary, min(len(lists.vocabulary), common + most))
    if len(drawn) < common + most:  # above 64k: adjective-noun pairs when the words are used up
        drawn += words.distinct("word", common + most - len(drawn), rng, set(drawn))
    frequent, rare = drawn[:common], drawn[common:]
    salt = rng.getrandbits(64)
    costs = meter.words(rare)

    def render(size: int, extra: int) -> str:
        listed = frequent * often + rare[:size] * seldom
        Random(salt + size).shuffle(listed)
        return example + _cwe_texts(listed, common)[0]

    def estimate(size: int) -> int:
        return seldom * costs[size] + meter.numbered(common * often + seldom * size)

    return Draft(
        render=render,
        prefix=CWE[1].format(count=common),
        references=frequent,
        target=f" {_numbered(frequent)}",
        least=common,
        most=most,
        estimate=estimate,
    )


def zipf_counts(total: int, ranks: int) -> list[int]:
    """How often the word of each rank comes, without the tail that comes less than once."""
    counts: list[int] = []
    for rank in range(1, ranks + 1):
        count = int(total * rank**-2.0 / _ZETA)
        if not count:
            break
        counts.append(count)
    return counts


def _told_apart(total: int) -> bool:
    """Whether ranks two to four come at different counts, and more often than rank five."""
    counts = [int(total * rank**-2.0 / _ZETA) for rank in range(2, 6)]
    return counts[0] > counts[1] > counts[2] > counts[3]


# From here on there is always one right answer.
LEAST_TOTAL = 1 + max(total for total in range(1, 2000) if not _told_apart(total))


def draft_fwe(rng: Random, meter: Meter, room: int) -> Draft:
    """A document whose size is the total that counts are taken from."""
    coded = words.letters(max(4, room // 50), 6, rng, string.ascii_lowercase)
    coded[0] = "..."
    salt = rng.getrandbits(64)
    most = 2 * room
    costs = [meter.measure(f" {word}") for word in coded[: len(zipf_counts(most, len(coded)))]]

    def render(size: int, extra: int) -> str:
        listed = [
            word
            for word, count in zip(coded, zipf_counts(size, len(coded)), strict=False)
            for _ in range(count)
        ]
        Random(salt + size).shuffle(listed)
        return FWE[0].format(context=" ".join(listed))

    def estimate(size: int) -> int:
        counts = zipf_counts(size, len(coded))
        return sum(count * cost for count, cost in zip(counts, costs, strict=False))

    references = coded[1:4]
    return Draft(
        render=render,
        prefix=FWE[1],
        references=references,
        target=" " + ", ".join(references),
        least=LEAST_TOTAL,
        most=max(most, LEAST_TOTAL),
        estimate=estimate,
    )
