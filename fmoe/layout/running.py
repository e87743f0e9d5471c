"""An adapter's plan run on what a user gave: tensors checked on the way in, fresh or contiguous on the way out."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fmoe.layout.pipeline import Plan
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError, Problem, TensorSpec


def specs_of(values: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Every value's shape and dtype. Raises AdapterError naming each that is no tensor and no TensorSpec."""
    try:
        return {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in values.items()}
    except (AttributeError, TypeError):
        problems = [p for name, value in values.items() for p in _no_tensor(name, value)]
        raise AdapterError(problems) from None


def _no_tensor(name: object, value: Any) -> list[Problem]:
    if not isinstance(name, str):
        return [Problem(f"{name!r}: a key that is a {type(name).__name__}, expected a name", (str(name),))]
    if isinstance(getattr(value, "dtype", None), torch.dtype) and hasattr(value, "shape"):
        return []
    return [Problem(f"{name!r}: a {type(value).__name__}, expected a tensor or a TensorSpec", (name,))]


def run(
    plan: Plan,
    params: Mapping[str, Any],
    only: Iterable[str] | None = None,
    copy: bool = False,
    contiguous: bool = False,
) -> dict[str, Any]:
    if any(isinstance(v, TensorSpec) for v in params.values()):
        return dict(plan.targets)
    out = plan.run(params, only)
    if copy:
        storage = lambda t: (t.to_local() if is_dtensor(t) else t).untyped_storage()._cdata
        given = set(map(storage, params.values()))
        out = {n: t.clone() if storage(t) in given else t for n, t in out.items()}
    return {n: t.contiguous() for n, t in out.items()} if contiguous else out


def without(tensors: dict[str, Any], exclude_key_regex: str | None) -> dict[str, Any]:
    return {n: t for n, t in tensors.items() if not (exclude_key_regex and re.match(exclude_key_regex, n))}
