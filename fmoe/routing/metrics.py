"""How evenly the experts of a model's layers are used, under the names by which training runs are watched."""

from collections.abc import Mapping, Sequence
from operator import index
from statistics import fmean, median
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from fmoe.shapes import counted
from fmoe.types import brief


def load_balance_metrics(
    counts: Mapping[int, Tensor] | Sequence[Tensor] | Tensor,
    aux_losses: Mapping[int, SupportsFloat] | Sequence[SupportsFloat] | Tensor | None = None,
    *,
    detailed: bool = False,
    top_k: int = 5,
) -> dict[str, float]:
    """Of counts c_e [E] of every layer, cv = std(c) / mean(c), utilisation u_e = c_e / mean(c), and what follows.

    counts: [L, E], or those of each layer, in order or by the layer's number. std has E - 1 in its denominator. Dead is
    the share of experts with c_e = 0, diversity exp(entropy of c / sum c) / E. Of a layer without slots cv, u and
    diversity are 0, and of a single expert cv is 0.

    moe/cv_{mean,median,min,max}                            over layers
    moe/expert_utilization_{p25,median,p75,min,max}         over all u; a quarter is the sorted list's n div 4-th
    moe/dead_expert_frac_mean, moe/expert_diversity_{mean,min}, and moe/aux_loss_mean if aux_losses are given
    moe_expert_utilization/layer_{l}_expert_{e}             the top_k least and the top_k most used
    detailed: also moe/layer_{l}/{cv,aux_loss,utilization_mean,dead_expert_frac,expert_diversity}

    Source: NeMo Automodel 0.7.0, moe.load_balance_metrics, whose layers count in the order of their names as text.

    >>> found = load_balance_metrics(torch.tensor([[2, 2, 0, 0], [1, 1, 1, 1]]), top_k=0)
    >>> round(found["moe/cv_max"], 3), found["moe/expert_utilization_max"], found["moe/dead_expert_frac_mean"]
    (1.155, 2.0, 0.25)
    """
    if top_k < 0:
        raise ValueError(f"load_balance_metrics: top_k is {brief(top_k)}, expected an int from 0 on")
    top_k, numbered = index(top_k), _by_layer("counts", counts)
    for layer, own in numbered.items():
        counted("load_balance_metrics", f"counts of layer {layer!r}", own, 1)
    given = {} if aux_losses is None else _by_layer("aux_losses", aux_losses)
    for layer, loss in given.items():
        if isinstance(loss, Tensor):
            counted("load_balance_metrics", f"aux_losses of layer {layer!r}", loss, 0)
    losses = {layer: _float(layer, loss) for layer, loss in given.items()}
    if not numbered:
        return {}
    layers = {l: _layer(c) for l, c in numbered.items()}
    used = sorted((u, l, e) for l, c in numbered.items() for e, u in enumerate(_utilization(c)))
    every = [u for u, _, _ in used]
    cvs, diverse = ([layer[name] for layer in layers.values()] for name in ("cv", "expert_diversity"))
    found = {"cv_mean": fmean(cvs), "cv_median": median(cvs), "cv_min": min(cvs), "cv_max": max(cvs)}
    found |= {"aux_loss_mean": fmean(losses.values())} if losses else {}
    n = len(every)
    quarters = {
        "p25": every[n // 4],
        "median": median(every),
        "p75": every[3 * n // 4],
        "min": every[0],
        "max": every[-1],
    }
    found |= {f"expert_utilization_{name}": u for name, u in quarters.items()}
    found["dead_expert_frac_mean"] = fmean(layer["dead_expert_frac"] for layer in layers.values())
    found |= {"expert_diversity_mean": fmean(diverse), "expert_diversity_min": min(diverse)}
    if detailed:
        found |= {f"layer_{l}/{name}": value for l, layer in layers.items() for name, value in layer.items()}
        found |= {f"layer_{l}/aux_loss": loss for l, loss in losses.items()}
    ends = [*used[:top_k], *used[max(top_k, n - top_k) :]] if top_k > 0 else []
    shown = {f"moe_expert_utilization/layer_{l}_expert_{e}": u for u, l, e in ends}
    return {f"moe/{name}": value for name, value in found.items()} | shown


def _by_layer(name: str, given: Any) -> dict[int, Any]:
    if getattr(given, "ndim", 1) == 0:
        told = f"{name} is a {type(given).__name__} without axes, expected what each layer has"
        raise ValueError(f"load_balance_metrics: {told}")
    return dict(given.items()) if isinstance(given, Mapping) else dict(enumerate(given))


def _float(layer: int, loss: SupportsFloat) -> float:
    try:
        return float(loss)
    except (OverflowError, TypeError):  # an int of more digits than floats have, an array
        told = f"aux_losses of layer {layer!r} is {brief(loss)}, expected a number"
        raise ValueError(f"load_balance_metrics: {told}") from None


def _utilization(counts: Tensor) -> list[float]:
    wide = counts.to(torch.float64)
    return [float(u) for u in wide / wide.mean()] if wide.any() else [0.0] * len(wide)


def _layer(counts: Tensor) -> dict[str, float]:
    wide, used = counts.to(torch.float64), _utilization(counts)
    share = wide / wide.sum().clamp(min=1)
    diversity = float((-torch.special.xlogy(share, share).sum()).exp()) / len(wide) if wide.any() else 0.0
    cv = float(wide.std() / wide.mean()) if len(wide) > 1 and wide.any() else 0.0
    dead = float((wide == 0).double().mean())
    return {"cv": cv, "utilization_mean": fmean(used), "dead_expert_frac": dead, "expert_diversity": diversity}
