"""A directory as native parameters: mapped where strides allow, made in memory where experts are stacked."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.files.mapped import Maps, fetch, mapped
from fmoe.checkpoint.files.origin import held_ranges
from fmoe.checkpoint.open import adapter_of, plan_from
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.stream.carry import in_order, pool, threads_of
from fmoe.checkpoint.stream.overlaps import overlapping, without_twins
from fmoe.checkpoint.stream.slices import narrowing, read
from fmoe.checkpoint.which import open_ours
from fmoe.checkpoint.whole import warned, whole
from fmoe.codecs.cast import CastExperts, all_of, held
from fmoe.families.kind import as_dict
from fmoe.layout.adapter import Adapter
from fmoe.layout.grouping import Specs
from fmoe.layout.pipeline import Plan
from fmoe.layout.sharded.mesh import distributed, experts_of_rank
from fmoe.types import AdapterError, Params, Problem, TensorSpec, as_dtype, brief

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def load(
    path: Where | str,
    device: "torch.device | str | None" = None,
    device_mesh: "DeviceMesh | None" = None,
    *,
    out: Params | None = None,
    mmap: bool = True,
    threads: int | None = None,
    cast: str = "experts",
    **choices: Any,
) -> dict[str, Any]:
    """The native parameters of a directory, Hugging Face's or native: `from_hf` of its tensors.

    Tensors that are views of the files stay so: mapped into memory, read when they are looked at, never written back
    (the files must stay as they are for as long as the tensors live). Stacks of experts are made in memory. mmap=False:
    everything is read into memory, so that a file cut short on a network disk is an error, and not the end of the
    process.

    device: where they go ("meta": shapes and dtypes only). device_mesh: this rank's experts, as DTensors. out: native
    tensors, all of them, to be filled in place and returned; both names of a tied weight may be one tensor. choices: as
    in `fmoe.adapter`; adapter=: one of your own; a range is one of an axis, as `e=range(0, 16)`, and only its bytes are
    read.

    dtype= casts the experts and nothing else. With cast="all" it casts the other tensors too. Integers, quantised parts
    and what is kept in fp32 stay as they are: correction biases, `A_log`, `dt_bias`, and every tensor that is stored in
    fp32 although the config names a narrower dtype.

    Raises AdapterError with every problem found. Warns (`fmoe.CheckpointWarning`), once, where something may be missing
    or could not be compared, as where config.json names no class and the usual one has more than is there.

    >>> import fmoe, tempfile
    >>> block, made = "model.layers.0.mlp.experts", fmoe.adapter("per_expert", {"model_type": "per_expert"})
    >>> params = {f"{block}.gate_and_up_projs": torch.ones(4, 2, 6), f"{block}.down_projs": torch.ones(4, 3, 2)}
    >>> with tempfile.TemporaryDirectory() as path:
    ...     _ = fmoe.save(params, path, made)
    ...     {name: tuple(tensor.shape) for name, tensor in fmoe.load(path, e=range(0, 2)).items()}
    {'model.layers.0.mlp.experts.down_projs': (2, 3, 2), 'model.layers.0.mlp.experts.gate_and_up_projs': (2, 2, 6)}
    """
    place = device_of(device)
    if not isinstance(mmap, bool):
        raise AdapterError(f"mmap is {brief(mmap)}, expected True or False")
    source = open_ours(path, "load", own="adapter" in choices)
    ranges = {n: v for n, v in choices.items() if isinstance(v, range)}
    adapter = adapter_of(source, **{n: v for n, v in choices.items() if n not in ranges})
    specs = plan_from(source, adapter.inverse).targets if source.native else source.specs
    held = held_ranges(source.origin)
    adapter = _casting(adapter, source, specs, held, cast, choices.get("dtype"))
    if source.native:
        warned(whole(source, source.specs, specs, **choices))
        adapter = adapter if "dtype" in choices else _as_stored(adapter, source, specs, held)
    stacks: dict[str, TensorSpec] = {}
    if device_mesh is not None:
        if ranges or out is not None:
            raise AdapterError(f"{', '.join(ranges) or 'out'}: the device mesh says what is this rank's")
        stacks, mine = experts_of_rank(adapter.plan(specs), device_mesh)
        ranges = {"e": mine} if stacks else {}
    if held and ranges:
        raise AdapterError(f"{source.path} holds the range {held} only: no range of that can be asked for")
    if source.native:
        part = adapter._plan(specs, held, frozenset(held)).targets if held else {}
        plan = Plan((), part) if held else adapter.plan(specs, **ranges)
    else:
        plan = plan_from(source, adapter, **ranges)
        warned(whole(source, plan.targets, **choices))
    maps = Maps() if mmap and isinstance(source.path, Path) else None
    if out is not None:
        return _fill(source, adapter, plan, out, ranges, maps)
    if place is not None and place.type == "meta" and device_mesh is None:
        return {n: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for n, spec in plan.targets.items()}
    finish: Callable[[str, Tensor], Any] = lambda n, t: t if place is None else t.to(place)
    if device_mesh is not None:
        at = place or torch.device(device_mesh.device_type)
        finish = lambda n, t: distributed(t.to(at), device_mesh, stacks[n].shape) if n in stacks else t.to(at)
    if source.native:
        return {n: finish(n, t) for n, t in _native(source, plan, maps).items()}
    made: dict[str, Any] = {}
    run = lambda unit: plan.run(inputs(source, plan, unit[0], maps), unit[1])
    with pool(threads_of(threads, source.readers)) as executor:
        for _, tensors in in_order(executor, run, plan.units(), ahead=2 * source.readers if source.readers else 4):
            made |= {n: finish(n, t) for n, t in tensors.items()}
    return {n: made[n] for n in plan.targets}


def device_of(device: "torch.device | str | None") -> torch.device | None:
    """The device of a name. Raises AdapterError for what is none, and for a name that PyTorch knows no device of."""
    told = f"device is {brief(device)}, expected a torch.device or its name, such as 'cuda:0'"
    if not (device is None or isinstance(device, torch.device | str)):
        raise AdapterError(told)
    try:
        return None if device is None else torch.device(device)
    except RuntimeError as error:
        raise AdapterError(f"{told}: {str(error).splitlines()[0]}") from None


def _casting(
    adapter: Adapter, source: Checkpoint, specs: Specs, held: Mapping[str, range], cast: str, dtype: Any
) -> Adapter:
    """The adapter, and after it what casts the tensors that are no experts', if that was asked for."""
    made = specs if cast == "experts" else adapter._plan(specs, held, frozenset(held)).targets
    names = all_of(cast, made, as_dict(source.config))
    if cast == "experts":
        return adapter
    if dtype is None:
        raise AdapterError("cast='all' says what to cast, and no dtype= says to which. Fix: dtype='bfloat16'")
    return adapter >> Adapter((CastExperts(as_dtype(dtype), names),))


