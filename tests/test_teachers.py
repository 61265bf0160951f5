"""Stored teacher outputs against the live teacher: exactness, bias, resume, and every refusal."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_fixture import base_model
from torch import Tensor

from rad.data.corpus import Corpus
from rad.distillation import losses, teacher_outputs
from rad.distillation.encoding import draw
from rad.distillation.stored import StoredError, StoredOutputs
from rad.distillation.targets import LogitHead, Targets
from rad.distillation.teacher_outputs import write_outputs
from rad.distillation.teachers import LiveTeacher, StoredTeacher
from rad.files import read_json, write_json

CONTEXT, ROWS, HELD_OUT, V = 12, 11, 3, 96
KINDS = {"hidden": None, "top_k": 5, "sampled": 20}


def make_corpus(folder: Path, seed: int = 0, isolate: bool = False, same: int = 0) -> Corpus:
    """Random rows in the format of the contract; `same`: so many times one row instead."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    splits = {"train": same or ROWS, "held_out": HELD_OUT}
    for split, rows in splits.items():
        tokens = generator.integers(4, V, (1 if same else rows, CONTEXT)).astype("<u2")
        np.broadcast_to(tokens, (rows, CONTEXT)).tofile(folder / f"{split}.bin")
        boundaries = np.zeros((rows, CONTEXT), dtype=np.uint8)
        boundaries[:, [0, 5]] = 1
        boundaries[:, -2:] = 2
        boundaries.tofile(folder / f"{split}_boundary.bin")
    write_json(
        folder / "manifest.json",
        {
            "context": CONTEXT,
            "dtype": "<u2",
            "packing": "isolate" if isolate else "concatenate",
            "vocab_size": V - 2,
            "tokenizer_sha256": "tokenizer",
            "splits": {split: {"rows": rows} for split, rows in splits.items()},
        },
    )
    return Corpus(folder)


@pytest.fixture(scope="module")
def model() -> Any:
    """A teacher with a head of its own."""
    return base_model(seed=5, tie_word_embeddings=False)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus")


def write(model: Any, corpus: Corpus, out: Path, kind: str = "hidden", **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "k": KINDS.get(kind),
        "teacher_sha256": "teacher",
        "tokenizer_sha256": "tokenizer",
        "batch_size": 2,
        "shard_bytes": 4000,
    }
    return write_outputs(model, corpus.folder, out, kind, **(settings | changes))


def read(out: Path, corpus: Corpus, **changes: Any) -> StoredTeacher:
    settings: dict[str, Any] = {
        "vocab_size": V,
        "teacher_sha256": "teacher",
        "tokenizer_sha256": "tokenizer",
    }
    return StoredTeacher(out, corpus, **(settings | changes))


def batch(corpus: Corpus, rows: list[int], split: str = "train") -> Tensor:
    return torch.from_numpy(corpus.rows(split)[rows].astype(np.int64))


def loss(targets: Targets, kind: Any = "forward_kl", **options: Any) -> tuple[float, Tensor]:
    """A student's loss and the gradient of its hidden states."""
    torch.manual_seed(1)
    head = LogitHead(torch.randn(V, 32) / 3)
    hidden = torch.randn(*targets.shape, 32, requires_grad=True)
    weight = torch.rand(targets.shape)
    value = losses.distillation_loss(hidden, head, targets, weight, kind=kind, **options)
    (gradient,) = torch.autograd.grad(value, [hidden])
    return value.item(), gradient


# --- hidden states --------------------------------------------------------------------------


