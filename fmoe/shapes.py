"""Names, shapes, dtypes, devices and kinds of a layer's tensors, checked before anything is multiplied."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fmoe.codecs.stacks import is_beside, is_code
from fmoe.folding import meant
from fmoe.types import MoEConfig, Params, brief

PLAIN, FLOATS = (Tensor, Parameter), (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DECODED = "expected it decoded: floating, of 16 bits or more. Fix: fmoe.load decodes, and so does `from_hf`"
NORM = "post_expert_norm.weight"
"""The one parameter of `fmoe.experts` that is of all experts together."""


def check_params(
    owner: str,
    params: Params,
    axes: Mapping[str, str],
    sizes: Mapping[str, int],
    *,
    where: torch.device,
    optional: Collection[str] = (),
    coded: Mapping[str, Sequence[int]] = MappingProxyType({}),
    beside: Sequence[str] = (),
) -> None:
    """params has every name of `axes` that is not optional, no other name, and each the shape that its letters say.

    Scales that a decoded parameter carries along are passed over; codes, not decoded, are refused unless `coded` has
    their name, with the shape of what they say.
    axes maps a name to the letters of its axes, such as "E D U" or "1 D"; sizes maps each letter to a number. where:
    the device of x, which has to be that of every parameter; each is a plain tensor, see `odd`. beside: further names
    that the caller takes, and checks elsewhere.
    Raises ValueError with one line for each problem: what was found, what was expected.

    >>> import torch
    >>> params, axes, where = {"down_projs": torch.ones(2, 5, 3)}, {"down_projs": "E I D"}, torch.device("cpu")
    >>> check_params("experts", params, axes, dict(E=2, I=4, D=3), where=where)
    Traceback (most recent call last):
    ValueError: experts: parameter 'down_projs' has shape [2, 5, 3], expected [E=2, I=4, D=3]
    """
    all_tensors(owner, params)
    taken = ", ".join([*beside, *axes])
    unknown = [
        f"unknown parameter {name!r}, expected only {taken}{meant(name, [*beside, *axes])}"
        for name in params
        if name not in axes and not is_beside(name, axes)
    ]
    undecoded = [
        f"parameter {name!r} is {tensor.dtype}, expected it decoded, as `from_hf` does, or its scales beside it"
        for name, tensor in params.items()
        if name in axes and name not in coded and is_code(tensor)
    ]
    missing = [
        f"parameter {name!r} is missing, expected shape {_say(letters, sizes)}"
        for name, letters in axes.items()
        if name not in params and name not in optional
    ]
    wrong = [
        f"parameter {name!r} has shape {[*coded.get(name, params[name].shape)]}, expected {_say(letters, sizes)}"
        for name, letters in axes.items()
        if name in params and [*coded.get(name, params[name].shape)] != _shape(letters, sizes)
    ]
    strange = [f"parameter {told}" for told in odd(params, where)]
    if problems := unknown + missing + wrong + undecoded + strange:
        raise ValueError("\n".join(f"{owner}: {problem}" for problem in problems))


def check_level(owner: str, params: Params, needed: Sequence[str]) -> None:
    """Raises ValueError where params has the names of a whole model, or of the experts in a block alone.

    >>> import torch
    >>> check_level("experts", {"layers.3.mlp.experts.down_projs": torch.ones(1)}, ["down_projs"])
    Traceback (most recent call last):
    ValueError: experts: params has 'layers.3.mlp.experts.down_projs', expected 'down_projs': the names of one layer.
    Fix: fmoe.subtree(params, 'layers.3.mlp.experts')
    """
    if not hasattr(params, "items") or not all(isinstance(name, str) for name in params):
        raise ValueError(f"{owner}: params is {brief(params)}, expected a dict of tensors by name")
    alone = [name for name in ("gate_and_up_projs", "down_projs") if name in params and name not in needed]
    for name in needed:
        if alone and name not in params:
            fix = "fmoe.subtree(native, 'model.layers.0.mlp'), or fmoe.experts with a routing"
            raise ValueError(f"{owner}: params are of experts alone, expected the whole block.\nFix: {fix}")
    for name in needed:
        if name in params:
            return
    found = {name[: -len(bare) - 1]: (name, bare) for bare in needed for name in params if name.endswith(f".{bare}")}
    if found:
        prefix, (name, bare) = next(iter(found.items()))
        told = f"params has {name!r}, expected {bare!r}: the names of one layer"
        more = f", or another of {len(found)} such prefixes" if len(found) > 1 else ""
        raise ValueError(f"{owner}: {told}.\nFix: fmoe.subtree(params, {prefix!r}){more}")


def check_config(owner: str, config: object) -> None:
    """Raises ValueError where config is no MoEConfig, nor has its fields, as that of NeMo Automodel has.

    >>> check_config("moe", {"num_experts": 8})
    Traceback (most recent call last):
    ValueError: moe: config is a dict, expected an fmoe.MoEConfig. Fix: fmoe.adapter('qwen3_moe', config).moe_config
    """
    if not hasattr(config, "moe_inter_dim"):
        kind = type(config).__name__
        own = kind == "Adapter"
        named = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
        fix = "adapter.moe_config" if own else f"fmoe.adapter({named or 'qwen3_moe'!r}, config).moe_config"
        told = f"{'an' if own else 'a'} {kind}, expected an fmoe.MoEConfig"
        raise ValueError(f"{owner}: config is {told}. Fix: {fix}")


QUANTISERS = ("bitsandbytes", "torchao", "torch.masked", "torch.sparse")
"""Libraries whose tensors are numbers of another format, whatever their dtype says; of PyTorch, what has no strides."""


def odd(tensors: Mapping[str, Tensor], where: torch.device) -> list[str]:
    """Which tensors cannot be computed with beside an x on the device `where`, and why: a line for each.

    They are on another device, have no strides, or are of a class that answers operators itself, as the quantised
    weights of torchao do: their numbers are not those of their storage.

    >>> odd({"down_projs": torch.ones(1, device="meta")}, torch.device("cpu"))
    ["'down_projs' is on meta, where tensors have no data, expected cpu, where x is. Fix: load its data first"]
    """
    return [told for told in [_odd(name, tensor, where) for name, tensor in tensors.items()] if told]


def check_held(owner: str, held: Mapping[str, Tensor | None], where: torch.device) -> None:
    """Raises ValueError for what a module holds that is codes, or on another device than x, `where`.

    Tensors of other classes are let through: what a module calls on its own tensor they may answer.
    """
    for name, t in held.items():
        if t is not None and (told := _elsewhere(name, t, where) or f"{name!r} is {t.dtype}, {DECODED}" * is_code(t)):
            raise ValueError(f"{owner}: parameter {told}")


def computed_with(owner: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError for what arithmetic does not take: no tensor, a nested one, complex numbers, stored FP8."""
    if type(tensor) in PLAIN and tensor.dtype in FLOATS and tensor.layout is torch.strided and not tensor.is_nested:
        return  # as nearly always, and for each token that is decoded
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{owner}: {name} is a {type(tensor).__name__}, expected a tensor")
    no_nested(owner, {name: tensor})
    if tensor.layout != torch.strided:
        raise ValueError(f"{owner}: {name} is {tensor.layout}, expected a strided tensor. Fix: .to_dense()")
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        raise ValueError(f"{owner}: {name} is {tensor.dtype}, expected floating, of 16 bits or more")


