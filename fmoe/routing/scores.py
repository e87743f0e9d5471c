"""Score functions by name: what a router ranks, and what weights it makes of what was chosen."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fmoe.types import MoEConfig


class Score(NamedTuple):
    """One row of `SCORES`.

    rank: logits [T, E] -> the scores that selection ranks, before any bias. weigh: the scores of what was chosen [T, K]
    -> its weights; None: they are the weights. group_of: a group of experts is worth so many of its best; None: two
    where there is a correction bias, otherwise one. bias: whether an `e_score_correction_bias` is "taken", "needed", or
    there is "none". mix: (scores, ids [T, K] int64, gone [T, K] bool, config) -> weights, where those of a token's
    choices depend on what was not chosen. loser: the score of experts in groups that lost.
    """

    rank: Callable[[Tensor], Tensor]
    weigh: Callable[[Tensor], Tensor] | None = None
    group_of: int | None = None
    bias: str = "taken"
    mix: Callable[[Tensor, Tensor, Tensor, MoEConfig], Tensor] | None = None
    loser: float = -torch.inf

    @property
    def ranks_logits(self) -> bool:
        """Whether selection ranks the logits as they are."""
        return self.rank is _same


def _same(logits: Tensor) -> Tensor:
    return logits


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _sqrtsoftplus(logits: Tensor) -> Tensor:
    scores = F.softplus(logits)
    # the root of 0 is 0, and its slope, which is infinite, becomes 0: that of an expert not chosen is multiplied by 0
    gone = scores == 0
    return scores.masked_fill(gone, 1).sqrt().masked_fill(gone, 0)


def _sparsemixer(scores: Tensor, ids: Tensor, gone: Tensor, config: MoEConfig) -> Tensor:
    """Of each choice in turn its softmax among those that are left and near: SparseMixer-v2 (arXiv:2409.12136) in eval.

    Near to a choice of score m is what is at most 2 config.router_jitter max(|s|, m) below it.
    """
    left, weights = scores, []
    each = torch.arange(scores.shape[-1], device=scores.device)
    for k in range(ids.shape[-1]):
        chosen = ids[..., k : k + 1]
        best = scores.gather(-1, chosen)
        far = (best - scores) / torch.maximum(scores.abs(), best) > 2 * config.router_jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, chosen))
        left = left.masked_fill((each == chosen) & ~gone[..., k : k + 1], -torch.inf)
    return torch.cat(weights, -1)


SCORES: dict[str, Score] = {
    "softmax": Score(_same, weigh=_softmax, bias="none"),
    "softmax_with_bias": Score(_softmax, bias="needed"),
    "sigmoid": Score(torch.sigmoid),
    "sigmoid_with_bias": Score(torch.sigmoid, bias="needed"),
    "sqrtsoftplus": Score(_sqrtsoftplus),
    # Mistral 4: groups by their two best, unbiased; where a winner's score is 0 too, a loser may be chosen
    "softmax_in_groups": Score(_softmax, group_of=2, bias="none", loser=0.0),
    "sigmoid_of_best_logits": Score(_same, weigh=torch.sigmoid),  # Kolibri: chosen by logit and bias
    "sigmoid_with_losers": Score(torch.sigmoid, loser=0.0),  # A.X-K2: experts of other groups score 0
    "sparsemixer": Score(_same, mix=_sparsemixer, bias="none"),  # Phi-3.5-MoE
}

BEFORE_TOPK = Score(_softmax, bias="none")
"""What "softmax" is with `softmax_before_topk`."""
