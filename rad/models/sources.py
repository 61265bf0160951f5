"""Where models come from: `nano:<size>`, a local checkpoint folder, or a hub id.

`describe` reads the configuration only (no torch) and fails early with one line; `load` reads the
weights. Remote code is never trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from rad.files import digest, file_digest, read_json
from rad.models.hub import HubError, find

NANO_SIZES = ("base", "medium", "large")
# keys that the configuration of a decoder with q/k/v/o attention has
SHAPE_KEYS = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")


class ModelError(ValueError):
    """A model that cannot be used; the message names the model and the remedy."""


def resolve(source: str) -> Path | str:
    """The local folder of a source, or the hub id as it is; raises `ModelError`."""
    if source.startswith("nano:"):
        size = source.removeprefix("nano:")
        if size not in NANO_SIZES:
            raise ModelError(f"model {source!r}: nano has {', '.join(NANO_SIZES)}")
        folder = Path(str(files("rad") / "assets" / "nano" / size))
        if not (folder / "model.safetensors").exists():
            raise ModelError(
                f"model {source!r}: {folder} has no model.safetensors; see docs/nano.md"
            )
        return folder
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"model {source!r}: the folder has no config.json")
        return folder
    # a hub id is `name` or `owner/name`; anything else was meant as a path
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"model {source!r}: no such folder")
    return source


def describe(
    name: str, settings: Mapping[str, Any], *, weights: bool = True, hub: bool = True
) -> dict[str, Any] | None:
    """The record of `models/<name>/source.json`; raises `ModelError`.

    `weights=False` leaves their digest out (it reads every byte of a local checkpoint);
    `hub=False` returns None for a hub id instead of asking the network.
    """
    source = settings["source"]
    path = resolve(source)
    if not isinstance(path, Path) and not hub:
        return None
    try:
        found = find(str(path), settings.get("revision"))
    except HubError as error:
        raise ModelError(str(error)) from error
    if isinstance(path, Path):
        config = read_json(path / "config.json")
        shards = sorted(path.glob("*.safetensors"))
        if not shards:
            raise ModelError(f"model {source!r}: {path} has no *.safetensors file")
        tokenizer = path / "tokenizer.json"
        if not tokenizer.exists():
            raise ModelError(f"model {source!r}: {path} has no tokenizer.json")
        vocabulary = digest(read_json(tokenizer)["model"])
        weights_digest = digest([file_digest(file) for file in shards]) if weights else None
    else:
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(path, revision=settings["revision"]).to_dict()
            vocab = AutoTokenizer.from_pretrained(path, revision=settings["revision"]).get_vocab()
        except OSError as error:
            raise unreachable(source, settings["revision"]) from error
        vocabulary = digest(vocab)
        weights_digest = f"{path}@{found.commit}"
    family = config.get("model_type")
    absent = [key for key in SHAPE_KEYS if key not in config]
    if absent:
        raise ModelError(
            f"model {source!r}: the configuration of a {family!r} model has no {absent[0]}; a "
            "decoder with q/k/v/o attention is needed"
        )
    if config.get("kv_lora_rank") is not None:
        raise ModelError(
            f"model {source!r}: a {family!r} model with latent attention (kv_lora_rank) has no k "
            "and v projections to convert"
        )
    heads = config["num_attention_heads"]
    return {
        "schema": 1,
        "name": name,
        "source": source,
        "path": str(path),
        "revision": settings["revision"],
        "dtype": settings["dtype"],
        "architecture": family,
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "hidden_size": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config.get("max_position_embeddings"),
        "weights_sha256": weights_digest,
        "tokenizer_sha256": vocabulary,
        **found.record(),
    }


def unreachable(source: str, revision: str | None) -> ModelError:
    """What to say of a model that is neither in a folder nor to be had from the hub."""
    at = f" at revision {revision}" if revision else ""
    return ModelError(
        f"model {source!r}: neither a local folder nor reachable on the hub{at}; download it "
        "first, log in if it is gated, or name a folder"
    )


def load(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device_map: str | Mapping[str, str | int] | None = None,
) -> Any:
    """The model of a source, in evaluation mode.

    `device_map` is that of transformers: `auto` lays the layers over all visible GPUs, a mapping
    names a device for every part; it needs accelerate. Default: whole, on the CPU.
    Raises `ModelError` when a file is corrupt, or a tensor is missing, extra or of another shape:
    the library would only warn and go on with random weights. Also when a `device_map` leaves
    weights outside of the devices' memory, to be fetched for every call.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = resolve(source)
    if isinstance(path, Path):
        check_files(source, path)
    placed = {} if device_map is None else {"device_map": _placed(source, device_map)}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            revision=revision,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with one line instead of a table
            **placed,
        )
    except OSError as error:
        raise unreachable(source, revision) from error
    model, found = loaded
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(
            str(name[0] if isinstance(name, tuple) else name)
            for name in found.get(f"{kind}_keys", ())
        )
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(
                f"model {source!r}: the weights have {kind} tensors: {names[0]}{more}; they do not "
                "belong to this config.json"
            )
    outside = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if outside:
        raise ModelError(
            f"model {source!r}: {len(outside)} tensors ({outside[0]} first) do not fit in the "
            f"memory that device_map {device_map!r} has; give it more GPUs or a smaller dtype"
        )
    return model.eval()


def _placed(
    source: str, device_map: str | Mapping[str, str | int]
) -> str | Mapping[str, str | int]:
    """The device map, when the library that lays a model over devices is there."""
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise ModelError(f"model {source!r}: a device_map needs accelerate; pip install accelerate")
    return device_map


def check_files(source: str, folder: Path) -> None:
    """Raise `ModelError` naming a safetensors file that is missing or no such file."""
    from safetensors import SafetensorError, safe_open

    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted = sorted(set(read_json(index)["weight_map"].values()))
        absent = [name for name in wanted if not (folder / name).exists()]
        if absent:
            raise ModelError(f"model {source!r}: {folder / absent[0]} is missing")
    if not shards:
        raise ModelError(f"model {source!r}: {folder} has no *.safetensors file")
    for shard in shards:
        try:
            with safe_open(str(shard), framework="np"):
                pass
        except SafetensorError as error:
            raise ModelError(
                f"model {source!r}: {shard} is corrupt or cut off ({error}); copy it again"
            ) from error


def tokenizer_folder(source: str, *, revision: str | None = None) -> str:
    """The folder with configuration and tokenizer of a source: of a hub id the cached snapshot.

    What is not in the cache is fetched, at this revision. Raises `ModelError`.
    """
    path = resolve(source)
    if isinstance(path, Path):
        return str(path)
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig, AutoTokenizer

    try:
        for part in (AutoConfig, AutoTokenizer):
            part.from_pretrained(path, revision=revision)
    except OSError as error:
        raise unreachable(source, revision) from error
    file = try_to_load_from_cache(path, "config.json", revision=revision)
    if not isinstance(file, str):
        raise unreachable(source, revision)
    return str(Path(file).parent)


def load_tokenizer(source: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a source, padding on the left."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(resolve(source)), revision=revision)
    except OSError as error:
        raise unreachable(source, revision) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
