"""W + scale * A @ B of every weight that has matrices A and B: of experts, modules, stacks, and what files cut."""

import torch
from torch import Tensor

from fmoe.layout.claims import some
from fmoe.layout.eager.running import specs_of
from fmoe.lowrank.matrices import Matrices, copies, matrices, scale_of
from fmoe.lowrank.scales import Scale, Scales
from fmoe.lowrank.sorting import WRAPPED
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError, Params, Problem

_NATIVE = (
    "Fix: pass what fmoe.load gives of its base, and params and scales as fmoe.lora.load gives them; "
    "where Transformers has other tensors in memory than in files, pass adapter.from_hf(model.state_dict()), "
    "or merge it with PEFT (merge_and_unload)"
)


def added(params: Params, lora: Params, scale: Scale, sign: float) -> dict[str, Tensor]:
    """params, with sign * scale * A @ B added; lora: lifted, so that gate and up have one A."""
    specs_of(params)
    made = dict(params)
    if not specs_of(lora):
        raise AdapterError("lora: no matrices A and B, expected some to add: is the adapter's file empty?")
    said = scale if isinstance(scale, Scales) else Scales({}, ())
    beside = copies(lora)
    for pair in matrices(lora):
        A, B = lora[pair.a], lora[pair.b]
        by = sign * scale_of(scale, pair)
        one, other = said.stacks[pair.a].turned(A, B) if pair.a in said.stacks else pair.turned(A, B)
        whole = beside.get(pair.stem, {})
        if pair.a in said.parts:
            for odd, t in ((pair.a, A), (pair.b, B)):
                _plain(odd, t, A.device, pair.a)
            if whole:
                told = f"lora: {some([*whole])} is a whole weight, and natively that is cut or turned"
                raise AdapterError([Problem(f"{told}. Fix: merge it with PEFT (merge_and_unload)", (*whole,))])
            update = by * (one.double() @ other.double())
            update = update if update.ndim > 2 else update.view(pair.shaped(A, B))
            for name, part in said.parts[pair.a](update).items():
                name = _there(params, said, name)
                W = _weight(params, name, pair)
                _plain(name, W, A.device, pair.a)
                made[name] = (W.double() + part).to(W.dtype)
            continue
        name = _named(params, said, pair.a, pair.weight)
        W = _weight(params, name, pair)
        for odd, t in ((name, W), (pair.a, A), (pair.b, B)):
            _plain(odd, t, W.device, name)
        for copy, of in whole.items() if sign > 0 else ():
            at = name if of == pair.weight else _named(params, said, "", of)
            made[at] = _instead(_weight(params, at, pair), lora[copy], at, copy)
        W = made[name]
        shape = [*one.shape[:-1], other.shape[-1]] if one.ndim > 2 else pair.shaped(A, B)
        if [*W.shape] not in (shape, [1, *shape]):  # PEFT has a stack of one as a matrix
            found = f"A {list(A.shape)}, B {list(B.shape)}"
            text = f"lora: {name!r} is {list(W.shape)}, which {found} of {pair.a!r} do not fit"
            raise AdapterError([Problem(f"{text}. {_NATIVE}", (pair.a, pair.b))])
        if one.ndim == 2:  # a module's: as of one expert
            made[name] = _sum(W.flatten(1).reshape(1, len(one), -1), one[None], other[None], by).reshape(W.shape)
        else:
            made[name] = _sum(W, one, other, by)
    return made


def _named(params: Params, said: Scales, a: str, weight: str) -> str:
    """The name that a weight of files, or of A, has among params."""
    if a in said.weights:
        return _there(params, said, said.weights[a])
    return weight if weight in params else _there(params, said, weight.removeprefix(WRAPPED))


def _there(params: Params, said: Scales, name: str) -> str:
    """The name that a native weight has among params."""
    there = {n for n in said.alike(name) if n in params} if name not in params else ()
    return there.pop() if len(there) == 1 else name


def _weight(params: Params, name: str, pair: Matrices) -> Tensor:
    if name not in params:
        told = f"lora: {pair.a!r} has no weight {name!r} to be added to, expected it among params. {_NATIVE}"
        raise AdapterError([Problem(told, (pair.a,))])
    return params[name]


def _plain(odd: str, t: Tensor, device: torch.device, of: str) -> None:
    if is_dtensor(t) or not t.is_floating_point() or t.element_size() < 2:
        found = f"{t.dtype}{' in a DTensor' * is_dtensor(t)}"
        raise AdapterError([Problem(f"lora: {odd!r} is {found}, expected plain floats", (odd,))])
    if t.device != device:
        raise AdapterError(
            [Problem(f"lora: {odd!r} is on {t.device}, and {of!r} on {device}, expected one device", (odd,))]
        )


def _instead(W: Tensor, copy: Tensor, name: str, of: str) -> Tensor:
    """The tensor that an adapter was trained beside, as PEFT puts it in the place of the base's. of: its name."""
    if copy.shape != W.shape:
        told = f"lora: {of!r} is {list(copy.shape)}, and {name!r} {list(W.shape)}: its vocabulary is another"
        raise AdapterError([Problem(f"{told}. Fix: resize the base's embeddings first, as for training", (of,))])
    return copy.to(W.dtype).to(W.device)


def _sum(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale * A @ B, in a wider dtype, expert by expert; stored as W is."""
    wide = torch.float32 if W.element_size() == 2 else torch.float64
    out = torch.empty_like(W)
    for e in range(W.shape[0]):
        out[e] = (W[e].to(wide) + scale * (A[e].to(wide) @ B[e].to(wide))).to(W.dtype)
    return out
