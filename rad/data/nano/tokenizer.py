"""The one nano tokenizer: byte-level BPE, 512 tokens, single digits."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 512
SPECIALS: tuple[str, str, str] = ("<pad>", "<s>", "</s>")
MODEL_MAX_LENGTH = 512
# One digit; a word with its leading space; punctuation up to the space of the next word; the rest.
_PIECES = r"\p{N}| ?\p{L}+|[^\p{L}\p{N}]+(?= \p{L})|[^\p{L}\p{N}]+"
# A prompt of crux_nano ends here, so no token may cross it.
_BOUNDARY = " == "


def asset_folder() -> Path:
    """Folder of the packaged nano checkpoints."""
    return Path(str(resources.files("rad"))) / "assets" / "nano"


@functools.cache
def _backend() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(asset_folder() / "base" / "tokenizer.json"))


@functools.lru_cache(maxsize=65536)
def token_length(text: str) -> int:
    """Number of tokens of `text`, without specials."""
    return len(_backend().encode(text, add_special_tokens=False).ids)


def load() -> PreTrainedTokenizerFast:
    """The packaged tokenizer."""
    from transformers import PreTrainedTokenizerFast

    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        str(asset_folder() / "base")
    )
    return loaded


def build(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `documents`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_BOUNDARY, "isolated"),
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    pad, bos, eos = SPECIALS
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A $B",
        special_tokens=[(bos, backend.token_to_id(bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def train(path: str | Path, *, seed: int = 0, documents: int = 20_000) -> None:
    """Train on the nano mixture and save the tokenizer files in the folder `path`.

    The packaged tokenizer was made in this way before the words of `cwe` were balanced: one of
    its 512 tokens is another one now. Checkpoints need the packaged one.
    """
    import itertools

    from rad.data.nano.mixture import training_documents

    # The tokenizer does not exist yet, so contexts are measured in words.
    stream = training_documents(
        seed,
        top_share=0.0,
        trace="end",
        length=lambda text: len(text.split()) + text.count(";"),
    )
    texts = [example.text for example in itertools.islice(stream, documents)]
    Path(path).mkdir(parents=True, exist_ok=True)
    build(texts).save_pretrained(str(path))