def test_stored_hidden_states_are_the_live_teachers(
    model: Any, corpus: Corpus, tmp_path: Path
) -> None:
    manifest = write(model, corpus, tmp_path / "out")
    assert manifest["bytes_per_token"] == pytest.approx(32 * 4, rel=0.3)  # and file headers
    assert manifest["loss"]["kl"] == 0.0
    assert len(manifest["shards"]["train"]) == 6
    stored, live = read(tmp_path / "out", corpus), LiveTeacher(model)
    assert stored.vocabulary == live.vocabulary == V
    for split, rows in (("train", [9, 0, 4]), ("held_out", [2, 1])):
        tokens = batch(corpus, rows, split)
        mine = stored.targets(tokens, torch.tensor(rows), split=split)
        theirs = live.targets(tokens, rows, split=split)
        assert mine.kind == theirs.kind == "hidden"
        assert mine.hidden is not None and theirs.hidden is not None
        torch.testing.assert_close(mine.hidden, theirs.hidden, atol=1e-6, rtol=1e-6)
        assert mine.head is not None and theirs.head is not None
        assert torch.equal(mine.head.weight, theirs.head.weight)
        assert loss(mine)[0] == pytest.approx(loss(theirs)[0], abs=1e-6)
    # in batches like those that were stored, bit for bit
    tokens = batch(corpus, [4, 5])
    mine, theirs = stored.targets(tokens, [4, 5]), live.targets(tokens)
    assert mine.hidden is not None and theirs.hidden is not None
    assert torch.equal(mine.hidden, theirs.hidden)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_hidden_states_report_what_they_lose(
    model: Any, corpus: Corpus, tmp_path: Path, dtype: str
) -> None:
    manifest = write(model, corpus, tmp_path / "out", dtype=dtype)
    stored, live = read(tmp_path / "out", corpus), LiveTeacher(model)
    tokens = batch(corpus, list(range(ROWS)))
    found = stored.targets(tokens, range(ROWS)).hidden
    exact = live.targets(tokens).hidden
    assert found is not None and exact is not None
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, exact.to(found.dtype))
    p = model.lm_head(exact).log_softmax(-1)
    q = model.lm_head(found.float()).log_softmax(-1)
    held_out = batch(corpus, list(range(HELD_OUT)), "held_out")
    exact = live.targets(held_out).hidden
    assert exact is not None
    more_p = model.lm_head(exact).log_softmax(-1)
    more_q = model.lm_head(exact.to(found.dtype).float()).log_softmax(-1)
    p, q = torch.cat([p, more_p]), torch.cat([q, more_q])
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert manifest["loss"]["kl"] == pytest.approx(expected, rel=0.05, abs=1e-7)
    assert manifest["bytes_per_token"] < 32 * 2 * 1.5


