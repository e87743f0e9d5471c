"""A plan run on what a user gave: tensors checked on the way in; fresh, contiguous or views on the way out."""

import re
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmoe.layout.claims import some
from fmoe.layout.eager.kinds import QUANTISED, movable
from fmoe.layout.pipeline import Plan
from fmoe.layout.sharded.mesh import distributed, experts_of_rank, placed
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError, Params, Problem, TensorSpec, brief

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def specs_of(values: Any) -> dict[str, TensorSpec]:
    """Every value's shape and dtype, sorted by name, so that nothing that follows depends on the order of a dict.

    Raises AdapterError for what is no mapping of names to tensors, and naming each that is no tensor and no TensorSpec.
    """
    if not isinstance(values, Mapping):
        raise AdapterError(f"a {type(values).__name__}, expected a dict of names to tensors{_instead(values)}")
    try:
        specs = {
            n: v
            if type(v := values[n]) is TensorSpec and type(v.shape) is tuple
            else TensorSpec(tuple(v.shape), v.dtype)
            for n in sorted(values)
        }
        sound = all(map(_is_tensor, values.values())) and all(map(_is_sized, set(specs.values())))
    except (AttributeError, TypeError, RuntimeError):
        sound = False
    if not sound:
        raise AdapterError([p for name, value in values.items() for p in _no_tensor(name, value)])
    return specs


def _instead(values: Any) -> str:
    if isinstance(values, str | PathLike):
        return f". Fix: fmoe.load({str(values)!r}) reads a directory"
    return ". Fix: pass its state_dict()" if isinstance(values, torch.nn.Module) else ""


def _is_tensor(value: Any) -> bool:
    return type(value) is TensorSpec or isinstance(value, Tensor) and value.layout is torch.strided


def _is_sized(spec: TensorSpec) -> bool:
    return (
        isinstance(spec.dtype, torch.dtype)
        and spec.dtype not in QUANTISED
        and all(isinstance(n, int | torch.SymInt) for n in spec.shape)
        and (min(spec.shape, default=0) >= 0 and spec.numel < 1 << 63)
    )


def _no_tensor(name: object, value: Any) -> list[Problem]:
    if not isinstance(name, str):
        return [Problem(f"{name!r}: a key that is a {type(name).__name__}, expected a name", (str(name),))]
    what, fix = type(value).__name__, ""
    try:
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            what = f"tensor of layout {value.layout}"
        elif value.dtype in QUANTISED:
            what, fix = f"tensor of {value.dtype}, which has a scale of its own", ". Fix: dequantize() it"
        elif _is_tensor(value) and _is_sized(TensorSpec(tuple(value.shape), value.dtype)):
            return []
    except (AttributeError, TypeError, RuntimeError):
        pass
    what += " of sizes that no tensor has" if isinstance(value, TensorSpec) and not fix else ""
    return [Problem(f"{name!r}: a {what}, expected a tensor or a TensorSpec{fix}", (name,))]


def run(
    plan: Plan,
    params: Mapping[str, Any],
    only: Iterable[str] | None = None,
    copy: bool = False,
    contiguous: bool = False,
) -> dict[str, Any]:
    if any(isinstance(v, TensorSpec) for v in params.values()):
        return {n: plan.targets[n] for n in (plan.targets if only is None else only)}
    out = plan.run(params, only)
    with movable(out):
        if copy:
            storage = lambda t: (t.to_local() if is_dtensor(t) else t).untyped_storage()._cdata
            given = set(map(storage, params.values()))
            out = {n: t.clone() if storage(t) in given else t for n, t in out.items()}
        return {n: t.contiguous() for n, t in out.items()} if contiguous else out


def on_mesh(
    plan: Callable[[dict[str, range]], Plan],
    hf: Mapping[str, Any],
    mesh: "DeviceMesh",
    asked: Mapping[str, range],
    **how: bool,
) -> dict[str, Any]:
    """This rank's part of what comes out, as DTensors on the mesh: its experts, and its slice along `ep_shard`.

    plan: the plan for ranges of axes. asked: the ranges that the caller names, which have to be none.
    """
    if not hasattr(mesh, "mesh_dim_names"):
        raise AdapterError(f"device_mesh is {brief(mesh)}, expected a DeviceMesh")
    if asked:
        raise AdapterError(f"{', '.join(asked)}: the device mesh says which experts are this rank's")
    whole = plan({})
    if any(isinstance(v, TensorSpec) for v in hf.values()):
        return dict(whole.targets)
    stacks, mine = experts_of_rank(whole, mesh)
    cut = stacks.keys() - placed(whole, hf, stacks)
    made = run(whole, hf, [n for n in whole.targets if n not in cut], **how)
    local = run(plan({"e": mine}), hf, [n for n in whole.targets if n in cut], **how) if cut else {}
    made |= {n: distributed(t, mesh, stacks[n].shape) for n, t in local.items()}
    return {n: made[n] for n in whole.targets if n in made}


def one(fqn: str, tensor: Any) -> dict[str, Any]:
    """A dict of one tensor. Raises AdapterError for what is no name."""
    if not isinstance(fqn, str):
        raise AdapterError(f"fqn is {brief(fqn)}, expected the name of a tensor")
    return {fqn: tensor}


def without(tensors: dict[str, Any], exclude_key_regex: str | None) -> dict[str, Any]:
    if exclude_key_regex is None:
        return tensors
    left_out = pattern(exclude_key_regex)
    return {n: t for n, t in tensors.items() if not left_out.match(n)}


def pattern(exclude_key_regex: object) -> re.Pattern[str]:
    """The names to leave out. Raises AdapterError for what is no regular expression."""
    try:
        if isinstance(exclude_key_regex, str):
            return re.compile(exclude_key_regex)
        why = "it is no text"
    except re.error as error:
        why = str(error)
    raise AdapterError(f"exclude_key_regex is {brief(exclude_key_regex)}, expected a regular expression: {why}")


class Views(dict[str, Tensor]):
    """HF name -> strided view into native storage: whoever writes into it has loaded the model.

    >>> import fmoe, torch
    >>> adapter = fmoe.rule("w.{e} [d]", "w [e d]")
    >>> native = {"w": torch.zeros(2, 3)}
    >>> views = adapter.views(native)
    >>> _ = views["w.1"].fill_(7)
    >>> native["w"][1].tolist(), views.written(["w.1"]), views.written(["w.0", "w.1"])
    ([7.0, 7.0, 7.0], (), ('w',))
    """

    units: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()

    def written(self, names: Iterable[str] | None = None) -> tuple[str, ...]:
        """The native names that are wholly written once these HF names (default: all) are.

        Raises AdapterError for a name that there is no view of.
        """
        done = set(self if names is None else names)
        if unknown := tuple(sorted(done - self.keys())):
            raise AdapterError([Problem(f"{some(unknown)}: no view has this name, expected a HF name", unknown)])
        return tuple(n for natives, hf in self.units if done.issuperset(hf) for n in natives)


def views_of(plan: Plan, native: Params) -> Views:
    """The plan's way to Hugging Face, as views of native storage. Raises AdapterError for what has none."""
    if specs := [name for name, value in native.items() if isinstance(value, TensorSpec)]:
        raise AdapterError([Problem(f"{some(specs)}: a TensorSpec has no storage: expected tensors", tuple(specs))])
    views = Views(plan.run(native, views=True))
    views.units = tuple((tuple(s), tuple(n for n in t if n in views)) for s, t in plan.units())
    return views