def counted(owner: str, name: str, tensor: Any, ndim: int) -> None:
    """Raises ValueError for what the host cannot read as real numbers along so many axes.

    >>> counted("load", "counts", torch.tensor(3), 1)
    Traceback (most recent call last):
    ValueError: load: counts is torch.int64 [] on cpu, expected real numbers with data, along 1 axis
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{owner}: {name} is a {type(tensor).__name__}, expected a tensor")
    no_nested(owner, {name: tensor})
    if tensor.is_meta or tensor.is_complex() or tensor.layout != torch.strided or tensor.ndim != ndim:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        found += "" if tensor.layout == torch.strided else f", {tensor.layout}"
        axes = f"{ndim} ax{'i' if ndim == 1 else 'e'}s"
        raise ValueError(f"{owner}: {name} is {found}, expected real numbers with data, along {axes}")


def all_tensors(owner: str, given: Mapping[str, Any], what: str = "parameter ") -> None:
    """Raises ValueError for what is no tensor, or a nested one.

    >>> all_tensors("moe", {"mask": [True]}, "")
    Traceback (most recent call last):
    ValueError: moe: 'mask' is a list, expected a tensor
    """
    if foreign := [f"{n!r} is a {type(p).__name__}" for n, p in given.items() if not isinstance(p, Tensor)]:
        raise ValueError("\n".join(f"{owner}: {what}{told}, expected a tensor" for told in foreign))
    no_nested(owner, given)


def no_nested(owner: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a nested tensor: it has no sizes that could be compared."""
    if nested := [name for name, tensor in tensors.items() if tensor.is_nested]:
        fix = "Fix: torch.stack(tensor.unbind())"
        raise ValueError("\n".join(f"{owner}: {n!r} is a nested tensor, expected a plain one. {fix}" for n in nested))


