"""Which weights of a layer are codes, and what they say."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fmoe.activations import is_interleaved
from fmoe.codecs.stacks import Codes, is_code, packed, stack, suffix_of
from fmoe.types import MoEConfig, Params

WEIGHTS = ("gate_and_up_projs", "down_projs")


def in_codes(params: Params) -> dict[str, str]:
    """The weights that are codes with scales beside them, and what is added to the name of each for that of its scales.

    Raises ValueError for two such scales, and for codes that require a gradient.

    >>> names = ["down_projs", "down_projs_scale_inv"]
    >>> in_codes(dict.fromkeys(names, torch.zeros(1, 1, 1, dtype=torch.uint8)))
    {'down_projs': '_scale_inv'}
    """
    found: dict[str, str] = {}
    for name in WEIGHTS:
        if isinstance(params.get(name), Tensor) and is_code(params[name]):
            suffix = suffix_of(name, params)  # in a comprehension, a compiler cannot follow it
            if suffix is not None:
                found[name] = suffix
    if trained := [name for name in found if params[name].requires_grad]:
        told = f"parameter {trained[0]!r} is codes and requires a gradient, expected it frozen: there is none"
        raise ValueError(f"experts: {told}. Fix: train LoRA matrices beside it, or decode it")
    return found


def shapes(params: Params, found: Mapping[str, str]) -> dict[str, list[int]]:
    """The shapes [E, K, M] of the weights that are codes."""
    turn = lambda s, n: [*s[:1], s[1] * n, *s[2:]] if len(s) > 1 else [*s]
    return {name: turn(params[name].shape, packed(suffix, params[name].dtype)) for name, suffix in found.items()}


def stacks(params: Params, config: MoEConfig, dtype: torch.dtype) -> dict[str, Codes]:
    """The weights that are codes, as matrices in dtype. Raises ValueError, with the name, for what is of no format."""
    return {name: held(*parts(params, name, config), dtype) for name in in_codes(params)}


def parts(params: Params, name: str, config: MoEConfig) -> tuple[Tensor, Tensor, Tensor | None, str, str, bool]:
    """(codes, scale, second, name, suffix, whether columns of gate and up take turns) of a weight."""
    suffix = suffix_of(name, params) or ""
    alternate = is_interleaved(config.expert_activation) and name == WEIGHTS[0]
    second, third = (params.get(f"{name}{suffix}_{end}") for end in ("second", "third"))
    second = second if second is None or third is None else second.float() / third.float()
    return params[name], params[name + suffix], second, name, suffix, alternate


def held(
    codes: Tensor, scale: Tensor, second: Tensor | None, name: str, suffix: str, alternate: bool, dtype: torch.dtype
) -> Codes:
    """`stack`, whose errors have the weight's name."""
    try:
        made = stack(codes, scale, second, suffix, dtype, alternate=alternate)
        return replace(made, name=f"experts: parameter {name!r}")
    except ValueError as error:
        raise ValueError(f"experts: parameter {name!r} is {error}") from error
