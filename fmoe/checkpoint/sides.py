"""The adapters between Hugging Face's, ours and other systems' directories, and what a source of either lacks."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fmoe import systems
from fmoe.checkpoint.files.containers.foreign import Foreign
from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.open import adapter_of, bare, hf_names, holds_codes, layers_fit, made_with, plan_from
from fmoe.checkpoint.which import side
from fmoe.checkpoint.whole import gaps_of, spelling
from fmoe.codecs.agree import untold
from fmoe.codecs.cast import CastExperts, all_of
from fmoe.codecs.config import quantization_of
from fmoe.codecs.formats import FORMATS
from fmoe.codecs.quantised import Quantised
from fmoe.families import FAMILIES, family
from fmoe.families.complete import Gaps, gaps
from fmoe.families.cross import Crossing, cross
from fmoe.families.kind import as_dict
from fmoe.folding import meant
from fmoe.layout.adapter import Adapter
from fmoe.layout.pipeline import Plan
from fmoe.layout.proved.suspects import QUANTISED
from fmoe.layout.table import Table
from fmoe.systems import SYSTEMS
from fmoe.types import EXPERT_TENSORS, AdapterError, Problem, as_dtype

CODES = {f.stored for f in FORMATS.values()} | {torch.uint32}  # which MLX views MXFP4 as
WEIGHT = re.compile(r"(weight|_projs|blocks|_packed)$")  # and not a scale, which stays beside what is decoded


def adapters(source: Checkpoint, here: str, to: str, lossy: bool, **choices: Any) -> tuple[Adapter, Adapter]:
    """Hugging Face -> the source's side, and the source's side -> the target's."""
    if here == to:
        fix = ". Fix: from_=, or --from SYSTEM, where it is another system's"
        raise AdapterError(f"{source.path} is {to} already{fix}")
    own = {n: v for n, v in choices.items() if n in ("quantized", "dtype")}
    if to == "hf" and own.get("quantized") == "decode" and packed(source, here):
        fix = "Fix: quantized='keep', and then convert once more, to='hf' with dtype='bfloat16'"
        raise AdapterError(f"{source.path} holds codes, which go to Hugging Face's layout as they are. {fix}")
    back = _back(source, here, lossy, own)
    names = source.specs if here == "hf" else back.plan(source.specs).targets
    if to == "hf":
        layouts = {n: v for n, v in choices.items() if n not in own}
        return back.inverse, back.choose(**layouts) if layouts else back
    made = (
        family(source.model_type).adapter(source.config, **choices)
        if to == "native"
        else systems.adapter(to, source.model_type, source.config, lossy=lossy, **choices)
    )
    return back.inverse, back >> made.resolve(names)


def plan_between(source: Checkpoint, to: str, there: Adapter, **ranges: range) -> Plan:
    """`plan_from`; where only codes and scales are in a system's way, the error says how they become numbers."""
    try:
        return plan_from(source, there, **ranges)
    except AdapterError as error:
        codes = lambda n: QUANTISED.search(n) or n.endswith(("_blocks", "_scales"))
        if to not in SYSTEMS or not any(map(codes, error.keys)):
            raise
        how = (quantization_of(source.config) or {}).get("quant_method", "codes and scales")
        fix = f"Fix: fmoe convert {source.path} BF16 --to hf --dtype bfloat16, then BF16"
        fix += ", or quantized='keep'" * (source.model_type in SYSTEMS[to].kept)
        found = f"{to}'s tables take decoded weights: found codes and scales, expected floats"
        text = f"{source.path} is quantised with {how}, and {found}. {fix}"
        raise AdapterError([Problem(text, error.keys)]) from None


def gaps_between(source: Checkpoint, here: str, adapter: Adapter) -> Gaps:
    """What a source on either side of another system lacks. adapter: Hugging Face -> the source's side."""
    hf = source.specs if here == "hf" else adapter.inverse.plan(source.specs).targets
    if here == "native":
        return gaps_of(source, source.specs, hf)
    kind = family(source.model_type)
    made = kind.adapter(source.config).resolve(hf)
    native = made.plan(hf).targets
    there = made.inverse if here == "hf" else made.inverse >> adapter
    found = gaps(kind, source.config, native, spelling(lambda: there))
    return Gaps(found.problems, [*found.notes, *(untold(source.config, hf, made) if here == "hf" else ())])


