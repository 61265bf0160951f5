"""The chunked forms equal the plain recurrences in values, gradients and states."""

from __future__ import annotations

import pytest
import torch

from rad.kernels import causal_conv, causal_conv_reference
from rad.kernels.ssd import ssd_chunked, ssd_recurrent


def _inputs(time: int, with_state: bool) -> list[torch.Tensor | None]:
    torch.manual_seed(time)
    shape = (2, time, 3)
    x, b, c = (torch.randn(*shape, n, dtype=torch.float64) for n in (4, 5, 5))
    log_a = -torch.rand(shape, dtype=torch.float64) * 3
    state = torch.randn(2, 3, 4, 5, dtype=torch.float64) if with_state else None
    leaves = [x, log_a, b, c, state]
    return [None if leaf is None else leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("time", "chunk"), [(1, 8), (7, 8), (8, 8), (9, 4), (24, 8), (25, 64)])
def test_ssd_chunked_equals_the_recurrence(time: int, chunk: int, with_state: bool) -> None:
    results = []
    for function in (ssd_recurrent, lambda *args: ssd_chunked(*args, chunk=chunk)):
        leaves = _inputs(time, with_state)
        y, state = function(*leaves)
        (y.square().sum() + (state * state.detach().cos()).sum()).backward()
        results.append([y, state, *(leaf.grad for leaf in leaves if leaf is not None)])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


def test_ssd_gradient_is_finite_under_strong_decay() -> None:
    x, log_a, b, c, _ = _inputs(16, False)
    with torch.no_grad():
        log_a.fill_(-200.0)
    y, _ = ssd_chunked(x, log_a, b, c, chunk=16)
    y.sum().backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in (x, log_a, b, c))


def test_ssd_matches_a_hand_computed_example() -> None:
    one = torch.ones(1, 3, 1, 1)
    half = torch.full((1, 3, 1), 0.5).log()
    y, state = ssd_chunked(one * 2, half, one, one * 3)
    # S: 2, 1 + 2, 1.5 + 2; y = 3 S
    assert y.flatten().tolist() == pytest.approx([6.0, 9.0, 10.5])
    assert state.item() == pytest.approx(3.5)


def test_ssd_equals_the_scan_of_transformers() -> None:
    """An independent implementation: the pure torch path of transformers' Mamba-2."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    config = Mamba2Config(
        num_heads=4, head_dim=8, hidden_size=16, expand=2, state_size=6, n_groups=4, chunk_size=8
    )
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        theirs.dt_bias.normal_()
        theirs.A_log.uniform_(-1, 1)
        theirs.D.normal_()
    u = torch.randn(2, 21, 16)
    with torch.no_grad():
        expected = theirs(u)
        z, xbc, dt = theirs.in_proj(u).split([32, 32 + 2 * 24, 4], dim=-1)
        xbc, _ = causal_conv(xbc, theirs.conv1d.weight.squeeze(1), theirs.conv1d.bias, None)
        x, b, c = torch.nn.functional.silu(xbc).split([32, 24, 24], dim=-1)
        x, b, c = x.view(2, 21, 4, 8), b.view(2, 21, 4, 6), c.view(2, 21, 4, 6)
        step = torch.nn.functional.softplus(dt + theirs.dt_bias)
        y, _ = ssd_chunked(x * step.unsqueeze(-1), -theirs.A_log.exp() * step, b, c, chunk=8)
        y = (y + theirs.D.unsqueeze(-1) * x).flatten(2)
        mine = theirs.out_proj(theirs.norm(y, z))
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 3, 9])
def test_conv_equals_the_reference_and_carries_its_state(width: int, time: int) -> None:
    torch.manual_seed(width)
    x, weight, bias = torch.randn(2, time, 5), torch.randn(5, width), torch.randn(5)
    state = torch.randn(2, width - 1, 5)
    slow, slow_state = causal_conv_reference(x, weight, bias, state)
    fast, fast_state = causal_conv(x, weight, bias, state)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast_state, slow_state)
    if time == 1:
        return
    first, carried = causal_conv(x[:, :1], weight, bias, state)
    rest, _ = causal_conv(x[:, 1:], weight, bias, carried)
    torch.testing.assert_close(torch.cat([first, rest], 1), slow)
