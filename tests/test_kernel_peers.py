"""The recurrences equal those of transformers, and the convolution its reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rad.kernels.conv import causal_conv, causal_conv_reference, causal_conv_step
from rad.kernels.delta import gated_delta_chunked
from rad.kernels.scan import selective_scan_chunked
from rad.kernels.ssd import ssd_chunked

HEADS, CHANNELS, SIZE = 4, 3, 5


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ssd_equals_the_chunk_scan_of_transformers(groups: int) -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    torch.manual_seed(0)
    x = torch.randn(2, 37, HEADS, CHANNELS)
    b, c = (torch.randn(2, 37, groups, SIZE) for _ in range(2))
    dt, a = torch.rand(2, 37, HEADS), -torch.rand(HEADS)
    state = torch.randn(2, HEADS, CHANNELS, SIZE)
    expected, last = mamba2_chunk_scan(
        x, dt, a, b, c, chunk_size=16, initial_states=state, return_final_states=True
    )
    y, new = ssd_chunked(x * dt.unsqueeze(-1), a * dt, b, c, state, chunk=8)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "peer", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
)
def test_gated_delta_equals_the_rules_of_transformers(peer: str) -> None:
    """Their state is (B,H,N,P), and they divide q by the root of N."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    torch.manual_seed(0)
    q, k = (torch.randn(2, 37, HEADS, SIZE) for _ in range(2))
    k, v = F.normalize(k, dim=-1), torch.randn(2, 37, HEADS, CHANNELS)
    log_a, beta = -torch.rand(2, 37, HEADS), torch.rand(2, 37, HEADS)
    state = torch.randn(2, HEADS, CHANNELS, SIZE)
    expected, last = getattr(modeling_qwen3_next, peer)(
        q,
        k,
        v,
        g=log_a,
        beta=beta,
        initial_state=state.transpose(-1, -2).contiguous(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=False,
    )
    y, new = gated_delta_chunked(q * SIZE**-0.5, k, v, log_a, beta, state, chunk=8)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new, last.transpose(-1, -2), rtol=1e-4, atol=1e-5)


def test_selective_scan_equals_the_scan_of_transformers() -> None:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    torch.manual_seed(0)
    hidden, dt = torch.randn(2, 6, 19), torch.rand(2, 6, 19)
    a, b, c = -torch.rand(6, SIZE), torch.randn(2, SIZE, 19), torch.randn(2, SIZE, 19)
    expected, last = mamba_selective_scan(hidden, dt, a, b, c, return_last_state=True)
    steps = dt.transpose(1, 2)[:, :, None, :, None]  # (B,T,1,P,1)
    keys = b.transpose(1, 2)[:, :, None, None, :]  # (B,T,1,1,N)
    update = steps * keys * hidden.transpose(1, 2)[:, :, None, :, None]
    y, new = selective_scan_chunked((steps * a).exp(), update, c.transpose(1, 2).unsqueeze(2))
    torch.testing.assert_close(y.squeeze(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new.squeeze(1), last, rtol=1e-4, atol=1e-5)


def test_ssd_equals_the_mixer_of_transformers() -> None:
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
        x, b, c = F.silu(xbc).split([32, 24, 24], dim=-1)
        x, b, c = x.view(2, 21, 4, 8), b.view(2, 21, 4, 6), c.view(2, 21, 4, 6)
        step = F.softplus(dt + theirs.dt_bias)
        y, _ = ssd_chunked(x * step.unsqueeze(-1), -theirs.A_log.exp() * step, b, c, chunk=8)
        y = (y + theirs.D.unsqueeze(-1) * x).flatten(2)
        mine = theirs.out_proj(theirs.norm(y, z))
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 3, 9])
@pytest.mark.parametrize("with_bias", [False, True])
def test_conv_equals_the_reference_and_carries_its_state(
    width: int, time: int, with_bias: bool
) -> None:
    torch.manual_seed(width)
    x, weight = torch.randn(2, time, 5), torch.randn(5, width)
    bias = torch.randn(5) if with_bias else None
    state = torch.randn(2, width - 1, 5)
    slow, slow_state = causal_conv_reference(x, weight, bias, state)
    fast, fast_state = causal_conv(x, weight, bias, state)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast_state, slow_state)
    outputs, now = [], state
    for t in range(time):
        y, now = causal_conv_step(x[:, t], weight, bias, now)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), slow)
    torch.testing.assert_close(now, slow_state)
    if time == 1:
        return
    first, carried = causal_conv(x[:, :1], weight, bias, state)
    rest, _ = causal_conv(x[:, 1:], weight, bias, carried)
    torch.testing.assert_close(torch.cat([first, rest], 1), slow)


def test_conv_and_its_step_pass_a_finite_difference_check() -> None:
    torch.manual_seed(0)
    shapes = [(2, 4, 3), (3, 3), (3,), (2, 2, 3)]
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(causal_conv, leaves)
    first = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(causal_conv_step, [first, *leaves[1:]])