def whole_between(source: Checkpoint, here: str, adapter: Adapter, fix: str = "") -> Gaps:
    """The same; raises AdapterError where anything is missing."""
    found = gaps_between(source, here, adapter)
    if found.problems:
        text = f"{source.path} is not whole: download what is missing, or mend config.json{fix}"
        raise AdapterError([*found.problems, text])
    return found


def forth(source: Checkpoint, from_: str | None = None, **choices: Any) -> tuple[Adapter, Adapter]:
    """The adapter of a source, and what takes it to the other side: Hugging Face's, of a system's; of HF's, ours."""
    here = "hf" if "adapter" in choices else side(source, from_)
    if here in SYSTEMS:
        back = _back(source, here, False, choices)
        return back.inverse, back
    made = adapter_of(source, **choices)
    return made, made.inverse if source.native else made


def _back(source: Checkpoint, here: str, lossy: bool, own: dict[str, Any]) -> Adapter:
    """The source's side -> Hugging Face, its forms settled by names; of a system's choices those that fit."""
    if here == "hf":
        layers_fit(Path(str(source.path)) / "config.json", source.config, source.specs)
        return Adapter()
    if here == "native":
        return adapter_of(source, **own).inverse
    system, problem = SYSTEMS[here], None
    lead = source.lead if isinstance(source, Foreign) else Adapter()
    names = lead.plan(source.specs).targets if lead.stages else source.specs
    own = own | {"quantized": "keep"} if packed(source, here) else own
    options = {n: o for n, o in system.choices.items() if o}
    for chosen in product(*options.values()):
        try:
            made = system.adapter(
                source.model_type, source.config, lossy=lossy, **own, **dict(zip(options, chosen, strict=True))
            )
            back = made.inverse.resolve(names)
            back.plan(names)
            return lead >> back if lead.stages else back
        except AdapterError as error:
            problem = problem or error
    raise problem or AdapterError(f"{here}: no table")


def packed(source: Checkpoint, here: str) -> bool:
    """Whether a source of a system that can hold them holds codes and scales, which its table moves as they are."""
    can = here in SYSTEMS and SYSTEMS[here].keeps(source.model_type)
    return can and any(spec.dtype in CODES and WEIGHT.search(name) for name, spec in source.specs.items())


def unnamed_choices(adapter: Adapter, names: list[str]) -> dict[str, Any]:
    """The choices that an adapter was made with, as far as its HF names do not say them."""
    kind = FAMILIES.get(str((adapter.config or {}).get("model_type")))
    if kind is None:
        return {"adapter": adapter}
    tables = lambda made: [s for s in made.resolve(names).stages if isinstance(s, Table)]
    how = {"quantized": "keep"} if any(isinstance(s, Quantised) and s.keep for s in adapter.stages) else {}
    opened = kind.adapter(adapter.config, **how)
    if tables(opened) == tables(adapter):
        return how
    choices = {n: o for stage in opened.stages if isinstance(stage, Table) for n, o in stage.choices().items()}
    fits = lambda name, label: tables(opened.choose(**{name: label})) == tables(adapter)
    return how | {name: label for name, labels in choices.items() for label in labels if fits(name, label)}


