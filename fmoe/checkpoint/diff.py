"""Two checkpoints compared tensor by tensor, whatever layout each is in. Streamed: a few tensors are in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.files.mapped import Maps, mapped
from fmoe.checkpoint.look.stats import opened
from fmoe.checkpoint.open import adapter_of, made_with, plan_from
from fmoe.checkpoint.which import no_system, ours_alone
from fmoe.families.kind import Family
from fmoe.layout.adapter import Adapter
from fmoe.layout.pipeline import Plan
from fmoe.types import AdapterError, TensorSpec, bits


def diff(
    one: Path | str, other: Path | str, *, values: bool = False, adapter: Adapter | Family | None = None
) -> Iterator[dict[str, Any]]:
    """What differs between two checkpoints: {name, status, ...} of every tensor, in the order of names.

    status: "equal" (the same bytes), "values" (other bytes), "shape" or "dtype" (with what each side has), "only in
    one", "only in other". Directories of one layout are compared under the names that they store. Where the layouts
    differ (native against Hugging Face, fused against one by one) both are compared under their native names.
    values: `largest`, the largest absolute difference, of tensors of one shape, also across dtypes. adapter: one of
    your own, of both. Raises AdapterError for another system's directory, unless both store the same names, and for
    native codes against native numbers.

    >>> import fmoe, fmoe.docs, tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     _ = fmoe.convert(fmoe.docs.example(), f"{path}/native")
    ...     {found["status"] for found in diff(fmoe.docs.example(), f"{path}/native")}
    {'equal'}
    """
    own = {} if adapter is None else {"adapter": adapter}
    a, b = _Side(_source(one, bool(own))), _Side(_source(other, bool(own)))
    keeps = [_keeps(side.source) for side in (a, b) if side.source.native]
    if {*keeps} == {True, False}:
        fix = "Fix: fmoe convert the one with codes to hf, then diff that"
        raise AdapterError(f"one of {one} and {other} holds codes and scales, and one decoded numbers. {fix}")
    if not _alike(a.source, b.source, own):
        a, b = a.natively(own, any(keeps)), b.natively(own, any(keeps))
    for name in sorted({**a.specs, **b.specs}):
        yield {"name": name} | _compared(a, b, name, values)


def _keeps(native: Checkpoint) -> bool:
    return (native.origin or {}).get("choices", {}).get("quantized") == "keep"


def _source(path: Path | str, own: bool) -> Checkpoint:
    ours_alone(path, "diff")
    return opened(path, own)


def _alike(a: Checkpoint, b: Checkpoint, own: dict[str, Any]) -> bool:
    """Whether names can be compared as they are: single files, one set of names, or one layout."""
    if a.specs.keys() == b.specs.keys() or not own and not (a.config and b.config):
        return True
    for source in () if own else (a, b):
        no_system(source, "diff")
    if a.native or b.native:
        return a.native == b.native
    try:
        return adapter_of(a, **own).stages == adapter_of(b, **own).stages
    except AdapterError:
        return True


class _Side:
    """The tensors of one side by name: as stored, or as a plan makes them."""

    def __init__(self, source: Checkpoint, plan: Plan | None = None):
        self.source, self.plan, self.maps = source, plan, Maps()
        self.specs: dict[str, TensorSpec] = dict(plan.targets) if plan else source.specs
        self._units = {t: unit for unit in plan.units() for t in unit[1]} if plan else {}
        self._made: dict[str, Tensor] = {}

    def natively(self, own: dict[str, Any], codes: bool) -> "_Side":
        """Under native names; codes: as codes and scales, where they are quantised."""
        if self.source.native:
            if not own:
                made_with(self.source)  # raises where it was made with rules of somebody's own
            return self
        how = {"quantized": "keep"} if codes and not own else {}
        return _Side(self.source, plan_from(self.source, adapter_of(self.source, **own, **how)))

    def __getitem__(self, name: str) -> Tensor:
        if self.plan is None:
            return mapped(self.source, [name], self.maps)[name]
        if name not in self._made:  # the last unit is kept: its tensors are asked for one after the other
            sources, targets = self._units[name]
            self._made = self.plan.run(mapped(self.source, sources, self.maps), targets)
        return self._made[name]


def _compared(a: _Side, b: _Side, name: str, values: bool) -> dict[str, Any]:
    if name not in b.specs or name not in a.specs:
        return {"status": "only in one" if name in a.specs else "only in other"}
    here, there = a.specs[name], b.specs[name]
    told = lambda spec: [list(spec.shape), str(spec.dtype).removeprefix("torch.")]
    if here.shape != there.shape:
        return {"status": "shape", "one": told(here), "other": told(there)}
    x, y = a[name], b[name]
    if here.dtype != there.dtype:
        found: dict[str, Any] = {"status": "dtype", "one": told(here), "other": told(there)}
    elif torch.equal(bits(x), bits(y)):
        return {"status": "equal"}
    else:
        found = {"status": "values"}
    return found | ({"largest": _largest(x, y)} if values else {})


def _largest(x: Tensor, y: Tensor) -> float:
    """max |x - y| in fp64, in parts; NaN against NaN is no difference, NaN against a number is inf."""
    largest = 0.0
    for a, b in zip(x.reshape(-1).split(2**22), y.reshape(-1).split(2**22), strict=True):
        a, b = a.double(), b.double()
        gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
    return largest
