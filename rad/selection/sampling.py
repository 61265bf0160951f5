"""Which drafted tokens are accepted: the greedy rule and the sampled one.

Greedy: a token is accepted while it is the full model's own choice. Sampled (Leviathan et al.,
arXiv 2211.17192; Draft & Verify, section 3.3): a token x drawn from the draft's distribution q is
accepted with probability min(1, p(x)/q(x)), else one is drawn from max(0, p - q) normalised; what
comes out is distributed as p, the full model's, whatever q is.

Legend: V vocabulary, W drafted tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    """How a token is proposed, and how many of the proposed ones are accepted."""

    def propose(self, logits: Tensor) -> tuple[int, float, Tensor]:
        """logits (V) of the draft -> token, top-1 probability, the distribution drawn from."""

    def verify(self, drafted: list[int], drafts: list[Tensor], logits: Tensor) -> tuple[int, int]:
        """Drafted tokens, their distributions (V), the full model's logits (W+1,V).

        Returns how many are accepted and the full model's token after them.
        """

    def choose(self, logits: Tensor) -> int:
        """logits (V) of the full model -> its own token: plain decoding."""


class Greedy:
    """The most likely token; ties go to the lower id."""

    def propose(self, logits: Tensor) -> tuple[int, float, Tensor]:
        """logits (V) -> argmax, its probability, the logits."""
        logits = logits.float()
        top, token = logits.max(-1)
        return int(token), float((top - logits.logsumexp(-1)).exp()), logits

    def verify(self, drafted: list[int], drafts: list[Tensor], logits: Tensor) -> tuple[int, int]:
        """The longest prefix that the full model would have written itself."""
        choices = logits.argmax(-1).tolist()
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == choices[accepted]:
            accepted += 1
        return accepted, choices[accepted]

    def choose(self, logits: Tensor) -> int:
        """The argmax of logits (V)."""
        return int(logits.argmax())


class Sampled:
    """Tokens drawn at a temperature from the smallest set of probability `top_p`.

    Draft and full model are warped alike, so the output has the warped full model's distribution.
    Draws come from an own generator on the CPU: the same seed gives the same tokens.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: above 0, or the greedy rule")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}: expected a share in (0, 1]")
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def distribution(self, logits: Tensor) -> Tensor:
        """logits (...,V) -> probabilities (...,V) in double precision, on the CPU."""
        warped = (logits.detach().cpu().double() / self.temperature).softmax(-1)
        if self.top_p == 1:
            return warped
        ordered, index = warped.sort(-1, descending=True)
        # a token stays while the mass before it is below top_p: the first one always does
        outside = ordered.cumsum(-1) - ordered >= self.top_p
        kept = torch.zeros_like(warped).scatter(-1, index, ordered.masked_fill(outside, 0.0))
        return kept / kept.sum(-1, keepdim=True)

    def draw(self, weights: Tensor) -> int:
        """A token from weights (V), which need not add up to 1."""
        return int(torch.multinomial(weights, 1, generator=self.generator))

    def propose(self, logits: Tensor) -> tuple[int, float, Tensor]:
        """logits (V) -> a drawn token, the distribution's largest probability, q (V)."""
        q = self.distribution(logits)
        return self.draw(q), float(q.max()), q

    def verify(self, drafted: list[int], drafts: list[Tensor], logits: Tensor) -> tuple[int, int]:
        """Accept with min(1, p/q); the first rejected token is drawn from the residual."""
        p = self.distribution(logits)
        for index, (token, q) in enumerate(zip(drafted, drafts, strict=True)):
            uniform = float(torch.rand((), dtype=torch.float64, generator=self.generator))
            if uniform * float(q[token]) < float(p[index, token]):
                continue
            residual = (p[index] - q).clamp(min=0)
            # p = q up to rounding leaves nothing: then a draw from p is a draw from q
            return index, self.draw(residual if float(residual.sum()) > 0 else p[index])
        return len(drafted), self.draw(p[len(drafted)])

    def choose(self, logits: Tensor) -> int:
        """A token of the full model's distribution."""
        return self.draw(self.distribution(logits))


def rule_for(temperature: float, top_p: float = 1.0, seed: int = 0) -> Rule:
    """The greedy rule at temperature 0, else the sampled one."""
    return Greedy() if temperature == 0 else Sampled(temperature, top_p, seed)