def adapter_between(source: Checkpoint, to: str, **choices: Any) -> tuple[Adapter, Adapter]:
    """The adapter of a checkpoint, and what makes the other layout from it: the adapter, its inverse, or both in a row.

    Raises AdapterError where the checkpoint is in that layout already.
    """
    if to not in ("native", "hf"):
        known = f"(fmoe families), or a system (fmoe systems){meant(to, ('native', 'hf', *FAMILIES, *SYSTEMS))}"
        raise AdapterError(f"to={to!r}: expected 'native' or 'hf', or a model type {known}")
    if "adapter" in choices:
        if source.native == (to == "native"):
            raise AdapterError(f"{source.path} is {'native' if source.native else 'a Hugging Face checkpoint'} already")
        return forth(source, **choices)
    anew = {"dtype", "quantize"} & choices.keys()
    if to == "hf" and anew and holds_codes(source):
        whole, hf = _as_made(source)
        return whole, whole.inverse >> adapter_between(hf, to, **choices)[1]
    gone = {"dtype", "quantized"} if anew else {"dtype"}  # which are of the tensors as they lie there
    before = {n: v for n, v in made_with(source).items() if n not in gone}
    how = {n: v for n, v in (before | choices).items() if n in VALUES}
    layout = {n: v for n, v in choices.items() if n not in how}
    quantize, cast = how.pop("quantize", None), how.pop("cast", "experts")
    if cast != "experts" and (source.native or to == "native" or layout or "dtype" not in how):
        fix = "to='hf' first, and that with both" if source.native else "to='hf' with both first, then the rest"
        raise AdapterError(f"cast={cast!r}: expected dtype= too, and one layout of Hugging Face's. Fix: {fix}")
    if source.native and to == "native":
        raise AdapterError(f"{source.path} is native already")
    if to == "native":
        if quantize:
            raise AdapterError(f"quantize={quantize!r} with to='native': expected to='hf', which it is written in")
        made = adapter_of(source, **choices)
        return made, made
    if source.native and not (quantize or "dtype" in how):
        if not layout:
            return forth(source, **choices)
        made = family(source.model_type).adapter(source.config, **made_with(source) | choices)
        return made, made.inverse
    if not source.native and not (choices.keys() - {"quantized"}):
        raise AdapterError(f"{source.path} is a Hugging Face checkpoint already: name a choice, as layout='fused'")
    if how.get("quantized") == "keep" and (quantize or "dtype" in how):
        raise AdapterError("quantized='keep' with dtype or quantize: expected one of both")
    made = adapter_of(source, **how)
    if layout or source.native:
        kept = {n: v for n, v in how.items() if n == "quantized"}
        back = family(source.model_type).adapter(source.config, quantize=quantize, **layout, **kept)
        back = back if layout else back.resolve(hf_names(source))
        back = back.choose(quantization=False) if "dtype" in how and not quantize else back
        first = Adapter((CastExperts(as_dtype(how["dtype"])),)) if source.native and "dtype" in how else Adapter()
        return made, (first if source.native else bare(made, back, source.specs)) >> back.inverse
    return made, _anew(source, made, quantize, cast)


VALUES = ("dtype", "cast", "quantized", "quantize")
"""Choices that say which numbers are written, and not under which names."""


def _anew(source: Checkpoint, made: Adapter, quantize: str | None, cast: str) -> Adapter:
    """The same names in other numbers, a tensor at a time: decoded, its experts cast (or all), and encoded if asked."""
    plan = made.plan(source.specs)
    codec, dtypes = made.stages[0], [s.dtype for s in made.stages if isinstance(s, CastExperts)]
    inside = Plan(plan.stages[1:], plan.stages[0].targets)
    mine = {n for n in inside.targets if n.rpartition(".")[2] in EXPERT_TENSORS}
    mine |= all_of(cast, inside.targets, as_dict(source.config))
    names = frozenset(n for sources, targets in inside.units() if mine & {*targets} for n in sources)
    written = family(source.model_type).adapter(source.config, quantize=quantize).stages[0]
    if not quantize:
        written = written.choose({"quantization": False})
    casts = tuple(CastExperts(dtype, names) for dtype in dtypes)
    return Adapter((codec, *casts, written.inverse), config=made.config)


def across(source: Checkpoint, model_type: str, **choices: Any) -> tuple[Adapter, Crossing]:
    """What makes another family's checkpoint of this one, and what that loses."""
    if "quantize" in choices:
        raise AdapterError(f"quantize= with to={model_type!r}: expected to='hf'. Fix: convert first, then quantise")
    if choices.get("quantized") == "keep":
        text = f"quantized='keep' with to={model_type!r}: another family's checkpoint is written in numbers"
        raise AdapterError(f"{text}. Fix: leave it out, or to='hf'")
    if holds_codes(source):
        kept, hf = _as_made(source)
        there, crossing = across(hf, model_type, **choices)
        return kept.inverse >> there, crossing
    dtype = {n: v for n, v in choices.items() if n == "dtype"}
    layout = {n: v for n, v in choices.items() if n != "dtype"}
    made = adapter_of(source, **dtype)
    native = source.specs if source.native else made.plan(source.specs).targets
    gaps = gaps_of(source, native)
    found = cross(family(source.model_type), model_type, source.config, native, **layout)
    missing = tuple(problem.text for problem in gaps.problems)
    found = replace(found, lost=(*found.lost, *missing), notes=(*found.notes, *gaps.notes))
    return (found.adapter if source.native else made >> found.adapter), found


def _as_made(source: Checkpoint) -> tuple[Adapter, Checkpoint]:
    """The adapter of a native directory of codes, and the Hugging Face checkpoint that comes back from it."""
    kept = adapter_of(source)
    return kept, replace(source, specs=plan_from(source, kept.inverse).targets, origin=None)
