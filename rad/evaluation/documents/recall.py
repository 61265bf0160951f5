"""Recall from the context: published extraction sets, key-value retrieval, labelled stand-ins.

`swde`, `fda`, `squad_completion`: the text up to where the value follows (lm-eval, version 1).
`kv_retrieval`: the dictionary of the retrieval-aware paper (section 3.2). `record_recall` and
`qa_recall` stand in for the published sets where these are missing, and are labelled so.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from rad.data.nouns import NOUNS
from rad.evaluation.request import Concrete, Request
from rad.evaluation.sources import Document, TaskError

_DEFAULT_SAMPLES = 200  # of what is made here
_ATTRIBUTES = (
    *("Title", "Maker", "Colour", "Weight", "Origin", "Edition", "Material", "Price", "Licence"),
    *("Keeper", "District", "Harbour", "Founder", "Emblem", "Motto", "Language", "Currency"),
    *("Climate", "Elevation", "Population", "Dialect", "Anthem", "Patron", "Season", "Instrument"),
    *("Publisher", "Translator", "Volume", "Shelf", "Index", "Binding", "Sponsor", "Captain"),
    *("Vessel", "Engine", "Cargo", "Route", "Signal", "Crew", "Berth", "Tonnage", "Architect"),
    *("Tower", "Bridge", "Garden", "Gallery", "Curator", "Exhibit", "Donor", "Catalogue"),
    *("Species", "Habitat", "Diet", "Lifespan", "Plumage", "Call", "Range", "Status", "Genus"),
    *("Recipe", "Flavour", "Vintage", "Barrel", "Estate"),
)


def _extraction(request: Request) -> tuple[list[Document], dict[str, Any]]:
    """SWDE, FDA, SQuAD completion: the text, stripped, and the value that follows."""
    found = request.rows(request.settings.kind)
    documents = []
    for number, row in enumerate(found.rows[: request.samples]):
        value = str(row["value"]).strip()
        name = str(row.get("doc_id", number))
        documents.append(
            {
                "id": f"{number}/{name}",
                "prompt": str(row["text"]).strip(),
                "target": value,
                "references": [value],
            }
        )
    return documents, dict(found.facts)


def _dictionary(request: Request, rng: random.Random) -> Document:
    settings = request.settings
    if not 2 <= settings.pairs <= 100:
        raise request.error("pairs", "2 to 100, the values of a dictionary are distinct below 100")
    keys = rng.sample(NOUNS, settings.pairs)
    values = rng.sample(range(100), settings.pairs)
    wanted = rng.randrange(settings.pairs)
    lines = [f"{key}:{value}" for key, value in zip(keys, values, strict=True)]
    question = f"The value of the key '{keys[wanted]}' is"
    prompt = "\n".join(["Memorize the following dictionary:", *lines, question])
    return {"prompt": prompt, "target": str(values[wanted]), "references": [str(values[wanted])]}


def _record(request: Request, rng: random.Random) -> Document:
    """A page of `Attribute: value` lines of made-up things; one attribute is asked for again."""
    wanted = request.settings.pairs
    if wanted > len(_ATTRIBUTES):
        raise request.error("pairs", f"a record has at most {len(_ATTRIBUTES)} attributes")
    keys = rng.sample(_ATTRIBUTES, wanted)
    values = [f"{' '.join(rng.sample(NOUNS, 2))} {rng.randrange(10, 1000)}" for _ in keys]
    asked = rng.randrange(wanted)
    head = " ".join(rng.sample(NOUNS, 3)).capitalize()
    page = "\n".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    prompt = f"{head}\n\n{page}\n\n{keys[asked]}:"
    return {"prompt": prompt, "target": values[asked], "references": [values[asked]]}


def _made(
    make: Callable[[Request, random.Random], Document], **facts: Any
) -> Callable[[Request], tuple[list[Document], dict[str, Any]]]:
    """Documents with a random generator each, so that more of them change nothing."""

    def documents(request: Request) -> tuple[list[Document], dict[str, Any]]:
        settings, result = request.settings, []
        for index in range(request.samples or _DEFAULT_SAMPLES):
            seed = f"{settings.kind}/{settings.pairs}/{settings.seed}/{index}"
            result.append({"id": str(index), **make(request, random.Random(seed))})
        return result, {**facts, "pairs": settings.pairs}

    return documents


def _questions(request: Request) -> tuple[list[Document], dict[str, Any]]:
    """XQuAD: the paragraph, the question, and any of its answers."""
    found = request.rows("xquad")
    documents = []
    try:
        articles = [article for row in found.rows for article in json.loads(row["text"])["data"]]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = sorted({answer["text"] for answer in question["answers"]})
                    prompt = f"{paragraph['context']}\nQuestion: {question['question']}\nAnswer:"
                    documents.append(
                        {
                            "id": str(question["id"]),
                            "prompt": prompt,
                            "target": answers[0],
                            "references": answers,
                        }
                    )
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise TaskError(
            f"evaluation.tasks.{request.task}.files: not in SQuAD's layout ({error!r})"
        ) from error
    return documents[: request.samples], {**found.facts, "stand_in": "SQuAD completion"}


_MAKERS: dict[str, Callable[[Request], tuple[list[Document], dict[str, Any]]]] = {
    "swde": _extraction,
    "fda": _extraction,
    "squad_completion": _extraction,
    "kv_retrieval": _made(_dictionary, synthetic=True),
    "record_recall": _made(_record, synthetic=True, stand_in="SWDE, FDA"),
    "qa_recall": _questions,
}


def build(request: Request) -> list[Concrete]:
    """One concrete task; raises `MissingData` where a published set is in none of its places."""
    documents, facts = _MAKERS[request.settings.kind](request)
    return request.whole(documents, template="recall", facts=facts)