def test_isolated_documents_are_stored_as_if_alone(model: Any, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", isolate=True)
    write(model, corpus, tmp_path / "out")
    rows = [1, 7]
    tokens = batch(corpus, rows)
    boundaries = torch.from_numpy(np.array(corpus.boundaries("train")[rows]))
    stored = read(tmp_path / "out", corpus).targets(tokens, rows, boundaries=boundaries).hidden
    live = LiveTeacher(model).targets(tokens, rows, boundaries=boundaries).hidden
    alone = model.model(tokens[:1, 5:10]).last_hidden_state
    assert stored is not None and live is not None
    torch.testing.assert_close(stored, live, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stored[:1, 5:10], alone, atol=1e-5, rtol=1e-5)


# --- top-k ----------------------------------------------------------------------------------


def _probabilities(model: Any, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        p: Tensor = (model(tokens).logits / temperature).softmax(-1)
        return p


def test_top_k_are_the_most_likely_tokens_and_the_loss_is_measured(
    model: Any, corpus: Corpus, tmp_path: Path
) -> None:
    manifest = write(model, corpus, tmp_path / "out", "top_k", dtype="float32", temperature=2.0)
    tokens = batch(corpus, list(range(ROWS)))
    found = read(tmp_path / "out", corpus).targets(tokens, range(ROWS))
    p = _probabilities(model, tokens, 2.0)
    best, ids = p.topk(5, dim=-1)
    assert found.ids is not None and found.log_probs is not None
    assert torch.equal(found.ids, ids)
    assert found.temperature == 2.0
    torch.testing.assert_close(found.log_probs, best.log(), atol=1e-5, rtol=1e-5)
    held_out = _probabilities(model, batch(corpus, list(range(HELD_OUT)), "held_out"), 2.0)
    p = torch.cat([p, held_out]).double()
    best, ids = p.topk(5, dim=-1)
    missing = 1 - best.sum(-1, keepdim=True)
    stored = (missing / (V - 5)).expand_as(p).scatter(-1, ids, best)
    expected = (p * (p / stored).log()).sum(-1).mean().item()
    assert manifest["loss"]["kl"] == pytest.approx(expected, rel=1e-4)
    assert manifest["loss"]["missing_mass"] == pytest.approx(missing.mean().item(), rel=1e-4)


def test_all_of_the_vocabulary_loses_nothing(model: Any, corpus: Corpus, tmp_path: Path) -> None:
    manifest = write(model, corpus, tmp_path / "out", "top_k", k=V, dtype="float32")
    assert manifest["loss"]["kl"] == pytest.approx(0, abs=1e-5)
    tokens = batch(corpus, [0, 1])
    stored, live = read(tmp_path / "out", corpus), LiveTeacher(model)
    for kind in ("forward_kl", "reverse_kl"):
        found, gradient = loss(stored.targets(tokens, [0, 1]), kind)
        expected, wanted = loss(live.targets(tokens), kind)
        assert found == pytest.approx(expected, abs=1e-5)
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


# --- random sampling ------------------------------------------------------------------------


def test_sampled_targets_estimate_the_cross_entropy_without_bias(
    model: Any, tmp_path: Path
) -> None:
    """Means of loss and gradient over independent draws against the exact ones, as z scores."""
    draws = 200
    corpus = make_corpus(tmp_path / "corpus", same=draws)  # one row again and again
    tokens = batch(corpus, [0])
    exact, wanted = loss(LiveTeacher(model).targets(tokens))
    write(model, corpus, tmp_path / "out", "sampled", k=6, batch_size=20, shard_bytes=2**20)
    stored = read(tmp_path / "out", corpus)
    found = [loss(stored.targets(tokens, [row])) for row in range(draws)]
    errors = np.array([value for value, _ in found]) - exact
    assert errors.std() > 0.01  # the draws do differ
    assert abs(errors.mean()) < 4 * errors.std(ddof=1) / math.sqrt(draws)
    gradients = torch.stack([gradient for _, gradient in found])[:, :, :-1]
    z = (gradients.mean(0) - wanted[:, :-1]) / (gradients.std(0) / math.sqrt(draws))
    # of standard normal values: the mean square is 1, the mean 0
    assert z.square().mean().item() == pytest.approx(1.0, abs=0.25)
    assert abs(z.mean().item()) < 0.15


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    uniform = torch.rand((1, n), generator=generator, dtype=torch.float64)
    found = draw(p.log().unsqueeze(0), uniform).flatten().bincount(minlength=6).double()
    assert found[1] == found[5] == 0
    likely = p > 0
    expected = n * p[likely].double()
    chi_square = ((found[likely] - expected).square() / expected).sum().item()
    assert chi_square < 16.3  # 99.9 % of chi square with 3 degrees of freedom
    edge = torch.tensor([[0.0, 1.0 - 2**-53]], dtype=torch.float64)
    assert draw(p.log().unsqueeze(0), edge).tolist() == [[0, 4]]


def test_sampled_manifest_reports_an_error_within_its_standard_error(
    model: Any, corpus: Corpus, tmp_path: Path
) -> None:
    manifest = write(model, corpus, tmp_path / "out", "sampled", k=50)
    measured = manifest["loss"]
    assert 0 < measured["standard_error"] < 0.1
    assert abs(measured["kl"]) < 4 * measured["standard_error"]
    assert measured["measured_tokens"] == (ROWS + HELD_OUT) * CONTEXT
    found = read(tmp_path / "out", corpus).targets(batch(corpus, [3, 8]), [3, 8])
    assert found.ids is not None and found.weights is not None and found.entropy is not None
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, CONTEXT))
    p = _probabilities(model, batch(corpus, [3, 8]))
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(-1), atol=1e-4, rtol=1e-4)
    drawn = (found.weights > 0).sum(-1)
    assert int(drawn.max()) == found.ids.shape[-1]  # padded to the longest, no further
    assert manifest["bytes_per_token"] < 50 * 3


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_does_not_depend_on_shards(
    model: Any, corpus: Corpus, tmp_path: Path, kind: str
) -> None:
    write(model, corpus, tmp_path / "one", kind, shard_bytes=2**20)
    write(model, corpus, tmp_path / "many", kind, shard_bytes=1)
    rows = [10, 3, 0]
    tokens = batch(corpus, rows)
    one = read(tmp_path / "one", corpus).targets(tokens, rows)
    many = read(tmp_path / "many", corpus).targets(tokens, rows)
    for name in ("hidden", "ids", "log_probs", "weights", "entropy"):
        first, second = getattr(one, name), getattr(many, name)
        if first is not None:
            torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


