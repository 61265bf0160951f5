"""Where a checkpoint or a data set is before anything starts: folder, cache or hub.

Every fault is one line that ends in the command that mends it. Nothing is downloaded here.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Kind = Literal["model", "dataset"]
TIMEOUT = 10.0  # seconds for an answer of the hub
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRUE = ("1", "ON", "YES", "TRUE")


class HubError(ValueError):
    """A repository that cannot be used as it is; the message names the remedy."""


@dataclass(frozen=True)
class Found:
    """A repository that can be used. `commit` is None where a folder does not say it."""

    source: str
    where: Literal["folder", "cache", "hub"]
    commit: str | None
    licence: str | None
    gated: bool

    def record(self) -> dict[str, Any]:
        """What goes into the description of a model."""
        return {key: value for key, value in asdict(self).items() if key != "source"}


def offline(*variables: str) -> bool:
    """Whether the environment forbids asking the hub; `variables`: default HF_HUB_OFFLINE."""
    names = variables or ("HF_HUB_OFFLINE",)
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def _command(source: str, revision: str | None, kind: Kind, folder: Path | None = None) -> str:
    parts = ["hf download", source]
    if kind == "dataset":
        parts.append("--repo-type dataset")
    if revision:
        parts.append(f"--revision {revision}")
    if folder is not None:
        parts.append(f"--local-dir {folder}")
    return f"`{' '.join(parts)}`"


# --- folders --------------------------------------------------------------------------------


def licence_of(folder: Path) -> str | None:
    """The licence that a folder's model card states, or the first line of its licence file."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        for key in ("license_name", "license"):
            stated = head and re.search(rf"^{key}:\s*(\S.*)$", head.group(1), re.MULTILINE)
            if stated:
                return stated.group(1).strip()
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8", errors="replace").split("\n")
            return next((line.strip(" #") for line in lines if line.strip()), None)
    return None


def commit_of(folder: Path) -> str | None:
    """The hub commit that a folder is of, where its place in the cache or its download says so."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    stamp = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if stamp.is_file():
        first = stamp.read_text(encoding="utf-8").split("\n")[0].strip()
        return first if _COMMIT.fullmatch(first) else None
    return None


def in_folder(source: str, folder: Path, revision: str | None) -> Found:
    """A local folder; raises `HubError` when it says that it is another commit than `revision`."""
    commit = commit_of(folder)
    if revision and commit and not commit.startswith(revision):
        raise HubError(
            f"{source!r}: the folder is of revision {commit}, the study wants {revision}; run "
            f"{_command('REPOSITORY', revision, 'model', folder)} or change `revision`"
        )
    return Found(source, "folder", commit, licence_of(folder), gated=False)


# --- the cache ------------------------------------------------------------------------------


def _weights(snapshot: Path) -> list[str]:
    """Weight files that a snapshot must have, by its index if it has one."""
    index = snapshot / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        return sorted(set(content["weight_map"].values()))
    return ["model.safetensors"]


def in_cache(source: str, revision: str | None, kind: Kind = "model") -> Found | None:
    """The cached snapshot at this revision; None when there is none.

    Raises `HubError` when weights of a cached model are missing: loading it would ask the network.
    """
    from huggingface_hub import try_to_load_from_cache

    probe = "config.json" if kind == "model" else "README.md"
    file = try_to_load_from_cache(source, probe, revision=revision, repo_type=kind)
    if not isinstance(file, str):
        return None
    snapshot = Path(file).parent
    missing = (
        [name for name in _weights(snapshot) if not (snapshot / name).is_file()]
        if kind == "model"
        else []
    )
    if missing:
        if not offline():
            return None
        raise HubError(
            f"{source!r}: the cache lacks {missing[0]} and {len(missing) - 1} more; "
            f"run {_command(source, revision, kind)}"
        )
    return Found(source, "cache", snapshot.name, licence_of(snapshot), gated=False)


# --- the hub --------------------------------------------------------------------------------


def _ask(api: HfApi, source: str, revision: str | None, kind: Kind) -> Any:
    """The hub's description of a repository; raises `HubError` saying what is wrong with it."""
    from huggingface_hub import errors

    what = f"{kind} {source!r}"
    at = f" at revision {revision}" if revision else ""
    ask = api.model_info if kind == "model" else api.dataset_info
    try:
        info = ask(source, revision=revision, timeout=TIMEOUT)
        if info.gated:
            api.auth_check(source, repo_type=kind)
    except errors.GatedRepoError as error:
        raise HubError(
            f"{what} is gated: accept its licence on its page, then run `hf auth login` and "
            f"{_command(source, revision, kind)}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{what} has no revision {revision!r}; leave `revision` out for the newest, or look up "
            f"the commit: `hf models info {source}`"
            if kind == "model"
            else f"{what} has no revision {revision!r}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{what}: the hub has no such repository, or it is private: correct the name, or run "
            "`hf auth login`"
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise HubError(
            f"{what}{at} is neither in a folder nor in the cache, and the hub does not answer; "
            f"where there is a network run {_command(source, revision, kind)}, or name a folder"
        ) from error
    return info


def on_hub(source: str, revision: str | None, kind: Kind = "model") -> Found:
    """A repository of the hub that this account may read; raises `HubError`."""
    from huggingface_hub import HfApi

    info = _ask(HfApi(), source, revision, kind)
    card = info.card_data or {}
    return Found(
        source, "hub", info.sha, card.get("license_name") or card.get("license"), bool(info.gated)
    )


def find(source: str, revision: str | None = None, kind: Kind = "model") -> Found:
    """Where a source can be had: its folder, else the cache, else the hub.

    `revision` is a commit, branch or tag. Raises `HubError` with one line: of the wrong revision,
    missing, gated, or out of reach, and the command that would mend it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return in_folder(source, folder, revision)
    cached = in_cache(source, revision, kind)
    if cached is not None:
        return cached
    if offline():
        raise HubError(
            f"{kind} {source!r} is not in the cache and HF_HUB_OFFLINE forbids the hub; where "
            f"there is a network run {_command(source, revision, kind)}"
        )
    return on_hub(source, revision, kind)
