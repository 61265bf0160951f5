"""Chunked losses against plain formulas (value, gradient, memory); alignment and orientation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_fixture import MIXERS, base_model, placement, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rad.distillation import chunked, losses
from rad.distillation.orientation import mixer_matrix, orientation_loss
from rad.distillation.targets import (
    LogitHead,
    Targets,
    align_vocabulary,
    check_head,
    final_hidden,
    head_of,
)
from rad.models.convert import convert

B, T, E, V, WIDE = 3, 9, 16, 101, 24
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "ce_teacher"]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "granite": {"scale": 8.0},
    "gemma": {"softcap": 3.0},
    "all": {"bias": True, "scale": 0.5, "softcap": 5.0},
}


def divergence(kind: str, p: Tensor, q: Tensor) -> Tensor:
    """Textbook formulas, from probabilities (...,V)."""
    middle = (p + q) / 2
    return {
        "forward_kl": lambda: (p * (p / q).log()).sum(-1),
        "reverse_kl": lambda: (q * (q / p).log()).sum(-1),
        "ce_teacher": lambda: -(p * q.log()).sum(-1),
        "jsd": lambda: (
            0.5 * (p * (p / middle).log()).sum(-1) + 0.5 * (q * (q / middle).log()).sum(-1)
        ),
    }[kind]()


class Case:
    """A student and a teacher that differ in width, and weights with zeros."""

    def __init__(self, dtype: torch.dtype = torch.float64, head: str = "plain", rows: int = V):
        torch.manual_seed(0)
        options = dict(HEADS[head])
        bias = options.pop("bias", False)
        self.hidden = torch.randn(B, T, E, dtype=dtype, requires_grad=True)
        self.weight = (torch.randn(V, E, dtype=dtype) / 4).requires_grad_()
        self.bias = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
        self.head = LogitHead(self.weight, self.bias, **options)
        self.teacher_head = LogitHead(torch.randn(rows, WIDE, dtype=dtype) / 5, None, **options)
        self.targets = Targets(
            "hidden", hidden=torch.randn(B, T, WIDE, dtype=dtype), head=self.teacher_head
        )
        self.loss_weight = torch.rand(B, T, dtype=dtype) * (torch.rand(B, T) > 0.3)

    @property
    def parameters(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def teacher_logits(self, rows: int | None = None) -> Tensor:
        assert self.targets.hidden is not None
        return self.teacher_head.logits(self.targets.hidden, rows)


def compare(
    case: Case, found: Tensor, expected: Tensor, tolerance: float, scale: float = 1.7
) -> None:
    """Values and gradients of two scalars, which are multiplied by `scale` first."""
    assert found.item() == pytest.approx(expected.item(), abs=tolerance)
    mine = torch.autograd.grad(found * scale, case.parameters)
    theirs = torch.autograd.grad(expected * scale, case.parameters)
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_every_divergence_and_head_is_the_plain_formula(kind: Any, head: str) -> None:
    for temperature in (1.0, 2.5):
        case = Case(head=head)
        p = (case.teacher_logits() / temperature).softmax(-1)
        q = (case.head.logits(case.hidden) / temperature).softmax(-1)
        values = temperature**2 * divergence(kind, p, q)[:, :-1]
        weight = case.loss_weight[:, 1:]
        expected = (values * weight).sum() / weight.sum()
        found = losses.distillation_loss(
            case.hidden,
            case.head,
            case.targets,
            case.loss_weight,
            kind=kind,
            temperature=temperature,
            chunk=5,
        )
        compare(case, found, expected, 1e-10)
        each = losses.distillation_values(
            case.hidden, case.head, case.targets, kind=kind, temperature=temperature, chunk=7
        )
        torch.testing.assert_close(each, values, atol=1e-10, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000, None])
def test_float32_agrees_with_the_plain_losses_whatever_the_chunk(chunk: int | None) -> None:
    case = Case(torch.float32)
    logits = case.head.logits(case.hidden)
    expected = losses.kl_loss(case.teacher_logits(), logits, case.loss_weight)
    found = losses.distillation_loss(
        case.hidden, case.head, case.targets, case.loss_weight, chunk=chunk
    )
    compare(case, found, expected, 1e-6, scale=1.0)
    ids = torch.randint(0, V, (B, T))
    expected = losses.ce_loss(case.head.logits(case.hidden), ids, case.loss_weight)
    found = losses.ce_loss_from_hidden(case.hidden, case.head, ids, case.loss_weight, chunk=chunk)
    compare(case, found, expected, 1e-6, scale=1.0)


def test_cross_entropy_of_labels_is_exact() -> None:
    case = Case(head="all")
    ids = torch.randint(0, V, (B, T))
    values = F.cross_entropy(
        case.head.logits(case.hidden)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    weight = case.loss_weight[:, 1:]
    found = losses.ce_loss_from_hidden(case.hidden, case.head, ids, case.loss_weight, chunk=4)
    compare(case, found, (values * weight).sum() / weight.sum(), 1e-10)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_no_divergence(kind: Any) -> None:
    case = Case(torch.float32)
    targets = Targets("hidden", hidden=case.hidden.detach(), head=case.head.detach())
    found = losses.distillation_loss(
        case.hidden, case.head, targets, torch.ones(B, T), kind=kind, chunk=5
    )
    (gradient,) = torch.autograd.grad(found, [case.hidden])
    assert gradient.abs().max() < 1e-6
    if kind == "forward_kl":
        assert found.item() == 0.0
    elif kind != "ce_teacher":
        assert abs(found.item()) < 1e-6


def test_only_what_requires_a_gradient_gets_one() -> None:
    case = Case(head="bias")
    case.weight.requires_grad_(False)
    loss = losses.distillation_loss(case.hidden, case.head, case.targets, case.loss_weight)
    loss.backward()
    assert case.hidden.grad is not None
    assert case.bias is not None and case.bias.grad is not None
    assert case.weight.grad is None
    with pytest.raises(RuntimeError):
        loss.backward()
    with torch.no_grad():
        again = losses.distillation_loss(case.hidden, case.head, case.targets, case.loss_weight)
    assert again.item() == loss.item()
    assert not again.requires_grad


def test_bfloat16_and_autocast_stay_close_and_give_gradients_of_the_parameters_dtype() -> None:
    exact = Case(torch.float32)
    expected = losses.distillation_loss(exact.hidden, exact.head, exact.targets, exact.loss_weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses.distillation_loss(exact.hidden, exact.head, exact.targets, exact.loss_weight)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    (gradient,) = torch.autograd.grad(found, [exact.weight])
    (wanted,) = torch.autograd.grad(expected, [exact.weight])
    assert gradient.dtype == torch.float32
    assert float((gradient - wanted).norm() / wanted.norm()) < 0.03

    half = exact.hidden.detach().bfloat16().requires_grad_()
    weight = exact.weight.detach().bfloat16().requires_grad_()
    loss = losses.distillation_loss(half, LogitHead(weight), exact.targets, exact.loss_weight)
    loss.backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def _largest(compute: Callable[[], Any]) -> int:
    with Largest() as seen:
        compute()
    return seen.elements


def test_logits_of_all_tokens_never_exist() -> None:
    rows, time, size, chunk = 4, 128, 512, 16
    hidden = torch.randn(rows, time, 8, requires_grad=True)
    head = LogitHead(torch.randn(size, 8, requires_grad=True))
    teacher = Targets(
        "hidden", hidden=torch.randn(rows, time, 8), head=LogitHead(torch.randn(size, 8))
    )
    ids = torch.randint(0, size, (rows, time, 4))
    top_k = Targets("top_k", ids=ids, log_probs=torch.full((rows, time, 4), math.log(0.2)))
    sampled = Targets("sampled", ids=ids, weights=torch.full((rows, time, 4), 0.25))
    weight, labels = torch.ones(rows, time), torch.randint(0, size, (rows, time))
    whole = rows * time * size

    def naive() -> None:
        assert teacher.head is not None and teacher.hidden is not None
        logits = teacher.head.logits(teacher.hidden)
        losses.kl_loss(logits, head.logits(hidden), weight).backward()

    assert _largest(naive) >= whole  # the measure sees what it should see
    for kind in DIVERGENCES:
        for targets in (teacher, top_k):
            largest = _largest(
                lambda targets=targets, kind=kind: losses.distillation_loss(
                    hidden, head, targets, weight, kind=kind, chunk=chunk
                ).backward()
            )
            assert largest <= max(chunk * size, rows * time * 8)
    for compute in (
        lambda: losses.distillation_loss(
            hidden, head, sampled, weight, kind="ce_teacher", chunk=chunk
        ).backward(),
        lambda: losses.ce_loss_from_hidden(hidden, head, labels, weight, chunk=chunk).backward(),
        lambda: losses.distillation_values(hidden, head, teacher, chunk=chunk),
    ):
        assert _largest(compute) <= max(chunk * size, rows * time * 8)
    assert chunked.chunk_tokens(32000, torch.device("cpu")) == 131


# --- top-k and sampled teachers -------------------------------------------------------------


def _top_k(case: Case, k: int, temperature: float = 1.0) -> Targets:
    log_probs, ids = (case.teacher_logits() / temperature).log_softmax(-1).topk(k, dim=-1)
    return Targets("top_k", ids=ids, log_probs=log_probs, temperature=temperature)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_bucket_is_one_class_of_all_other_tokens(kind: Any, temperature: float) -> None:
    case = Case(head="all")
    targets = _top_k(case, 6, temperature)
    assert targets.ids is not None and targets.log_probs is not None
    q = (case.head.logits(case.hidden) / temperature).softmax(-1)
    kept = q.gather(-1, targets.ids)
    coarse_q = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)
    p = targets.log_probs.exp()
    coarse_p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], dim=-1)
    values = temperature**2 * divergence(kind, coarse_p, coarse_q)[:, :-1]
    weight = case.loss_weight[:, 1:]
    found = losses.distillation_loss(
        case.hidden,
        case.head,
        targets,
        case.loss_weight,
        kind=kind,
        temperature=temperature,
        chunk=5,
    )
    compare(case, found, (values * weight).sum() / weight.sum(), 1e-10)


@pytest.mark.parametrize("kind", ["forward_kl", "ce_teacher"])
def test_renormalising_takes_the_stored_tokens_for_all(kind: Any) -> None:
    case = Case()
    targets = _top_k(case, 6)
    assert targets.ids is not None and targets.log_probs is not None
    p = targets.log_probs.softmax(-1)
    q = case.head.logits(case.hidden).softmax(-1).gather(-1, targets.ids)
    values = divergence(kind, p, q)[:, :-1]
    weight = case.loss_weight[:, 1:]
    found = losses.distillation_loss(
        case.hidden,
        case.head,
        targets,
        case.loss_weight,
        kind=kind,
        missing="renormalise",
        chunk=5,
    )
    compare(case, found, (values * weight).sum() / weight.sum(), 1e-10)


@pytest.mark.parametrize("missing", ["bucket", "renormalise"])
def test_top_k_of_the_whole_vocabulary_is_the_exact_teacher(missing: Any) -> None:
    case = Case()
    expected = losses.distillation_loss(case.hidden, case.head, case.targets, case.loss_weight)
    found = losses.distillation_loss(
        case.hidden, case.head, _top_k(case, V), case.loss_weight, missing=missing, chunk=5
    )
    compare(case, found, expected, 1e-10)


def test_the_optimum_of_a_bucket_keeps_the_teachers_probabilities() -> None:
    """Renormalising moves the missing mass onto the stored tokens; the bucket does not."""
    case = Case()
    targets = _top_k(case, 3)
    assert targets.ids is not None and targets.log_probs is not None
    logits = case.teacher_logits().log_softmax(-1)
    weight = torch.ones(B, T, dtype=logits.dtype)
    free = logits.clone().requires_grad_()  # a student whose hidden states are its logits
    head = LogitHead(torch.eye(V, dtype=logits.dtype))
    loss = losses.distillation_loss(free, head, targets, weight)
    (gradient,) = torch.autograd.grad(loss, [free])
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12
    biased = losses.distillation_loss(free, head, targets, weight, missing="renormalise")
    (gradient,) = torch.autograd.grad(biased, [free])
    pull = gradient.gather(-1, targets.ids)[:, :-1]
    assert bool((pull < 0).all())  # towards the stored tokens, at the teacher itself


def test_rounding_above_a_mass_of_one_gives_numbers() -> None:
    case = Case(torch.float32)
    log_probs = torch.full((B, T, 4), math.log(0.25) + 1e-3)
    ids = torch.arange(4).expand(B, T, 4)
    targets = Targets("top_k", ids=ids, log_probs=log_probs.half())
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        found = losses.distillation_loss(
            case.hidden, case.head, targets, case.loss_weight, kind=kind
        )
        gradients = torch.autograd.grad(found, case.parameters)
        assert math.isfinite(found.item())
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_sampled_targets_are_the_weighted_cross_entropy() -> None:
    case = Case()
    ids = torch.randint(0, V, (B, T, 5))
    weights = torch.rand(B, T, 5, dtype=torch.float64)
    entropy = torch.rand(B, T, dtype=torch.float64)
    targets = Targets("sampled", ids=ids, weights=weights, entropy=entropy)
    log_q = case.head.logits(case.hidden).log_softmax(-1).gather(-1, ids)
    values = -(weights * log_q).sum(-1)[:, :-1]
    weight = case.loss_weight[:, 1:]
    found = losses.distillation_loss(
        case.hidden, case.head, targets, case.loss_weight, kind="ce_teacher", chunk=5
    )
    compare(case, found, (values * weight).sum() / weight.sum(), 1e-10)
    each = losses.distillation_values(case.hidden, case.head, targets)
    torch.testing.assert_close(each, values - entropy[:, :-1], atol=1e-10, rtol=0)


# --- vocabularies and refusals --------------------------------------------------------------


def test_rows_that_only_a_larger_head_has_are_ignored() -> None:
    case = Case(rows=V + 11)
    rows = align_vocabulary(V, V + 11, 95, student_tokenizer="a", teacher_tokenizer="a")
    assert rows == V
    p = case.teacher_logits(rows).softmax(-1)
    q = case.head.logits(case.hidden).softmax(-1)
    values = divergence("forward_kl", p, q)[:, :-1]
    weight = case.loss_weight[:, 1:]
    found = losses.distillation_loss(
        case.hidden, case.head, case.targets, case.loss_weight, vocabulary=rows, chunk=5
    )
    compare(case, found, (values * weight).sum() / weight.sum(), 1e-10)
    # and of a larger student: its further rows get a gradient of zero
    found = losses.distillation_loss(
        case.hidden, case.head, case.targets, case.loss_weight, vocabulary=90, chunk=5
    )
    (gradient,) = torch.autograd.grad(found, [case.weight])
    assert bool((gradient[90:] == 0).all())
    assert bool((gradient[:90] != 0).any(-1).all())


def test_other_vocabularies_are_refused() -> None:
    same = {"student_tokenizer": "a", "teacher_tokenizer": "a"}
    assert align_vocabulary(100, 100, 90) == 100
    assert align_vocabulary(128, 100, 90, **same) == 100
    with pytest.raises(ValueError, match="is not the student's"):
        align_vocabulary(100, 100, 90, student_tokenizer="a", teacher_tokenizer="b")
    with pytest.raises(ValueError, match="teacher's head has 80 rows for a tokenizer of 90"):
        align_vocabulary(100, 80, 90, **same)
    with pytest.raises(ValueError, match="give the digests"):
        align_vocabulary(100, 128, 90)


def test_losses_that_make_no_sense_are_refused() -> None:
    case = Case(rows=V + 3)
    ones = torch.ones(B, T)
    with pytest.raises(ValueError, match=rf"heads of {V} \(student\) and {V + 3} \(teacher\)"):
        losses.distillation_loss(case.hidden, case.head, case.targets, ones)
    with pytest.raises(ValueError, match="above the 101 rows of the student's head"):
        losses.distillation_loss(case.hidden, case.head, case.targets, ones, vocabulary=V + 1)
    with pytest.raises(ValueError, match="not of one batch"):
        losses.distillation_loss(case.hidden[:1], case.head, case.targets, ones, vocabulary=V)
    with pytest.raises(ValueError, match="weight"):
        losses.distillation_loss(case.hidden, case.head, case.targets, ones[:, 1:], vocabulary=V)
    with pytest.raises(ValueError, match="tokens"):
        losses.ce_loss_from_hidden(case.hidden, case.head, torch.zeros(B, 2).long(), ones)
    ids = torch.zeros(B, T, 1, dtype=torch.long)
    sampled = Targets("sampled", ids=ids, weights=torch.ones(B, T, 1))
    top_k = Targets("top_k", ids=ids, log_probs=torch.full((B, T, 1), -1.0))
    kinds: Any = "reverse_kl"
    with pytest.raises(ValueError, match="a sampled teacher gives forward_kl"):
        losses.distillation_loss(case.hidden, case.head, sampled, ones, kind=kinds)
    with pytest.raises(ValueError, match="without `entropy`"):
        losses.distillation_loss(case.hidden, case.head, sampled, ones)
    with pytest.raises(ValueError, match="renormalised top-k teacher does not have"):
        losses.distillation_loss(
            case.hidden, case.head, top_k, ones, kind=kinds, missing="renormalise"
        )
    with pytest.raises(ValueError, match="stored at temperature 1, the loss asks for 2"):
        losses.distillation_loss(case.hidden, case.head, top_k, ones, temperature=2.0)
    wrong: Any = "drop"
    with pytest.raises(ValueError, match="missing='drop'"):
        losses.distillation_loss(case.hidden, case.head, top_k, ones, missing=wrong)
    case = Case()
    wrong = "l3"
    for targets in (case.targets, top_k):
        with pytest.raises(ValueError, match="unknown loss 'l3'"):
            losses.distillation_loss(case.hidden, case.head, targets, ones, kind=wrong)
    with pytest.raises(ValueError, match="need 'log_probs'"):
        Targets("top_k", ids=ids)
    with pytest.raises(ValueError, match="kind 'l3'"):
        Targets(wrong, ids=ids)


# --- heads of real models -------------------------------------------------------------------


def _family(name: str) -> Any:
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
    )

    shape: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if name == "granite":
        return GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=8.0))
    if name == "cohere":
        return CohereForCausalLM(CohereConfig(**shape, logit_scale=0.125))
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=2.0))
    if name == "hybrid":
        return convert(base_model(), placement("mixed"), MIXERS["mamba2"], "qkvo")
    return base_model(name)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "granite", "cohere", "gemma2", "hybrid"]
)
def test_hidden_states_and_head_are_the_models_logits(name: str) -> None:
    model = _family(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        expected = model(tokens(), use_cache=False).logits
        found = head_of(model).logits(final_hidden(model, tokens()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    check_head(model)


def test_a_model_that_treats_its_logits_in_another_way_is_refused() -> None:
    model = base_model()
    plain = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    with pytest.raises(ValueError, match="this family is not supported"):
        check_head(model)
    headless = base_model().model
    with pytest.raises(ValueError, match="no linear output head"):
        head_of(headless)


# --- alignment and orientation --------------------------------------------------------------


def test_alignment_forms_are_their_formulas() -> None:
    torch.manual_seed(0)
    target, output = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    weight = torch.tensor([[1.0, 0, 1, 1, 0], [0, 1, 1, 0, 1]])
    kept = weight.bool()
    squared = (target - output).square().sum(-1)
    for form, values in {
        "root_width": squared.sqrt() / math.sqrt(8),
        "squared": squared,
        "relative": squared / target.square().sum(-1),
    }.items():
        name: Any = form
        found = losses.alignment_loss(target, output, weight, name)
        torch.testing.assert_close(found, values[kept].mean())
    default = losses.alignment_loss(target, output, weight)
    assert default == losses.alignment_loss(target, output, weight, "root_width")
    wrong: Any = "cosine"
    with pytest.raises(ValueError, match="alignment form 'cosine'"):
        losses.alignment_loss(target, output, weight, wrong)


def _mixer(name: str) -> Any:
    base = base_model()
    hybrid = convert(base, placement("heads"), MIXERS[name], "qkvo", seed=2)
    mixer = hybrid.model.layers[0].self_attn.mixer
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize("name", ["mamba2", "discrete_mamba2"])
def test_the_matrix_of_a_mixer_is_what_it_does_along_time(name: str) -> None:
    """Gate and norm undone: with the gate open and x known, the output is the matrix times x."""
    mixer = _mixer(name)
    torch.manual_seed(3)
    u = torch.randn(2, 19, 32)
    with torch.no_grad():
        dim, heads = mixer.geometry.head_dim, len(mixer.owned)
        gate = mixer.span("z")
        mixer.in_proj.weight[gate] = 0
        if mixer.in_proj.bias is None:
            mixer.in_proj.bias = torch.nn.Parameter(torch.zeros(mixer.in_proj.out_features))
        mixer.in_proj.bias[gate] = 1.278464542761  # silu of it is 1
        start = mixer.sizes[0] if name == "mamba2" else 0
        convolved, _ = mixer.convolve(
            mixer.in_proj(u)[..., start : start + mixer.conv_channels], {}, None
        )
        x = convolved[..., : mixer.sizes[list(mixer.parts).index("x")]]
        x = F.silu(x) if name == "mamba2" else x
        x = x.view(2, 19, -1, dim)
        x = x[:, :, mixer.kv_of] if name == "mamba2" else x  # (B,T,M,D)
        matrix = mixer_matrix(mixer, u)
        assert matrix.shape == (2, heads, 19, 19)
        assert bool((matrix.triu(1) == 0).all())
        y = torch.einsum("bmts,bsmd->btmd", matrix, x)
        if name == "mamba2":
            scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + mixer.geometry.norm_eps)
            y = y * scale * mixer.norm_weight
        expected, _ = mixer(u)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


def test_orientation_is_the_mean_frobenius_distance_and_moves_the_mixer() -> None:
    mixer = _mixer("discrete_mamba2")
    u = torch.randn(2, 7, 32)
    attention = torch.rand(2, len(mixer.owned), 7, 7).tril().softmax(-1)
    matrix = mixer_matrix(mixer, u)
    loss = orientation_loss(attention, matrix)
    norms = torch.linalg.matrix_norm(attention - matrix, ord="fro")
    torch.testing.assert_close(loss, norms.mean())
    loss.backward()
    moved = mixer.in_proj.weight.grad.abs().sum(-1)
    assert bool((moved[mixer.span("B")] > 0).all() and (moved[mixer.span("C")] > 0).all())
    assert bool((moved[mixer.span("x")] == 0).all() and (moved[mixer.span("z")] == 0).all())


def test_mixers_without_a_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="mixer 'gla' has no matrix here"):
        mixer_matrix(_mixer("gla"), torch.randn(1, 4, 32))
