"""Small models and corpora that the selection tests share."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 4, 2, 8, 64


def nano_record() -> dict[str, Any]:
    """The description of the nano base; skips where it is not shipped."""
    from rad.models import sources

    settings = {"source": "nano:base", "revision": None, "dtype": "float32"}
    try:
        record = sources.describe("base", settings)
    except sources.ModelError as error:
        pytest.skip(str(error))
    assert record is not None
    return record


@functools.cache
def random_llama(layers: int = LAYERS, seed: int = 0, bias: bool = False) -> Any:
    """A random Llama whose weights are large enough for its layers to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        attention_bias=bias,
        initializer_range=0.12,
    )
    return LlamaForCausalLM(config).eval()


@functools.cache
def random_qwen3() -> Any:
    """A random Qwen3: the same projections, with normalised queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        initializer_range=0.12,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def stories() -> tuple[Any, Any]:
    """The trained stories260K model and its tokenizer; skips the test where it is not there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("RAD_SHARED", default)) / "models" / "stories260K-hf"
    if not folder.exists():
        pytest.skip(f"no trained model at {folder}")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def write_corpus(folder: Path, rows: np.ndarray[Any, Any]) -> Path:
    """A corpus folder holding `rows` (rows, context), as `docs/contracts.md` has it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows.astype("<u2").tofile(folder / "train.bin")
    splits = {"train": {"rows": len(rows)}}
    manifest = {"schema": 1, "context": rows.shape[1], "dtype": "<u2", "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def random_rows(count: int, context: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random token rows of the small vocabulary, without the special ids 0-2."""
    return np.random.default_rng(seed).integers(3, VOCABULARY, size=(count, context))
