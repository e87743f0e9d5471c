"""Notes on new codes that Transformers does not take as they are written: what is said of it is so up to its 5.24."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from fmoe.codecs.config import quantization_of, weight_block
from fmoe.codecs.foreign.undecoded import narrow
from fmoe.codecs.scales import in_out
from fmoe.families import FAMILIES
from fmoe.families.spelling import in_memory
from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs
from fmoe.layout.units import natural

UP_TO = "Transformers <= 5.24"
NO_EXPERTS = dict.fromkeys(("lfm2_moe", "nemotron_h"), "its config has no hidden_act")
NO_EXPERTS["ernie4_5_vl_moe"] = "its config has several sizes of experts"
"""Model types of which Transformers' FP8 experts are not made -> why."""
IN_PARTS = ("unlimited_ocr",)
"""Model types of whose one projection in files Transformers makes three, which it refuses beside codes of any kind."""
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")
_MORE = re.compile(r".*\.experts\.(\w*bias|\w*norm\.weight)")


def unread(config: Mapping[str, Any], before: Mapping[str, Any], hf: Specs, was: Specs | None = None) -> list[str]:
    """Notes on new codes that Transformers passes by, reads wrongly or refuses.

    before: the config until now, of which codes are new where it said something else. was: what is read, where that is
    Hugging Face's: what was no code then is a new one, too.
    """
    told = quantization_of(config) or {}
    codes = lambda specs, n: n in specs and narrow(specs[n].dtype)
    other = told != (quantization_of(before) or {})
    hf = {n: hf[n] for n in sorted(hf, key=natural)}  # whatever lay first
    names = [n for n in hf if codes(hf, n) and (other or was is not None and not codes(was, n))]
    method = told.get("quant_method")
    if not names:
        return []
    if method == "compressed-tensors":
        return [*_beside_codes(hf, names), *_compressed(config, hf, names)]
    if method == "modelopt":
        return [f"{some(names)}: ModelOpt's codes, which {UP_TO} does not know: it draws such weights anew"]
    return [*_beside_codes(hf, names), *_fp8(config, hf, names)] if method in ("fp8", "mxfp8") else []


def _layer(name: str) -> str | None:
    """The experts among which one of them lies."""
    return m[1] if (m := _EXPERT.match(name)) else None


def _beside_codes(hf: Specs, names: Collection[str]) -> Iterator[str]:
    """Of plain experts in a layer of coded ones, as zero experts are, which Transformers writes and no model reads."""
    inside = {*map(_layer, names)} - {None}
    if plain := [n for n, s in hf.items() if n.endswith(".weight") and not narrow(s.dtype) and _layer(n) in inside]:
        text = f"{some(plain)}: plain, beside codes of other experts: {UP_TO} makes one tensor of both, and fails"
        yield f"{text}. Fix: leave out those of zero experts, as published checkpoints do"


def _compressed(config: Mapping[str, Any], hf: Specs, names: Collection[str]) -> Iterator[str]:
    """Of compressed-tensors: scales of all of an expert that are not read, and what is plain that nothing merges."""
    if scales := [n for n in hf if n.endswith("weight_global_scale") and ".experts." in n]:
        text = f"{some(scales)}: {UP_TO} leaves them out, and takes numbers of experts for that many times as large"
        yield f"{text}; fmoe and compressed-tensors itself read them. Fix: another quantize= for Transformers"
    inside = {*map(_layer, names)} - {None}
    plain = [n for n, s in hf.items() if n.endswith(".weight") and not narrow(s.dtype)]
    if parts := [n for n in plain if (_layer(n) not in inside if _layer(n) else in_memory(config, n) is None)]:
        text = f"{some(parts)}: plain, and in memory one tensor of several, or several of one"
        yield f"{text}. {UP_TO} raises an error for such beside compressed-tensors' codes. Fix: quantize='fp8', or none"


def _fp8(config: Mapping[str, Any], hf: Specs, names: Collection[str]) -> Iterator[str]:
    """Of FP8 and MXFP8: experts that its own FP8 experts are not, and stacks that its decoder passes by."""
    of = str(config.get("model_type"))
    if of in IN_PARTS:
        yield f"{UP_TO} refuses codes of any tensor of {of}, since it cuts one of its projections. Fix: no quantize="
    fails = f"{UP_TO} raises an error for FP8 experts of {of} on a GPU"
    stacks = sorted(n for n in names if hf[n].dtype == torch.float8_e4m3fn and len(hf[n].shape) == 3)
    if of in NO_EXPERTS and not stacks:
        yield f"{fails}, as {NO_EXPERTS[of]}; it decodes them (dequantize=True, or on a CPU)"
    if not stacks:
        return
    more = sorted({m[1] for n in hf if (m := _MORE.fullmatch(n))})
    other = [n for n in stacks if _scaled_otherwise(config, hf, n)]
    how = f"{UP_TO} computes with it on a GPU"
    if other:
        how = f"{fails}, which expects [experts, out, in] with scales for blocks of gate and of up"
    elif more:
        how = f"{UP_TO} does not compute with it, as its FP8 experts have no {some(more)}"
    text = f"{some(stacks)}: FP8 of all experts in one tensor. {how}"
    text += ", and takes codes for numbers where it decodes (dequantize=True, or on a CPU)"
    yield f"{text}. Fix: layout='per_expert', where the family has it, or no quantize="


def _scaled_otherwise(config: Mapping[str, Any], hf: Specs, name: str) -> bool:
    """Whether a stack lies as [in, out], or its scales are no blocks of it as it lies."""
    scale, shape = hf.get(f"{name}_scale_inv"), hf[name].shape
    halves, (rows, columns) = 1 + name.endswith("gate_up_proj"), weight_block(config)
    blocks = (halves * -(-shape[1] // halves // rows), -(-shape[2] // columns))
    kind = FAMILIES.get(str(config.get("model_type")))
    across = kind is not None and in_out(kind.rules.stages)
    return across or scale is not None and tuple(scale.shape[1:]) != blocks