def _odd(name: str, tensor: Tensor, where: torch.device) -> str:
    if type(tensor) not in PLAIN and _is_wrapper(kind := type(tensor)):
        fix = "dequantise it, or load the checkpoint with fmoe.load, which decodes"
        return f"{name!r} is a {kind.__module__}.{kind.__qualname__}, expected a plain tensor. Fix: {fix}"
    if tensor.layout != torch.strided:
        return f"{name!r} is {tensor.layout}, expected a strided tensor. Fix: .to_dense()"
    return _elsewhere(name, tensor, where)


def _elsewhere(name: str, tensor: Tensor, where: torch.device) -> str:
    if tensor.device == where:
        return ""
    empty = ", where tensors have no data" if tensor.device.type == "meta" else ""
    other = "make that one real: on meta there is no data" if where.type == "meta" else "move it there"
    fix = "load its data first" if empty else other
    return f"{name!r} is on {tensor.device}{empty}, expected {where}, where x is. Fix: {fix}"


def _is_wrapper(kind: type) -> bool:
    """Is it a class of tensors, not of PyTorch itself, that answers operators, or a quantiser's?"""
    if kind.__module__.startswith(QUANTISERS):
        return True
    own = (c for c in kind.__mro__ if not issubclass(Tensor, c) and not c.__module__.startswith("torch."))
    return any("__torch_dispatch__" in vars(c) for c in own)


def in_shape(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y, which nothing else holds, in another shape: no copy, and to autograd no view, so that it may be added to.

    An in-place operation on a view rewrites the history of its base, and drops the hook that FSDP2 has put on the view.

    >>> in_shape(torch.ones(2, 3, requires_grad=True) * 2, (3, 2))._is_view()
    False
    """
    return y if [*y.shape] == [*shape] else torch.ops.aten._unsafe_view(y.contiguous(), shape)


def _shape(letters: str, sizes: Mapping[str, int]) -> list[int]:
    return [int(letter) if letter.isdigit() else sizes[letter] for letter in letters.split()]


def _say(letters: str, sizes: Mapping[str, int]) -> str:
    return "[" + ", ".join(a if a.isdigit() else f"{a}={sizes[a]}" for a in letters.split()) + "]"


def said(config: MoEConfig, name: str) -> Any:
    """A field of a config, or its default where another library's config has no such field.

    >>> said(MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1), "n_zero_experts")
    0
    """
    value = getattr(config, name, MoEConfig)
    return MoEConfig.__dataclass_fields__[name].default if value is MoEConfig else value


def n_ranked(config: MoEConfig) -> int:
    """E + Z: how many choices a router has."""
    zero: int = said(config, "n_zero_experts")
    return config.n_routed_experts + zero
