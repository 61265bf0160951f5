"""Conversations written out by a chat template, with the tokens of the answers marked.

    header [content end-of-turn] header [content end-of-turn] ...      [ ]: answers weigh 1

What a template writes must not depend on the day: `strftime_now`, which published templates ask
for today's date, tells one fixed date here.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from rad.data.records import CorpusError

_DATE = datetime.datetime(2024, 7, 26)  # what Llama 3.1's template says when told no date
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {"human": "user", "gpt": "assistant"}  # names of the ShareGPT layout
Message = dict[str, str]


class ChatTemplate:
    """Writes conversations as tokens; made for one tokenizer and one template."""

    def __init__(self, tokenizer: Any, file: str | None = None) -> None:
        if file is not None and not Path(file).is_file():
            raise CorpusError(f"chat_template: no such file: {file}")
        template = tokenizer.chat_template
        if file is not None:
            template = Path(file).read_text(encoding="utf-8")
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise CorpusError(
                "the tokenizer has no chat template; name a file with one in `chat_template`"
            )
        self.tokenizer, self.template = tokenizer, _undated(str(template))
        self.special = set(tokenizer.all_special_ids)

    def encode(self, value: Any, where: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Token ids (T,) of a conversation and which belong to answers (T,), end of turn included.

        A template that marks answers by `{% generation %}` decides itself; else an answer starts
        where the prompt for it ends and lasts until its content and end-of-turn token are written.
        Raises `CorpusError` where the value is no conversation or the template cannot be followed.
        """
        messages = conversation(value, where)
        if _GENERATION.search(self.template):
            coded = self._apply(
                messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return np.asarray(coded["input_ids"]), np.asarray(coded["assistant_masks"], dtype=bool)
        text = self._apply(messages, where)
        coded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = np.asarray(coded["input_ids"], dtype=np.int64)
        starts, ends = np.asarray(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        answer = np.zeros(len(ids), dtype=bool)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin, end = self._span(messages, turn, text, where)
            answer |= (ends > begin) & (starts < end)
            after = int(np.searchsorted(starts, end))
            if after < len(ids) and int(ids[after]) in self.special:
                answer[after] = True
        return ids, answer

    def prompt(self, messages: list[Message], where: str) -> str:
        """The text before the assistant's next answer; raises `CorpusError` if it is refused."""
        return str(self._apply(messages, where, add_generation_prompt=True))

    def _span(self, messages: list[Message], turn: int, text: str, where: str) -> tuple[int, int]:
        """Characters of `text` that answer number `turn` takes: from its prompt to its content."""
        prompt = self._apply(messages[:turn], where, add_generation_prompt=True)
        content = messages[turn]["content"].strip()
        at = text.find(content, len(prompt)) if text.startswith(prompt) else -1
        if at < 0:
            raise CorpusError(
                f"{where}: the chat template writes turn {turn + 1} differently within the whole "
                "conversation; name a template that has {% generation %} marks in `chat_template`"
            )
        return len(prompt), at + len(content)

    def _apply(self, messages: list[Message], where: str, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                **{"tokenize": False, **options},
            )
        except (TemplateError, TypeError) as error:
            raise CorpusError(f"{where}: the chat template refuses it ({error})") from error


def conversation(value: Any, where: str) -> list[Message]:
    """The messages of a record, as role and content; the ShareGPT names are understood too."""
    messages = []
    for message in value if isinstance(value, list) else []:
        if not isinstance(message, Mapping):
            break
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            break
        messages.append({"role": _ROLES.get(role, role), "content": content})
    else:
        if messages:
            return messages
    raise CorpusError(
        f'{where}: no conversation: a list of {{"role": ..., "content": text}} is expected'
    )


def _undated(template: str) -> str:
    """The template with `strftime_now` defined within it, which hides the library's."""
    if "strftime_now" not in template:
        return template
    codes = {f"%{code}": _DATE.strftime(f"%{code}") for code in "aAbBdjmyYHIMSpcxXZ"}
    filters = "".join(f" | replace('{code}', '{value}')" for code, value in codes.items())
    # the empty expression at the end keeps a line feed that the template may begin with
    date = "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}{{ '' }}"
    return date + template
