"""Converting from files to files: what `rad convert` and `rad inspect` do, and `rad.convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rad.files import new_folder, write_json
from rad.models import sources
from rad.models.convert import convert
from rad.models.summary import load_shape, summarise, tree
from rad.placement import Placement, first_error
from rad.settings import MIXER_SETTINGS


def mixer_settings(name: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of mixer `name` with `changes`; raises `ValueError` naming the key."""
    if name not in MIXER_SETTINGS:
        raise ValueError(f"unknown mixer {name!r}; known: {', '.join(MIXER_SETTINGS)}")
    try:
        return MIXER_SETTINGS[name](**(changes or {})).model_dump(mode="json")
    except ValidationError as error:
        raise ValueError(f"mixer {name}: {first_error(error)}") from error


def convert_files(
    base: str,
    placement: Placement | Path | str,
    *,
    mixer: str = "mamba2",
    initialisation: str = "qkvo",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    aligned: Path | None = None,
    revision: str | None = None,
    dtype: str = "float32",
) -> Any:
    """The hybrid of a base given by name: a folder, a hub id or `nano:NAME`.

    `placement` is a `Placement` or the path of a `placement.json`. Raises `ValueError` with one
    line on a bad placement, mixer or checkpoint.
    """
    chosen = mixer_settings(mixer, settings)
    if not isinstance(placement, Placement):
        placement = Placement.load(Path(placement))
    model = sources.load(base, revision=revision, dtype=dtype)
    return convert(model, placement, chosen, initialisation, seed=seed, aligned=aligned)


def convert_to_folder(base: str, placement: Path, out: Path, **options: Any) -> str:
    """Convert and write a checkpoint folder, all of it or nothing; returns the tree to print.

    The folder gets the tokenizer, the placement and `conversion.json` (what was asked for). Raises
    `ValueError` when `out` exists and is not empty.
    """
    with new_folder(out) as temporary:
        loaded = Placement.load(placement)
        hybrid = convert_files(base, loaded, **options)
        tokenizer = sources.load_tokenizer(base, revision=options.get("revision"))
        shape = load_shape(str(sources.resolve(base)), options.get("revision"), hybrid.dtype)
        before, after = summarise(shape), summarise(hybrid)
        tokenizer.save_pretrained(temporary)
        hybrid.save_pretrained(temporary)
        loaded.save(temporary / "placement.json")
        asked = {key: value for key, value in options.items() if key != "aligned"}
        aligned = options.get("aligned")
        write_json(
            temporary / "conversion.json",
            {
                "schema": 1,
                "base": base,
                **asked,
                "aligned": None if aligned is None else str(aligned),
                "before": {key: before[key] for key in ("parameters", "kv_bytes_per_token")},
                "summary": after,
            },
        )
    return tree(f"{base} -> {out}", after, before)


def inspect(folder: Path) -> str:
    """The tree of a checkpoint folder; reads the configuration and the tensors' names and shapes.

    Raises `ModelError` when the files do not hold the tensors that the configuration asks for.
    """
    from safetensors import safe_open

    path = sources.resolve(str(folder))
    if not isinstance(path, Path):
        raise sources.ModelError(f"{folder}: no such folder")
    sources.check_files(str(folder), path)
    model = load_shape(path)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    found: dict[str, tuple[int, ...]] = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(str(shard), framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                found[name] = tuple(tensors.get_slice(name).get_shape())
    for kind, names in (
        ("missing", wanted.keys() - found.keys()),
        ("unexpected", found.keys() - wanted.keys() - {"lm_head.weight"}),
        (
            "misshapen",
            {name for name in wanted.keys() & found.keys() if wanted[name] != found[name]},
        ),
    ):
        if names:
            raise sources.ModelError(f"{folder}: the weights have {kind} tensors: {min(names)}")
    return tree(str(folder), summarise(model))
