"""Whole expert layers: training forward, inference forward, and backward by itself; ours against others.

Others: a fair pipeline on torch's grouped_mm (its gathers have sums for derivatives), a naive one, Transformers'
experts with its grouped_mm, and Liger and ScatterMoE where they can be imported. Each, ours too, must first agree with
the fair pipeline to 2 % in norm.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fmoe_kernels
import torch
from common import DEVICE, DRY, DTYPE, MAIN, SHAPES, Record, Shape, layer, leaves, seconds, trained, tried
from torch import Tensor
from torch.nn import functional as F

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(x: Tensor, indices: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor, **options: Any) -> Tensor:
    return fmoe_kernels.experts(x, indices, weights, None, w_up, w_down, **options)


def fair(x: Tensor, indices: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Sort; expand and gather, so that the gradient of x is a sum; products; gather back and sum."""
    T, K = indices.shape
    ids, order = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(len(w_up), device=x.device), right=True, out_int32=True)
    rows = x[:, None].expand(-1, K, -1).flatten(0, 1).index_select(0, order)
    return _down(F.grouped_mm(rows, w_up, offs=ends), order, ends, weights, w_down)


def naive(x: Tensor, indices: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """The same with x[order // K], whose derivative adds up with index_put."""
    ids, order = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(len(w_up), device=x.device), right=True, out_int32=True)
    return _down(F.grouped_mm(x[order // indices.shape[1]], w_up, offs=ends), order, ends, weights, w_down)


def _down(u: Tensor, order: Tensor, ends: Tensor, weights: Tensor, w_down: Tensor) -> Tensor:
    T, K = weights.shape
    g, v = u.chunk(2, -1)
    rows = F.grouped_mm(F.silu(g) * v, w_down, offs=ends)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=u.device))
    return (rows.index_select(0, inverse).view(T, K, -1) * weights[..., None].to(u.dtype)).sum(1)


def compiled(s: Shape) -> Layer:
    torch._dynamo.reset()  # for each shape: eight of them, and Dynamo would run the rest eagerly
    return torch.compile(fair, dynamic=False)


def transformers(s: Shape) -> Layer:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = dict(hidden_size=s.D, moe_intermediate_size=s.I, num_experts=s.E, num_experts_per_tok=s.K)
    config = Qwen3MoeConfig(**sizes)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)

    def call(x: Tensor, indices: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        parameters = dict(gate_up_proj=w_up.mT, down_proj=w_down.mT)
        return torch.func.functional_call(module, parameters, (x, indices, weights.to(x.dtype)))

    return call


def scattermoe(s: Shape) -> Layer:
    from scattermoe.mlp import GLUMLP

    mlp = GLUMLP(s.D, s.I, s.E, s.K, activation=torch.nn.SiLU()).to(DEVICE, DTYPE)

    def call(x: Tensor, indices: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        # its output columns are [up, gate]
        swapped = torch.cat([w_up[..., s.I :], w_up[..., : s.I]], -1).mT
        parameters = {"experts.weight": swapped, "output_experts.weight": w_down.mT}
        return torch.func.functional_call(mlp, parameters, (x, weights.to(x.dtype), indices))

    return call


def liger(s: Shape) -> Layer:
    from liger_kernel.ops import LigerFusedMoEFunction

    return lambda x, indices, weights, w_up, w_down: LigerFusedMoEFunction.apply(
        x, w_up.mT, w_down.mT, indices.int(), weights.to(x.dtype)
    )


LAYERS: dict[str, Callable[[Shape], Layer]] = {
    "ours": lambda s: ours,
    "grouped_mm, fair": lambda s: fair,
    "transformers": transformers,
    "liger": liger,
    "scattermoe": scattermoe,
    "grouped_mm, naive": lambda s: naive,
    "grouped_mm, compiled": compiled,
    "ours, recompute": lambda s: partial(ours, recompute=True),
}
if DRY:
    del LAYERS["grouped_mm, compiled"]  # fake tensors of grouped_mm are bf16 only


def times(s: Shape, f: Layer, args: tuple[Tensor, ...], expected: Tensor) -> dict[str, Any]:
    """ms and TFLOP/s of a training forward, an inference forward, and a backward alone."""
    with torch.no_grad():
        apart = ((f(*args) - expected).norm() / expected.norm()).item()
        if not apart < 0.02:
            raise ValueError(f"differs from the fair pipeline by {apart:.3g} in norm")
        inference = seconds(lambda: f(*args))
    inputs, made = leaves(args), []
    dy = torch.randn_like(args[0])
    training = seconds(lambda: f(*inputs))
    again = lambda: (made.clear(), made.append(f(*inputs)))
    backward = seconds(lambda: torch.autograd.grad(made[0], trained(inputs), dy), before=again)
    flops = s.forward_flops
    return dict(
        forward_ms=1e3 * training, inference_ms=1e3 * inference, backward_ms=1e3 * backward,
        forward_tflops=flops / training / 1e12, inference_tflops=flops / inference / 1e12,
        backward_tflops=2 * flops / backward / 1e12, both_tflops=3 * flops / (training + backward) / 1e12,
    )  # fmt: skip


def main(record: Record, table: str = "") -> None:
    """With a table of tiles in OUT: our layer alone, without it and with it."""
    import os

    made = Path(os.environ["OUT"]) / table if table else None
    if made is not None and not made.exists():
        return record(reason=f"{table} was not written: the sweep did not get there")
    swept: dict[str, Callable[[Shape], Layer]] = {"ours, swept": lambda s: partial(ours, table=str(made))}
    makers = {"ours": LAYERS["ours"]} | swept if table else LAYERS
    cases = [(name, False) for name in MAIN] + [(MAIN[0], True)] + [(name, False) for name in list(SHAPES)[3:]]
    cases = cases[:1] if DRY else cases[: 3 if table else None]
    late = {"grouped_mm, compiled"} & set(makers)  # compiling takes longer than all that is measured
    for turn in (makers.keys() - late, late) if late else (makers.keys(),):
        for name, skew in cases:
            s = SHAPES[name]
            args = layer(s, skew=skew)
            with torch.no_grad():
                expected = fair(*args)
            for who, make in makers.items():
                one = lambda make=make, s=s, args=args, expected=expected: times(s, make(s), args, expected)
                if who in turn:
                    tried(record, one, layer=who, shape=name, skew=skew)
                if not DRY:
                    torch.cuda.empty_cache()
