"""A selector outside the workflow: what it needs is made here, from the base alone.

    rad select kl_guided --base nano:base --budget layers:2 --out placement.json --set tokens=20000

A corpus comes from `--corpus` (a prepared folder), `--text` (plain text files) or, for the nano
models, from their generators. A stage-1 alignment, for the methods that start from one, is trained
once and kept in the work folder, like the corpus.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rad.devices import chosen
from rad.files import digest
from rad.models.sources import describe, load, load_tokenizer
from rad.placement import Budget, Placement, first_error
from rad.selection.base import SelectionContext, SelectionError, head_bytes_of, select
from rad.selection.reuse import alone
from rad.selector_settings import shares_scores
from rad.settings import (
    SELECTOR_SETTINGS,
    AlignmentSettings,
    CorpusSettings,
    ExternalSettings,
    Settings,
    needs_of,
)

NANO_CORPUS = CorpusSettings(
    source="nano", tokens=262144, held_out_tokens=16384, context=128, prompt_weight=0.1, seed=11
)
TEXT_TOKENS, TEXT_CONTEXT = 262144, 256
ALIGNMENT_TOKENS = 131072


def assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """`["tokens=20000", "probe=copy"]` -> settings; raises `SelectionError` on anything else."""
    chosen = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SelectionError(f"--set {pair!r}: expected key=value")
        chosen[key] = yaml.safe_load(value)
    return chosen


def settings_of(method: str, values: Mapping[str, Any]) -> Settings:
    """The checked settings of a method (or of a selector file); raises `SelectionError`."""
    if method.endswith(".py"):
        return ExternalSettings(method=method, settings=dict(values))
    if method not in SELECTOR_SETTINGS:
        raise SelectionError(
            f"unknown selector {method!r}; known: {', '.join(SELECTOR_SETTINGS)}, or the path of a "
            "Python file with a function `select(context)`"
        )
    try:
        return SELECTOR_SETTINGS[method].model_validate({**values, "method": method})
    except ValidationError as error:
        keys = [key for key in SELECTOR_SETTINGS[method].model_fields if key != "method"]
        raise SelectionError(
            f"selector {method}: {first_error(error)}; its keys: {', '.join(keys) or 'none'}"
        ) from error


def run(
    method: str,
    settings: Settings,
    record: Mapping[str, Any],
    budget: Budget,
    *,
    corpus: Path | None = None,
    aligned: Path | None = None,
    mixer: Mapping[str, Any] | None = None,
    state: Path | None = None,
    device: str = "cpu",
) -> Placement:
    """Run a selector on a described base (`models/<name>/source.json`) and check its placement.

    Jobs of one state folder take turns where they have scores to share.
    """
    if state is not None and shares_scores(settings):
        # before the weights are loaded: who waits needs no memory
        with alone(state, _say):
            return _run(method, settings, record, budget, corpus, aligned, mixer, state, device)
    return _run(method, settings, record, budget, corpus, aligned, mixer, state, device)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(
    method: str,
    settings: Settings,
    record: Mapping[str, Any],
    budget: Budget,
    corpus: Path | None,
    aligned: Path | None,
    mixer: Mapping[str, Any] | None,
    state: Path | None,
    device: str,
) -> Placement:
    wanted = needs_of(settings)
    weights: dict[str, Any] = {}
    if "model" in wanted:
        where = {"revision": record["revision"]}
        weights["model"] = load(record["source"], dtype=record["dtype"], **where).to(chosen(device))
        weights["tokenizer"] = load_tokenizer(record["source"], **where)
    context = SelectionContext(
        base=record["name"],
        layers=record["layers"],
        heads=record["heads"],
        kv_heads=record["kv_heads"],
        kv_head_bytes=head_bytes_of(record),
        budget=budget,
        settings=settings,
        corpus=corpus,
        progress=_say,
        provenance={"base_weights_sha256": record["weights_sha256"]},
        resources={
            "aligned": aligned,
            "mixer": mixer,
            "state": state,
        },
        **weights,
    )
    if not method.endswith(".py"):
        return select(context)
    placement: Placement = _load_file(Path(method))(context)
    placement.check_budget(budget)
    return placement


def _load_file(path: Path) -> Any:
    """The function `select` of a Python file; raises `SelectionError`."""
    if not path.is_file():
        raise SelectionError(f"{path}: no such selector file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "select", None)):
        raise SelectionError(f"{path}: has no function `select(context)`")
    return module.select


def prepare(
    method: str,
    settings: Settings,
    base: str,
    *,
    revision: str | None,
    dtype: str,
    corpus: Path | None,
    texts: Sequence[Path],
    mixer: Mapping[str, Any],
    work: Path,
) -> tuple[dict[str, Any], Path | None, Path | None]:
    """(record of the base, corpus folder, alignment folder), made where missing."""
    source = {"source": base, "revision": revision, "dtype": dtype}
    name = base.rstrip("/").rpartition("/")[2].replace(":", "-")
    record = describe(name, source)
    assert record is not None
    wanted = needs_of(settings)
    if corpus is None and ("corpus" in wanted or texts):
        corpus = _corpus(method, record, texts, work)
    aligned = None
    if "aligned" in wanted:
        assert corpus is not None
        aligned = _alignment(record, corpus, mixer, work)
    return record, corpus, aligned


def _corpus(method: str, record: Mapping[str, Any], texts: Sequence[Path], work: Path) -> Path:
    from rad.data.corpus import build

    if texts:
        settings = CorpusSettings(
            source="text",
            files=[str(path) for path in texts],
            tokens=TEXT_TOKENS,
            held_out_tokens=TEXT_TOKENS // 16,
            context=min(TEXT_CONTEXT, record["max_position_embeddings"] or TEXT_CONTEXT),
        )
    elif record["source"].startswith("nano:"):
        settings = NANO_CORPUS
    else:
        raise SelectionError(
            f"selector {method} calibrates on text: name some with --text FILE, or a prepared "
            "corpus with --corpus FOLDER"
        )
    key = digest([settings.model_dump(mode="json"), record["tokenizer_sha256"]])[:12]
    folder = work / f"corpus-{key}"
    if not (folder / "manifest.json").exists():
        tokenizer = load_tokenizer(record["source"], revision=record["revision"])
        build("select", settings, tokenizer, folder, tokenizer_sha256=record["tokenizer_sha256"])
    return folder


def _alignment(
    record: Mapping[str, Any], corpus: Path, mixer: Mapping[str, Any], work: Path
) -> Path:
    from rad.distillation.align import align

    settings = AlignmentSettings(tokens=ALIGNMENT_TOKENS, learning_rate=3e-3)
    key = digest(
        [settings.model_dump(mode="json"), record["weights_sha256"], dict(mixer), str(corpus)]
    )[:12]
    folder = work / f"alignment-{key}"
    if not (folder / "alignment.json").exists():
        align(record, mixer, settings, corpus=corpus, state=work / f"state-{key}", output=folder)
    return folder
