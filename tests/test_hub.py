"""What is said of models before anything starts: the real library against a small local hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path

import pytest

from rad.models import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {
    "gated": (403, "GatedRepo"),
    "absent": (404, "RepoNotFound"),
    "old": (404, "RevisionNotFound"),
}


class Hub(BaseHTTPRequestHandler):
    """Answers for owner/open, owner/asks (gated, no access), owner/absent and owner/old."""

    def do_GET(self) -> None:
        repository = self.path.split("/revision")[0].split("?")[0].rpartition("/")[2]
        if self.path.endswith("/auth-check"):
            return self.answer(*REFUSALS["gated"])
        if repository in REFUSALS:
            return self.answer(*REFUSALS[repository])
        body = {
            "id": f"owner/{repository}",
            "sha": COMMIT,
            "gated": "manual" if repository == "asks" else False,
            "cardData": {"license": "apache-2.0"},
        }
        return self.answer(200, None, json.dumps(body))

    def answer(self, status: int, code: str | None, body: str = "{}") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *unused: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def asked(source: str, endpoint: str, tmp_path: Path, **options: str) -> str:
    """What `find` says in a process whose hub is `endpoint` and whose cache is empty."""
    code = (
        "import sys\nfrom rad.models import hub\n"
        "try: print(hub.find(*sys.argv[1:]))\n"
        "except hub.HubError as error: print('refused:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, *options.pop("arguments", "").split()],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), **options},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_an_open_model_is_found_with_its_commit_and_licence(endpoint: str, tmp_path: Path) -> None:
    found = asked("owner/open", endpoint, tmp_path)
    assert f"where='hub', commit='{COMMIT}', licence='apache-2.0', gated=False" in found


@pytest.mark.parametrize(
    ("source", "arguments", "wanted"),
    [
        ("owner/gated", "", "is gated: accept its licence on its page, then run `hf auth login`"),
        ("owner/asks", "", "and `hf download owner/asks`"),
        ("owner/absent", "", "no such repository, or it is private"),
        ("owner/old", "v9", "no revision 'v9'"),
    ],
)
def test_a_refusal_names_its_remedy(
    source: str, arguments: str, wanted: str, endpoint: str, tmp_path: Path
) -> None:
    said = asked(source, endpoint, tmp_path, arguments=arguments)
    assert said.startswith("refused:") and wanted in said and said.count("\n") == 1


def test_without_a_hub_the_download_is_spelled_out(tmp_path: Path) -> None:
    said = asked("owner/open", "http://127.0.0.1:9", tmp_path, arguments="abc")
    assert "the hub does not answer" in said
    assert "`hf download owner/open --revision abc`" in said


def test_offline_asks_nobody(endpoint: str, tmp_path: Path) -> None:
    said = asked("owner/open", endpoint, tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in said and "`hf download owner/open`" in said


def _snapshot(cache: Path, name: str = "model.safetensors") -> Path:
    repository = cache / "hub" / "models--owner--open"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (folder / name).write_text("")
    return folder


def test_a_cached_model_needs_no_hub(tmp_path: Path) -> None:
    _snapshot(tmp_path)
    found = asked("owner/open", "http://127.0.0.1:9", tmp_path)
    assert f"where='cache', commit='{COMMIT}', licence='mit'" in found


def test_a_pinned_tokenizer_is_read_at_its_revision(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--owner--pinned" / "snapshots" / COMMIT
    nano = Path(str(resources.files("rad") / "assets" / "nano" / "base"))
    shutil.copytree(nano, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    code = (
        "import sys\nfrom rad.models.sources import ModelError, tokenizer_folder\n"
        "for revision in (sys.argv[1], None):\n"
        "    try: print(tokenizer_folder('owner/pinned', revision=revision))\n"
        "    except ModelError as error: print('refused:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, COMMIT],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    pinned, newest = done.stdout.splitlines()
    assert Path(pinned) == folder
    # the cache has no newest one
    assert newest.startswith("refused:") and "owner/pinned" in newest


def test_a_cache_without_weights_is_refused_offline(tmp_path: Path) -> None:
    folder = _snapshot(tmp_path, "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = asked("owner/open", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert "the cache lacks model-00002" in said and "`hf download owner/open`" in said


def test_a_folder_of_another_revision_is_refused(tmp_path: Path) -> None:
    stamp = tmp_path / ".cache" / "huggingface" / "download" / "config.json.metadata"
    stamp.parent.mkdir(parents=True)
    stamp.write_text(f"{COMMIT}\netag\n0\n")
    assert hub.find(str(tmp_path), COMMIT[:8]).commit == COMMIT
    with pytest.raises(hub.HubError, match=f"is of revision {COMMIT}, the study wants ffff"):
        hub.find(str(tmp_path), "ffff")


def test_the_licence_of_a_folder(tmp_path: Path) -> None:
    assert hub.licence_of(tmp_path) is None
    (tmp_path / "LICENSE").write_text("\n  MIT License\n\nCopyright\n")
    assert hub.licence_of(tmp_path) == "MIT License"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.2\n---\n")
    assert hub.licence_of(tmp_path) == "llama3.2"


def test_a_check_names_every_fault_and_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rad.cli import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    study = Path(__file__).parents[1] / "config" / "rad_llama3.2_3b.yaml"
    assert main(["check", str(study), "--offline"]) == 2
    said = capsys.readouterr().err
    for name in ("models.base", "models.llama70b", "corpora.distil"):
        assert f"{name}: " in said
    assert "`hf download meta-llama/Llama-3.1-8B-Instruct --revision 0e9e39f" in said
    assert "hf download JunxiongWang/sftdatasetv3 --repo-type dataset --revision" in said