def _as_stored(adapter: Adapter, source: Checkpoint, specs: Specs, held: Mapping[str, range]) -> Adapter:
    """The adapter, and after it the dtypes that a native directory's tensors lie in, where nobody asks for others."""
    if all(spec.dtype.is_floating_point and spec.dtype.itemsize > 1 for spec in specs.values()):
        return adapter  # nothing is decoded, so nothing gets another dtype
    made = adapter._plan(specs, held, frozenset(held)).targets
    other = [n for n, spec in source.specs.items() if n in made and made[n].dtype != spec.dtype]
    for dtype in sorted({source.specs[n].dtype for n in other}, key=str):
        names = frozenset(n for n in other if source.specs[n].dtype == dtype)
        adapter = adapter >> Adapter((CastExperts(dtype, names),))
    return adapter


def inputs(source: Checkpoint, plan: Plan, names: list[str], maps: Maps | None) -> dict[str, Tensor]:
    """The tensors of these names; of a range, what will be looked at is on its way, and nothing beside it.

    maps: the files that are mapped; None to read them.
    """
    if maps is None:
        return read(source, names, narrowing(plan, "sources") if plan.narrowed else {})
    given = mapped(source, names, maps)
    if plan.narrowed:
        cut = narrowing(plan, "sources")
        for name, tensor in given.items():
            fetch(source, name, cut[name](tensor) if name in cut else tensor, maps)
    return given


def _native(source: Checkpoint, plan: Plan, maps: Maps | None) -> dict[str, Tensor]:
    """What a native directory holds, less what the plan's ranges leave out, in the plan's dtypes."""
    cut = narrowing(plan, "targets")
    if maps is None:
        found = read(source, plan.targets, cut)
        parts = {n: cut[n](t).clone() if n in cut else t for n, t in found.items()}
    else:
        given = mapped(source, plan.targets, maps)
        parts = {n: cut[n](t) if n in cut else t for n, t in given.items()}
        for name, part in parts.items() if cut else ():
            fetch(source, name, part, maps)
    return {n: held(n, t, plan.targets[n].dtype) if t.is_floating_point() else t for n, t in parts.items()}


def unfilled(plan: Plan, out: Params, what: str) -> list[Problem]:
    """Why a plan's targets do not fill tensors: those that are missing, too many, or of another shape or dtype."""
    problems = [
        Problem(f"{what} has no {n!r} {list(spec.shape)}", (n,)) for n, spec in plan.targets.items() if n not in out
    ]
    problems += [Problem(f"{what} has {n!r}, which the checkpoint has not", (n,)) for n in out if n not in plan.targets]
    for name in (n for n in out if n in plan.targets):
        found, spec = TensorSpec(tuple(out[name].shape), out[name].dtype), plan.targets[name]
        if found != spec:
            text = f"{what} has {name!r} as {list(found.shape)} {found.dtype}, expected {list(spec.shape)} {spec.dtype}"
            problems.append(Problem(text, (name,)))
    return problems


@torch.no_grad()
def _fill(
    source: Checkpoint, adapter: Adapter, plan: Plan, out: Params, ranges: Mapping[str, range], maps: Maps | None
) -> dict[str, Tensor]:
    """out, with the plan's tensors in it: through views of it under HF names, or tensor by tensor where it has none."""
    given, out = out, without_twins(out, plan.targets)
    if problems := [*unfilled(plan, out, "out"), *overlapping(out, lambda name: value(source, plan, name, maps))]:
        raise AdapterError(problems)
    if source.native:
        for name, tensor in _native(source, plan, maps).items():
            out[name].copy_(tensor)
        return dict(given)
    try:
        views = adapter.views(out, **ranges)
    except AdapterError:  # decoded, or cast: no view of what is stored
        views = None
    cut = narrowing(plan, "sources")
    for sources, targets in plan.units():
        parts = inputs(source, plan, sources, maps)
        if views is not None and views.keys() >= parts.keys():
            for name, tensor in parts.items():
                views[name].copy_(cut[name](tensor) if name in cut else tensor)
        else:
            for name, tensor in plan.run(parts, targets).items():
                out[name].copy_(tensor)
    return dict(given)


def value(source: Checkpoint, plan: Plan, name: str, maps: Maps | None) -> Tensor:
    """What a plan makes of a checkpoint under this native name."""
    if source.native:
        return source.read([name])[name]
    (unit,) = (unit for unit in plan.units() if name in unit[1])
    return plan.run(inputs(source, plan, unit[0], maps), [name])[name]
