"""What is stored of a batch of a teacher's hidden states, and what that loses.

Three forms (`rad.distillation.stored`); each also sums up, over tokens that are no padding, how far
the stored distribution is from the teacher's. Legend: B batch, T context, E hidden size, n tokens
of a chunk, V vocabulary, K stored entries of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rad.distillation import chunked
from rad.distillation.chunked import Projection
from rad.distillation.stored import Arrays, StoredError
from rad.distillation.targets import LogitHead
from rad.files import digest

MEASURED_ROWS = 4  # of each shard of hidden states
LEAST_LOG_PROB = -1e4  # float16 holds it; the probability is 0 in every dtype
Sums = dict[str, float]


class Encoder:
    """Makes arrays of one kind of hidden states; `spec` is that of the manifest."""

    def __init__(self, head: LogitHead, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        self.project = Projection.of(
            head, spec["vocabulary"], head.weight.dtype, spec["temperature"]
        )
        self.dtype: torch.dtype = getattr(torch, spec["dtype"])
        self.id_dtype = np.dtype("<u2" if spec["vocabulary"] <= 2**16 else "<u4")
        entry, id_bytes = self.dtype.itemsize, self.id_dtype.itemsize
        # at most: equal draws are merged
        sizes = {
            "hidden": head.weight.shape[1] * entry,
            "top_k": spec["k"] * (id_bytes + entry),
            "sampled": spec["k"] * (id_bytes + 1) + 5,
        }
        self.bytes_per_token: int = sizes[spec["kind"]]
        self._encode = {"hidden": self._hidden, "top_k": self._top_k, "sampled": self._sampled}[
            spec["kind"]
        ]

    def __call__(
        self, hidden: Tensor, real: Tensor, split: str, numbers: Sequence[int], place: int
    ) -> tuple[Arrays, Sums]:
        """hidden (B,T,E), real (B,T) bool -> arrays with B*T or B first, sums over real tokens.

        `numbers`: of the rows in the corpus split; `place`: of the first one in its shard.
        """
        return self._encode(hidden, real, split, numbers, place)

    def _hidden(
        self, hidden: Tensor, real: Tensor, split: str, numbers: Sequence[int], place: int
    ) -> tuple[Arrays, Sums]:
        kept = hidden.to(self.dtype)
        if not bool(torch.isfinite(kept).all()):
            raise StoredError(
                f"hidden states of the teacher are too large for {self.spec['dtype']}; store them "
                "in bfloat16 or float32"
            )
        sums = {"tokens": 0.0, "kl": 0.0}
        rows = max(0, MEASURED_ROWS - place)
        flat = hidden[:rows][real[:rows]]  # (tokens,E)
        again = kept[:rows][real[:rows]].to(hidden.dtype)
        if len(flat):
            size = chunked.chunk_tokens(self.spec["vocabulary"], hidden.device)
            values = chunked.token_values(
                again,
                self.project,
                lambda logits, at: chunked.dense("forward_kl", logits, self.project(flat[at])),
                size,
            )
            sums = {"tokens": float(len(flat)), "kl": float(values.double().sum())}
        return {"hidden": _to_numpy(kept)}, sums

    def _top_k(
        self, hidden: Tensor, real: Tensor, split: str, numbers: Sequence[int], place: int
    ) -> tuple[Arrays, Sums]:
        size = chunked.chunk_tokens(self.spec["vocabulary"], hidden.device)
        k, others = self.spec["k"], self.spec["vocabulary"] - self.spec["k"]
        ids, kept = [], []
        kl, missing = 0.0, 0.0
        for part, counts in zip(
            hidden.flatten(0, 1).split(size), real.flatten().split(size), strict=True
        ):
            log_p = self.project(part).log_softmax(-1)
            exact, index = log_p.topk(k, dim=-1)
            stored = exact.clamp_min(LEAST_LOG_PROB).to(self.dtype)
            ids.append(index)
            kept.append(stored)
            exact, wide = exact.double(), stored.double()
            # the sum over the tokens that are left out, of p log p
            tail = log_p.scatter(-1, index, -torch.inf).double()
            left = tail.exp().sum(-1)
            entropy = (tail.exp() * tail.clamp_min(LEAST_LOG_PROB)).sum(-1)
            spread = (1 - wide.exp().sum(-1)).clamp_min(1e-12).log() - math.log(max(others, 1))
            values = (exact.exp() * (exact - wide)).sum(-1) + entropy - left * spread
            kl += float(values[counts].sum())
            missing += float(left[counts].sum())
        shape = (*hidden.shape[:2], k)
        arrays = {
            "ids": torch.cat(ids).view(shape).cpu().numpy().astype(self.id_dtype),
            "log_probs": _to_numpy(torch.cat(kept).view(shape)),
        }
        return arrays, {"tokens": float(real.sum()), "kl": kl, "missing_mass": missing}

    def _sampled(
        self, hidden: Tensor, real: Tensor, split: str, numbers: Sequence[int], place: int
    ) -> tuple[Arrays, Sums]:
        size = chunked.chunk_tokens(self.spec["vocabulary"], hidden.device)
        n = self.spec["k"]
        drawn, log_probs, entropies = [], [], []
        for number, sequence in zip(numbers, hidden, strict=True):
            # a row's draws depend on the seed and the row alone, not on batches or shards
            seed = int(digest([self.spec["seed"], split, int(number)])[:15], 16)
            uniform = torch.rand(
                (len(sequence), n),
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(seed),
            ).to(hidden.device)
            for part, u in zip(sequence.split(size), uniform.split(size), strict=True):
                log_p = self.project(part).log_softmax(-1)
                ids = draw(log_p, u)
                drawn.append(ids)
                log_probs.append(log_p.gather(-1, ids).double())
                entropies.append(-(log_p.exp() * log_p).sum(-1))
        ids = torch.cat(drawn).sort(dim=-1).values  # (tokens,n)
        entropy = torch.cat(entropies)
        deviation = -torch.cat(log_probs).mean(-1) - entropy.double()
        fresh = torch.ones_like(ids, dtype=torch.bool)
        fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = fresh.flatten().nonzero().squeeze(-1)
        counts = torch.diff(starts, append=starts.new_tensor([ids.numel()]))
        arrays = {
            "ids": ids[fresh].cpu().numpy().astype(self.id_dtype),
            "counts": counts.cpu().numpy().astype(np.uint8),
            "unique": fresh.sum(-1).view(hidden.shape[:2]).cpu().numpy().astype(np.uint8),
            "entropy": entropy.view(hidden.shape[:2]).float().cpu().numpy(),
        }
        deviation = deviation[real.flatten()]
        sums = {
            "tokens": float(len(deviation)),
            "kl": float(deviation.sum()),
            "square": float(deviation.square().sum()),
        }
        return arrays, sums


def draw(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Tokens with probability exp(log_p): log_p (n,V), uniform (n,K) in [0,1) -> ids (n,K).

    By the inverse of the distribution function in float64: a sum of many float32 would be biased.
    """
    cumulative = log_p.double().exp().cumsum(-1)
    ids = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return ids.clamp_max(log_p.shape[-1] - 1)


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    """bfloat16, which numpy does not have, as the uint16 of the same bits."""
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


def mean_loss(measured: Iterable[Sums]) -> dict[str, float]:
    """Means of what the shards measured, in nats per token."""
    sums: dict[str, float] = {}
    for part in measured:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    tokens = sums.pop("tokens")
    means = {name: value / tokens for name, value in sums.items()}
    if "square" in means:
        variance = max(0.0, means.pop("square") - means["kl"] ** 2)
        means["standard_error"] = math.sqrt(variance / tokens)
    return {**means, "measured_tokens": tokens}