# --- writing again, interrupted, on a full disk ---------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_job_goes_on_where_it_stopped(
    model: Any, corpus: Corpus, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(model, corpus, tmp_path / "whole", kind, shard_bytes=1000)
    out = tmp_path / "out"
    save, calls = teacher_outputs._save, 0
    array_names = _files([whole["shards"]["train"][0]])

    def full(path: Path, array: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2 * len(array_names) + 1:  # in the middle of the third shard
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(path, array)

    monkeypatch.setattr(teacher_outputs, "_save", full)
    with pytest.raises(StoredError, match="No space left on device; the shards written so far"):
        write(model, corpus, out, kind, shard_bytes=1000)
    monkeypatch.setattr(teacher_outputs, "_save", save)
    with pytest.raises(StoredError, match="incomplete; run the command"):
        StoredOutputs(out)
    done = [read_json(path) for path in out.glob("*-*.json")]
    assert len(done) == 2
    times = {file["name"]: (out / file["name"]).stat().st_mtime_ns for file in _files(done)}
    manifest = write(model, corpus, out, kind, shard_bytes=1000)
    assert manifest == whole
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
    assert not list(out.glob(".*"))  # no temporary file is left behind


def _files(shards: list[Any]) -> list[Any]:
    return [file for shard in shards for file in shard["files"].values()]


def test_a_removed_shard_alone_is_written_again(model: Any, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = write(model, corpus, out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    (out / "train-00002.hidden.npy").unlink()
    assert write(model, corpus, out) == manifest
    changed = {
        path.name for path in out.glob("*.npy") if path.stat().st_mtime_ns != times[path.name]
    }
    assert changed == {"train-00002.hidden.npy", "train-00002.check.npy"}
    StoredOutputs(out, verify=True)


def test_other_settings_do_not_overwrite(model: Any, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(model, corpus, out)
    with pytest.raises(StoredError, match="another kind; remove it"):
        write(model, corpus, out, "top_k")
    with pytest.raises(StoredError, match="another teacher_sha256; remove it"):
        write(model, corpus, out, teacher_sha256="other")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "notes.txt").write_text("mine")
    with pytest.raises(StoredError, match="holds other files"):
        write(model, corpus, tmp_path / "files")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("logits", {}, "kind 'logits'"),
        ("sampled", {"dtype": "float16"}, "sampled stores tokens and counts"),
        ("hidden", {"dtype": "int8"}, "dtype 'int8'"),
        ("hidden", {"k": 4}, "stored whole"),
        ("hidden", {"temperature": 2.0}, "1 for hidden states"),
        ("top_k", {"k": 0}, "top_k needs 1 to 96"),
        ("top_k", {"k": 97}, "top_k needs 1 to 96"),
        ("top_k", {"temperature": 0.0}, "above 0"),
        ("sampled", {"k": 256}, "1 to 255 draws"),
        ("hidden", {"vocabulary": 97}, "97 rows to store and a head of 96"),
        ("hidden", {"vocabulary": 93}, "a vocabulary of 94 tokens, 93 rows"),
        ("hidden", {"tokenizer_sha256": "other"}, "another tokenizer than the teacher's"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    model: Any, corpus: Corpus, tmp_path: Path, kind: str, changes: Any, message: str
) -> None:
    with pytest.raises(StoredError, match=message):
        write(model, corpus, tmp_path / "out", kind, **changes)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_gives_no_numbers_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    broken = base_model(seed=5, tie_word_embeddings=False)
    with torch.no_grad():
        broken.model.embed_tokens.weight[int(corpus.rows("train")[0, 0])] = float("nan")
    with pytest.raises(StoredError, match="a value that is no number for rows 0 to 1 of train"):
        write(broken, corpus, tmp_path / "out")
    with torch.no_grad():
        broken.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match="its logits are no numbers"):
        write(broken, corpus, tmp_path / "out")
    large = base_model(seed=5)
    with torch.no_grad():
        large.model.norm.weight.mul_(1e6)
    with pytest.raises(StoredError, match="too large for float16; store them in bfloat16"):
        write(large, corpus, tmp_path / "large", dtype="float16")


# --- reading what does not belong or is damaged ---------------------------------------------


def test_outputs_of_something_else_are_refused(model: Any, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoredError, match=r"manifest\.json: no such file"):
        read(out, corpus)
    write(model, corpus, out)
    other = make_corpus(tmp_path / "other", seed=1)
    with pytest.raises(StoredError, match="stored for another corpus"):
        read(out, other)
    with pytest.raises(StoredError, match="stored for another corpus"):
        read(out, make_corpus(tmp_path / "isolated", isolate=True))
    with pytest.raises(StoredError, match="from another teacher"):
        read(out, corpus, teacher_sha256="somebody")
    with pytest.raises(StoredError, match=r"tokenizer .* is not the student's"):
        read(out, corpus, tokenizer_sha256="another")
    with pytest.raises(StoredError, match="student's head has 50 rows for a tokenizer of 94"):
        read(out, corpus, vocab_size=50)
    stored = read(out, corpus)
    with pytest.raises(StoredError, match="row 1 was stored for other tokens"):
        stored.targets(batch(corpus, [0, 2]), [0, 1])
    with pytest.raises(StoredError, match="row 11 of train, which has 11 rows"):
        stored.targets(batch(corpus, [0]), [ROWS])
    with pytest.raises(StoredError, match="not rows cut to another context"):
        stored.targets(batch(corpus, [0])[:, :6], [0])
    with pytest.raises(StoredError, match="no split 'test'"):
        stored.targets(batch(corpus, [0]), [0], split="test")
    manifest = read_json(out / "manifest.json")
    write_json(out / "manifest.json", manifest | {"schema": 0})
    with pytest.raises(StoredError, match="not teacher outputs of schema 1"):
        read(out, corpus)


def test_padded_vocabularies_of_a_family_are_aligned(
    model: Any, corpus: Corpus, tmp_path: Path
) -> None:
    write(model, corpus, tmp_path / "hidden")
    assert read(tmp_path / "hidden", corpus, vocab_size=V - 1).vocabulary == V - 1
    assert read(tmp_path / "hidden", corpus, vocab_size=V + 9).vocabulary == V
    write(model, corpus, tmp_path / "top", "top_k")
    assert read(tmp_path / "top", corpus, vocab_size=V + 9).vocabulary == V
    with pytest.raises(StoredError, match="store them with vocabulary=95"):
        read(tmp_path / "top", corpus, vocab_size=V - 1)
    write(model, corpus, tmp_path / "cut", "top_k", vocabulary=V - 1)
    assert read(tmp_path / "cut", corpus, vocab_size=V - 1).vocabulary == V - 1


def test_damaged_files_are_named(model: Any, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(model, corpus, out)
    path = out / "train-00001.hidden.npy"
    content = path.read_bytes()

    path.write_bytes(content[:-8])
    with pytest.raises(StoredError, match=r"train-00001\.hidden\.npy: .* bytes instead of"):
        read(out, corpus)
    path.unlink()
    with pytest.raises(StoredError, match=r"train-00001\.hidden\.npy: missing"):
        read(out, corpus)

    path.write_bytes(b"\0" * 64 + content[64:])
    with pytest.raises(StoredError, match=r"train-00001\.hidden\.npy: unreadable"):
        read(out, corpus).targets(batch(corpus, [2]), [2])

    broken = np.frombuffer(content, dtype=np.uint8).copy()
    broken[-4:] = np.frombuffer(np.float32("nan").tobytes(), dtype=np.uint8)
    path.write_bytes(broken.tobytes())
    stored = read(out, corpus)
    stored.targets(batch(corpus, [0]), [0])  # other shards can be read
    with pytest.raises(StoredError, match=r"train-00001\.hidden\.npy: row 1 .* is no number"):
        stored.targets(batch(corpus, [3]), [3])
    with pytest.raises(StoredError, match=r"train-00001\.hidden\.npy: its content has changed"):
        read(out, corpus, verify=True)

    path.write_bytes(content)
    read(out, corpus, verify=True).targets(batch(corpus, [3]), [3])
    head = out / "head.safetensors"
    head.write_bytes(b"\xff" * head.stat().st_size)
    with pytest.raises(StoredError, match=r"head\.safetensors: unreadable"):
        read(out, corpus)


@pytest.mark.parametrize(("kind", "name"), [("top_k", "log_probs"), ("sampled", "entropy")])
def test_values_that_are_no_numbers_are_found_in_every_kind(
    model: Any, corpus: Corpus, tmp_path: Path, kind: str, name: str
) -> None:
    out = tmp_path / "out"
    write(model, corpus, out, kind, shard_bytes=2**20)
    for array, value, message in ((name, np.nan, "is no number"), ("ids", V, "outside the voc")):
        path = out / f"train-00000.{array}.npy"
        content = path.read_bytes()
        values = np.load(path)
        values.reshape(-1)[0] = value
        np.save(path, values)
        with pytest.raises(StoredError, match=rf"train-00000\.{array}\.npy: row 0 .*{message}"):
            read(out, corpus).targets(batch(corpus, [0]), [0])
        path.write_bytes(content)


def test_bfloat16_infinities_are_found(model: Any, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(model, corpus, out, dtype="bfloat16", shard_bytes=2**20)
    path = out / "train-00000.hidden.npy"
    values = np.load(path)
    values[0, 0, 0] = 0x7FC0  # not a number
    np.save(path, values)
    with pytest.raises(StoredError, match=r"train-00000\.hidden\.npy: row 0 .* is no number"):
        read(out, corpus).targets(batch(corpus, [0]), [0])


def test_nothing_stored_is_pickled(model: Any, corpus: Corpus, tmp_path: Path) -> None:
    """Every array loads with pickling off, and the manifest is plain JSON."""
    for kind in KINDS:
        manifest = write(model, corpus, tmp_path / kind, kind)
        json.dumps(manifest)
        for path in (tmp_path / kind).glob("*.npy"):
            assert np.load(path, allow_pickle=False).dtype != object
