"""Running text in blocks that fit the context, for perplexity."""

from __future__ import annotations

from collections.abc import Sequence

from rad.evaluation.request import Concrete, Request
from rad.evaluation.sources import Count, Document, paragraphs


def _pieces(text: str, room: int, count: Count) -> list[str]:
    """`text` cut at spaces into pieces of at most `room` tokens."""
    if count(text) <= room:
        return [text]
    words = text.split(" ")
    if len(words) == 1:
        middle = len(text) // 2
        halves = [text[:middle], text[middle:]]
    else:
        middle = len(words) // 2
        halves = [" ".join(words[:middle]), " ".join(words[middle:])]
    return [piece for half in halves for piece in _pieces(half, room, count) if piece]


def blocks(texts: Sequence[str], room: int, count: Count) -> list[str]:
    """Consecutive paragraphs joined into blocks of at most `room` tokens."""
    result: list[str] = []
    current, used = "", 0
    for text in texts:
        for paragraph in paragraphs(text):
            for piece in _pieces(paragraph, room, count):
                size = count(piece)
                if current and used + size + 2 > room:
                    result.append(current)
                    current, used = "", 0
                current = f"{current}\n{piece}" if current else piece
                used += size + 1
        if current:  # blocks do not cross files
            result.append(current)
            current, used = "", 0
    return result


def build(request: Request) -> list[Concrete]:
    """`samples` blocks of text spread evenly over the files, each of at most the trained context.

    Without files: WikiText-2's test part.
    """
    settings = request.settings
    found = request.rows("wikitext")
    # Blocks of the trained length, also where max_length lets long prompts run past it.
    room = min([request.limit, *settings.lengths, request.trained or request.limit]) - 1
    pieces = blocks([row["text"] for row in found.rows], room, request.count)
    if not pieces:
        raise request.error("files", f"no text in {', '.join(settings.files)}")
    wanted = min(request.samples or len(pieces), len(pieces))
    chosen = [pieces[index * len(pieces) // wanted] for index in range(wanted)]
    prefix = request.count("")
    documents: list[Document] = [
        {
            "id": str(index),
            "text": text,
            "tokens": request.count(text) - prefix,
            "words": len(text.split()),
            "bytes": len(text.encode("utf-8")),
        }
        for index, text in enumerate(chosen)
    ]
    return request.whole(documents, facts=found.facts)
