"""Merged expert tensors, or what a call names besides, cast to one dtype on the way in; nothing on the way out."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fmoe.codecs import Changed, CodecPlan, Vanished
from fmoe.codecs.config import quantization_of
from fmoe.codecs.foreign.undecoded import narrow
from fmoe.codecs.quantised import Quantised
from fmoe.folding import meant
from fmoe.layout.adapter import Adapter
from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.types import EXPERT_TENSORS, AdapterError, Problem, TensorSpec, as_dtype


def decoded_to(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter, whose codecs decode to another dtype."""
    other = lambda stage: replace(stage, dtype=dtype) if isinstance(stage, Quantised) else stage
    return replace(adapter, stages=tuple(map(other, adapter.stages)))


def held(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype). Raises AdapterError, with the name, where a finite value is beyond what dtype holds; `Vanished`
    where all are too small for it.

    Of a stack of experts each is looked at alone; zeros for some numbers of many are rounding.

    >>> held("w", torch.tensor([1e-9, 0.0]), torch.float16)
    Traceback (most recent call last):
    fmoe.codecs.Vanished: 'w' holds 1e-09 at most, and is 0 in float16, whose least number is 5.96e-08. Fix: ...
    """
    made = tensor.to(dtype)
    if tensor.is_meta or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return made
    facts, kind = torch.finfo(dtype), str(dtype).removeprefix("torch.")
    if bool(made.isinf().any()) and bool((lost := made.isinf() & tensor.isfinite()).any()):
        worst = tensor[lost].abs().max().item()
        text = f"{name!r} holds {worst:.4g}, expected at most {facts.max:.4g}, which {kind} can hold"
        raise AdapterError([Problem(f"{text}. Fix: another dtype, as bfloat16", (name,))])
    alone = tensor.ndim == 3 and "conv" not in name
    if (most := _vanished(tensor, made, alone)) is not None:
        what = f"an expert of {name!r}" if alone else repr(name)
        least = facts.smallest_normal * facts.eps
        text = f"{what} holds {most:.4g} at most, and is 0 in {kind}, whose least number is {least:.3g}"
        problem = Problem(f"{text}. Fix: another dtype, as bfloat16", (name,))
        if alone:
            raise AdapterError([problem])
        gone = Vanished([problem])
        gone.made, gone.most = {name: made}, most
        raise gone
    return made


def _vanished(tensor: Tensor, made: Tensor, alone: bool) -> float | None:
    """The largest number of a tensor that is not 0 and has become it; alone: or of any expert of it."""
    if not tensor.numel():
        return None
    now, was = (t if alone else t[None] if t.ndim == 2 else t.reshape(1, 1, -1) for t in (made, tensor))
    for e in (~now[:, 0].any(1)).nonzero().flatten().tolist():  # some number of the first row is mostly left
        if not bool(now[e].any()) and bool(was[e].any()):
            return float(was[e].abs().max())
    return None


KEPT = ("e_score_correction_bias", "A_log", "dt_bias", "_fp32_params")
"""Segments of native names whose tensors stay in fp32, as Transformers keeps them."""


def castable(specs: Specs, said: torch.dtype | None) -> frozenset[str]:
    """The native tensors that may be cast: floats of 16 bits or more that are no scales and not kept in fp32.

    Kept are names with a segment of `KEPT`, and what a checkpoint stores in fp32 though its config says less (said).

    >>> kinds = {"a.weight": torch.bfloat16, "a.weight_scale_inv": torch.float32, "gate.e_score_correction_bias": None}
    >>> sorted(castable({n: TensorSpec((1,), d or torch.float32) for n, d in kinds.items()}, None))
    ['a.weight']
    """
    wide = said is not None and said.itemsize < 4
    scales = _scales(specs)
    return frozenset(
        name
        for name, spec in specs.items()
        if spec.dtype.is_floating_point and spec.dtype.itemsize > 1 and name not in scales
        if not any(part in KEPT for part in name.split(".")) and not (wide and spec.dtype == torch.float32)
    )


def _scales(specs: Specs) -> set[str]:
    """The scales of codes: named so, and beside the tensor that they are of, or codes of the same module."""
    codes = {n.rpartition(".")[0] for n, spec in specs.items() if narrow(spec.dtype)}
    named = {n for n in specs if "scale" in n.rpartition(".")[2]}
    of = lambda n: any(n[:k] in specs for k in range(len(n)) if n[k] == "_")
    beside = lambda n: n.rpartition(".")[0] in codes or re.search(r"(input|activation)_scale$", n)
    return {n for n in named if of(n) or beside(n)}


def all_of(cast: str, specs: Specs, config: Mapping[str, Any]) -> frozenset[str]:
    """What cast="all" names of these tensors; of "experts" nothing more. Raises AdapterError for another word.

    >>> all_of("experts", {}, {})
    frozenset()
    """
    if cast not in ("experts", "all"):
        raise AdapterError(f"cast={cast!r}: expected 'experts' or 'all'{meant(cast, ('experts', 'all'))}")
    return castable(specs, _said(config)) if cast == "all" else frozenset()


def _said(config: Mapping[str, Any]) -> torch.dtype | None:
    said = config.get("dtype") or config.get("torch_dtype")
    return as_dtype(said) if said else None


FIRST = "to='hf' first, and that with dtype= and "


def not_cast(
    specs: Specs, dtype: Any, config: Mapping[str, Any], to: str = "hf", what: str = "experts are", native: bool = False
) -> list[str]:
    """A note on what is not in the dtype that experts were cast to, and that config.json says.

    to: where else they went, which takes no cast=; native: they came from a native directory, which does not either.
    what: what has that dtype there. Raises AdapterError where nothing has it.

    >>> w = TensorSpec((2,), torch.bfloat16)
    >>> not_cast({"norm.weight": TensorSpec((2,), torch.float32), "e.down_proj": w}, "bfloat16", {})
    ["experts are bfloat16, config.json says so, and 'norm.weight' stays as it was. Fix: cast='all' (--cast all)"]
    """
    left = [n for n in castable(specs, _said(config)) if specs[n].dtype != as_dtype(dtype)]
    if not left:
        return []
    if not any(specs[n].dtype == as_dtype(dtype) for n in castable(specs, None)):
        coded = any(narrow(spec.dtype) for spec in specs.values())
        none, fix = ("they are in codes", "without dtype, or, from 'hf' to 'hf', ") if coded else ("there are none", "")
        text = f"dtype={str(as_dtype(dtype)).removeprefix('torch.')!r} casts experts, and {none}"
        raise AdapterError(f"{text}. Fix: {fix or FIRST * native}cast='all' (--cast all)")
    kind, verb = (
        str(as_dtype(dtype)).removeprefix("torch."),
        "stays as it was" if len(left) == 1 else "stay as they were",
    )
    rest = f"{some(sorted(left))} {verb}"
    if to == "hf":
        return [f"{what} {kind}, config.json says so, and {rest}. Fix: {FIRST * native}cast='all' (--cast all)"]
    fix = f"convert to 'hf' with dtype={kind!r}, cast='all' (--cast all), and that to {to!r}"
    return [f"{what} {kind}, and {rest}. Fix: {fix}"]


def wider_than_said(specs: Specs, config: Mapping[str, Any]) -> list[str]:
    """A note where most bytes are of a dtype wider than config.json says: a reader rounds them, but scales of codes.

    >>> wider_than_said({"w": TensorSpec((2,), torch.float32)}, {"dtype": "bfloat16"})
    ["config.json says bfloat16, and 'w' is float32: Transformers rounds it as it loads. Fix: dtype in config.json"]
    """
    if (said := _said(config)) is None:
        return []
    floats = {n: spec for n, spec in specs.items() if spec.dtype.is_floating_point and spec.dtype.itemsize > 1}
    if quantization_of(config):
        floats = {n: spec for n, spec in floats.items() if "scale" not in n.rpartition(".")[2]}
    wide = [n for n, spec in floats.items() if spec.dtype.itemsize > said.itemsize]
    if 2 * sum(specs[n].nbytes for n in wide) <= sum(spec.nbytes for spec in floats.values()):
        return []
    here, there = (str(d).removeprefix("torch.") for d in (specs[wide[0]].dtype, said))
    verb, them = ("is", "it") if len(wide) == 1 else ("are", "them")
    told = f"config.json says {there}, and {some(sorted(wide))} {verb} {here}: Transformers rounds {them} as it loads"
    return [f"{told}. Fix: dtype in config.json"]


@dataclass(frozen=True)
class CastExperts:
    """W -> W.to(dtype) for the tensors named `EXPERT_TENSORS`. Biases of routers and other fp32 holders stay.

    names: those to cast instead, where they are not native ones.
    """

    dtype: torch.dtype
    names: frozenset[str] | None = None
    flipped: bool = False
    lossless: bool = False

    @property
    def inverse(self) -> "CastExperts":
        return replace(self, flipped=not self.flipped)

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        ours = lambda n: n.rpartition(".")[2] in EXPERT_TENSORS if self.names is None else n in self.names
        mine = [] if self.flipped else [n for n in specs if ours(n)]
        mine = [n for n in mine if specs[n].dtype != self.dtype]
        odd = tuple(n for n in mine if specs[n].dtype.itemsize < 2 or not specs[n].dtype.is_floating_point)
        if odd:
            text = f"{some(odd)}: {specs[odd[0]].dtype} is not a value to cast, but part of a quantised one"
            raise AdapterError([Problem(text, odd)])
        targets = dict(specs) | {n: TensorSpec(specs[n].shape, self.dtype) for n in mine}
        cast = lambda params: {n: held(n, t, self.dtype) for n, t in params.items()}
        rows = lambda n: {n: 1 if specs[n].shape else 0}  # a scalar is made whole
        return CodecPlan(targets, tuple(Changed([n], [n], cast, rows(n)) for n in mine), str(self))

    def choices(self) -> dict[str, tuple[str, ...]]:
        return {}

    def axes(self) -> frozenset[str]:
        return frozenset()

    def resolve(self, names: Names, *, default: bool) -> "CastExperts":
        return self

    def rename(self, names: Names) -> list[str]:
        return names.names

    def choose(self, choices: Mapping[str, Any]) -> "CastExperts":
        return self

    def __str__(self) -> str:
        what = ", ".join(EXPERT_TENSORS) if self.names is None else "experts"
        return f"cast {what} to {self.dtype}" + " (this way: nothing)" * self.flipped
