"""What `experts` is given, checked before anything is multiplied."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fmoe.activations import is_gated_activation, is_interleaved
from fmoe.backends.held import shapes, stacks
from fmoe.shapes import NORM, all_tensors, check_params, odd, said
from fmoe.sharding import is_dtensor
from fmoe.types import INTEGERS, MoEConfig, Params, Routing

AXES = {
    "gate_and_up_projs": "E D U",
    "down_projs": "E I D",
    "gate_up_proj_bias": "E U",
    "down_proj_bias": "E D",
    "lora_gate_and_up_A": "E D r",
    "lora_gate_and_up_B": "E r U",
    "lora_down_A": "E I r",
    "lora_down_B": "E r D",
}
PAIRS = {f"lora_{part}_{a}": f"lora_{part}_{b}" for part in ("gate_and_up", "down") for a, b in ("AB", "BA")}


def as_routing(routing: tuple[Any, ...]) -> Routing:
    """A Routing of such a tuple, ids in int64. Raises ValueError for anything else."""
    if not isinstance(routing, tuple) or len(routing) not in (2, 3):
        found = f"{type(routing).__name__} of {len(routing)}" if isinstance(routing, tuple) else type(routing).__name__
        raise ValueError(f"experts: routing is a {found}, expected Routing(indices, weights, mask) or such a tuple")
    indices, weights, mask = made = Routing(*routing)
    if not (isinstance(indices, Tensor) and isinstance(weights, Tensor) and (mask is None or isinstance(mask, Tensor))):
        named = made._asdict().items()
        name, t = next((n, t) for n, t in named if not isinstance(t, Tensor) and (n != "mask" or t is not None))
        raise ValueError(f"experts: routing.{name} is a {type(t).__name__}, expected a tensor")
    if indices.dtype is torch.int64 or indices.dtype not in INTEGERS:
        return made
    return Routing(indices.long(), weights, mask)


def _computes(tensor: Tensor) -> bool:
    """Is it a float that arithmetic takes? FP8 is stored, and never added."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def check_tokens(x: Tensor, routing: Routing, config: MoEConfig) -> None:
    indices, weights, mask = routing
    every = {"x": x, "routing.indices": indices, "routing.weights": weights, "routing.mask": mask}
    given = {name: t for name, t in every.items() if t is not None}
    all_tensors("experts", {"x": x, **given}, "")
    T, D = x.shape[0] if x.ndim else 0, config.expert_dim
    fits = {
        "x": x.ndim == 2 and x.shape[1] == D and _computes(x),
        "routing.indices": indices.ndim == 2 and indices.shape[0] == T and indices.dtype in INTEGERS,
        "routing.weights": weights.shape == indices.shape and _computes(weights),
        "routing.mask": mask is None or (mask.ndim == 1 and mask.shape[0] == T and mask.dtype == torch.bool),
    }
    # a size that is told is a size that torch.compile holds fixed: so only what is wrong is told
    if wrong := [name for name, ok in fits.items() if not ok]:
        expected = {
            "x": f"floating [T, D={D}]",
            "routing.indices": f"integer [T={T}, K]",
            "routing.weights": f"floating {list(indices.shape)}, the shape of routing.indices",
            "routing.mask": f"bool [T={T}]",
        }
        raise ValueError(
            "\n".join(f"experts: {name} is {_say(every[name])}, expected {expected[name]}" for name in wrong)
        )
    if strange := odd(given, x.device):
        raise ValueError("\n".join(f"experts: {told}" for told in strange))


def check_experts(
    params: Params,
    config: MoEConfig,
    where: torch.device,
    *,
    n_experts: int,
    coded: Mapping[str, str] = MappingProxyType({}),
    axes: Mapping[str, str] = AXES,
    U: int | None = None,
) -> None:
    """Raises ValueError for parameters of experts that do not fit. U: the width of u, where config does not say it."""
    if named := [name for name, p in params.items() if is_dtensor(p)]:
        told = "expected this rank's experts: fmoe.parallel.local_params(params) gives them"
        raise ValueError(f"experts: {named[0]!r} is a DTensor, {told}")
    I = config.moe_inter_dim
    U = U or (2 * I if is_gated_activation(config.expert_activation) else I)
    sizes = dict(E=n_experts, D=config.expert_dim, I=I, U=U)
    for name, other in PAIRS.items():
        if name in params and other not in params:
            raise ValueError(f"experts: parameter {name!r} stands alone, expected {other!r} beside it")
    matrices = {name: p for name, p in params.items() if name in PAIRS and name.endswith("_A")}
    sizes["r"] = next((p.shape[-1] for p in matrices.values()), 0)
    if matrices and not sizes["r"]:
        raise ValueError(f"experts: {next(iter(matrices))!r} has rank r=0, expected r >= 1. Fix: leave the pair out")
    if uneven := [name for name, p in matrices.items() if p.ndim == 4 or p.shape[-1] != sizes["r"]]:
        told = f"{list(matrices[uneven[0]].shape)}, expected [E, n, r={sizes['r']}] of one rank"
        how = f", interleaved={is_interleaved(config.expert_activation)}" * (matrices[uneven[0]].ndim == 4)
        raise ValueError(f"experts: {uneven[0]!r} is {told}: fmoe.lora.even(lora, scale{how}) makes such of any others")
    biases = () if config.expert_bias else ("gate_up_proj_bias", "down_proj_bias")
    axes = axes if said(config, "expert_norm_eps") is None else {**axes, NORM: "D"}
    sized = shapes(params, coded) if coded else {}
    check_params("experts", params, axes, sizes, where=where, optional=(*biases, *PAIRS), coded=sized)
    if coded and not torch.compiler.is_compiling():  # a compiler's graph finds it out when it runs
        stacks(params, config, torch.float32)


def check_made(y: Any, x: Tensor) -> Tensor:
    """What a backend that is a function made of rows x. Raises ValueError for what is no rows like these."""
    if not isinstance(y, Tensor):
        raise ValueError(f"experts: backend= gave a {type(y).__name__}, expected a tensor {list(x.shape)}")
    if y.shape != x.shape or not _computes(y) or y.device != x.device:
        found, expected = f"{_say(y)} on {y.device}", f"floating {list(x.shape)} on {x.device}"
        raise ValueError(f"experts: backend= gave {found}, expected {expected}, a row for each that it was given")
    return y


def _say(t: Tensor | None) -> str:
    return "None" if t is None else f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
