"""Prompts in a tokenizer's chat template, written out as text."""

from __future__ import annotations

from collections.abc import Sequence

from rad.data.chat import ChatTemplate
from rad.data.records import CorpusError
from rad.evaluation.sources import TaskError


class Chat:
    """Writes what a chat model continues; the text brings its own `<s>` where the template has one.

    Raises `TaskError` when the tokenizer has no template and none is named.
    """

    def __init__(self, task: str, tokenizer: str, file: str | None = None) -> None:
        from transformers import AutoTokenizer

        self.task = task
        try:
            loaded = AutoTokenizer.from_pretrained(tokenizer)
            self.template = ChatTemplate(loaded, file)
        except CorpusError as error:
            if file is not None:
                raise TaskError(f"evaluation.{error}") from error
            raise TaskError(
                f"evaluation.tasks.{task}.chat: {tokenizer} has no chat template; name a file in "
                "evaluation.chat_template or set chat: false"
            ) from error
        self.bos = str(loaded.bos_token or "")

    def turns(self, turns: Sequence[str], prefix: str = "") -> str:
        """User and assistant turns by turns, the last a user's; `prefix` begins the answer."""
        messages = [
            {"role": ("user", "assistant")[index % 2], "content": text}
            for index, text in enumerate(turns)
        ]
        where = f"evaluation.tasks.{self.task}.chat"
        try:
            return self.template.prompt(messages, where) + prefix
        except CorpusError as error:
            raise TaskError(str(error)) from error

    def wrap(self, text: str, prefix: str = "") -> str:
        """One user turn."""
        return self.turns([text], prefix)
