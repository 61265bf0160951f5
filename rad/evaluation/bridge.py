"""lm-eval's `HFLM` over a loaded model: always greedy, one `<s>`, never truncating."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

if TYPE_CHECKING:
    import torch
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TruncationError(ValueError):
    """A prompt and its answer do not fit into the context."""


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a generation: the checkpoint's and the tokenizer's end of text."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None})


class HarnessModel(HFLM):  # type: ignore[misc]
    """lm-eval's view of `model`; `max_length` is the longest prompt plus answer in tokens.

    Raises `TruncationError` where `HFLM` would cut a prompt. Neither the model's generation
    settings nor the tokenizer are changed.
    """

    add_bos_token: bool | None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # HFLM sets its padding
            max_length=max_length,
            batch_size=batch_size,
        )

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is not None:
            self._check(tokens.shape[1], self.max_length - left_truncate_len)
        return tokens, mask

    def _check(self, prompt: int, answer: int) -> None:
        if prompt + answer > self.max_length:
            raise TruncationError(
                f"a prompt of {prompt} tokens needs {prompt + answer} tokens with its answer, but "
                f"the limit is {self.max_length}: raise evaluation.max_length or shorten the task"
            )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        # HFLM asserts that an answer alone fits
        self._check(1, max((item.args[1]["max_gen_toks"] for item in requests), default=0))
        shipped = self.model.generation_config
        # Checkpoints ship sampling settings, penalties and lengths; transformers takes from there
        # whatever a call leaves open, and HFLM names only some.
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=stop_ids(self.model, self.tokenizer) or None
        )
        try:
            answers: list[str] = super().generate_until(requests, disable_tqdm)
        finally:
            self.model.generation_config = shipped
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        # HFLM puts `<s>` in front itself; a second one from the tokenizer would be scored
        self.add_bos_token = False
        try:
            values: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = None
        return values
