"""Score functions by name: what a router ranks, and what weights it makes of what was chosen."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Score(NamedTuple):
    """One row of `SCORES`.

    rank: logits [T, E] -> the scores that selection ranks, before any bias. weigh: the scores of what was chosen [T, K]
    -> its weights; None: they are the weights. group_of: a group of experts is worth so many of its best; None: two
    where there is a correction bias, otherwise one. bias: whether an `e_score_correction_bias` is "taken", "needed", or
    there is "none".
    """

    rank: Callable[[Tensor], Tensor]
    weigh: Callable[[Tensor], Tensor] | None = None
    group_of: int | None = None
    bias: str = "taken"


def _same(logits: Tensor) -> Tensor:
    return logits


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _sqrtsoftplus(logits: Tensor) -> Tensor:
    # at 0 the root's slope is infinite, and the slope of an expert that is not selected is multiplied by 0
    return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()


SCORES: dict[str, Score] = {
    "softmax": Score(_same, weigh=_softmax, bias="none"),
    "softmax_with_bias": Score(_softmax, bias="needed"),
    "sigmoid": Score(torch.sigmoid),
    "sigmoid_with_bias": Score(torch.sigmoid, bias="needed"),
    "sqrtsoftplus": Score(_sqrtsoftplus),
    "softmax_in_groups": Score(_softmax, group_of=2, bias="none"),  # Mistral 4: groups by their two best, unbiased
    "sigmoid_of_best_logits": Score(_same, weigh=torch.sigmoid),  # Kolibri: chosen by logit and bias
}

BEFORE_TOPK = Score(_softmax, bias="none")
"""What "softmax" is with `softmax_before_topk`."""
