"""config.json and tensors say the same."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from fmoe.codecs.config import coded, quantization_of, with_dtype, with_told, without
from fmoe.codecs.foreign.lists import IGNORED, KIND, Lists, in_step, lists
from fmoe.codecs.foreign.told import calibrated, weights
from fmoe.codecs.foreign.undecoded import narrow
from fmoe.codecs.format import Format
from fmoe.codecs.formats import FOREIGN
from fmoe.codecs.parts import Parts, in_file
from fmoe.codecs.quantised import Quantised
from fmoe.codecs.values import E8M0
from fmoe.layout.adapter import Adapter
from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs
from fmoe.layout.names import Names
from fmoe.types import TensorSpec, as_dtype

FP4, EXPERT_DTYPE = "mxfp4 .scale", "expert_dtype"
"""DeepSeek-V4's format, and what says that experts are in it."""
NOT_CONVERTED = "modules_to_not_convert"
FIELD = {"modelopt": "ignore", "compressed-tensors": "ignore", "quark": "exclude"}
"""quant_method -> the list of modules that are not quantised, where it is not `NOT_CONVERTED`."""


def agreeing(
    config: Mapping[str, Any], adapter: Adapter, specs: Specs, dtype: "torch.dtype | str | None" = None
) -> dict[str, Any]:
    """The config of a Hugging Face directory that holds these tensors, as an adapter wrote them.

    Its quantization_config is there where some are quantised, and says how; dtype: what floats have become.
    """
    made = dict(config) if dtype is None else with_dtype(config, as_dtype(dtype))
    codec = _codec(adapter)
    return made if codec is None else stated(made, specs, _coded(codec, specs), anew=codec.was is not None)


def untold(config: Mapping[str, Any], specs: Specs, adapter: Adapter) -> list[str]:
    """A note where tensors of a directory of Hugging Face's are codes and its config does not say so, or none is."""
    told, codes = quantization_of(config), any(narrow(spec.dtype) for spec in specs.values())
    if (told is not None) == codes:
        return []
    if told is not None:
        how = told.get("quant_method") or "by a method that it does not name"
        return [f"config.json has a quantization_config ({how}), and no tensor is in codes: what is written has none"]
    codec = _codec(adapter)
    found = _coded(codec, specs) if codec else {}
    names = some([p.codes for p in found.values()])
    text = (
        "codes, and config.json has no quantization_config: fmoe reads them so, and Transformers takes them for numbers"
    )
    return [f"{names}: {text}. Fix: add one, as fmoe.convert writes it with quantize="] * bool(found)


def _codec(adapter: Adapter) -> Quantised | None:
    """What reads and writes its codes: the last such stage, which is nearest to the files."""
    return next((s for s in reversed([*adapter.stages]) if isinstance(s, Quantised)), None)


def _coded(codec: Quantised, specs: Specs) -> dict[str, Parts]:
    """The quantised tensors of a file; of those that are written anew no integers are wider than 4 bits."""
    said = codec.lists if codec.was is None else Lists(codec.lists.ignore, bits=4)
    return in_file(specs, Names(specs), codec.readable, codec.known, said)[0]


def stated(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec], found: Mapping[str, Parts], *, anew: bool = False
) -> dict[str, Any]:
    """The config of a directory of these tensors, of which `found` are quantised: its quantization_config says so.

    What it said before stays, where it speaks of the same method, or (anew: other codes may have been written) of every
    one of them as it is; without quantised tensors it says nothing of any.
    """
    made = coded(config)
    before = quantization_of(config)
    if not found:
        return without(made) if before is not None else made
    formats = {p.format.name: p.format for p in found.values()}
    agreed = before is not None and _expert_dtype(config) == ("fp4" if FP4 in formats else None)
    if before is not None and agreed and _speaks_of(before, formats) and not (anew and _other(before, found)):
        how = {n: weights(p.format.along) for n, p in found.items()}
        plain = experts_left(specs, found)
        if plain and not any(before.get(n) for n in (*IGNORED, "dynamic")):
            plain = plain_matrices(specs, found)  # a first list ends what readers leave alone without any
        said = in_step(before, how, plain, FIELD.get(before["quant_method"], NOT_CONVERTED))
        return made if said == before else with_told(made, said)
    told = quantization_config(specs, found)
    rest = {n: v for n, v in without(made).items() if n != EXPERT_DTYPE}
    return rest | ({"quantization_config": told} if told["quant_method"] else {})


def _expert_dtype(config: Mapping[str, Any]) -> str | None:
    """What DeepSeek-V4 says of its experts, at its top or in its quantization_config, where they are not in FP8."""
    said = (quantization_of(config) or {}).get(EXPERT_DTYPE, config.get(EXPERT_DTYPE))
    return said if said == "fp4" else None


def _speaks_of(told: Mapping[str, Any], formats: Mapping[str, Format]) -> bool:
    """Whether a quantization_config is one that a checkpoint in these formats may have."""
    methods = {f.method.partition(" ")[0] for f in formats.values()}
    alike = lambda kind: all(name.startswith(kind) for name in formats)
    if formats.keys() <= FOREIGN.keys():  # which several tools write
        methods |= {"modelopt", "compressed-tensors", "quark"} | ({"fbgemm_fp8", "fp8"} if alike("fp8") else set())
    if told.get("quant_method") not in methods:
        return False
    algorithm = str(told.get("quant_algo")).lower()
    if kind := next((k for k in ("nvfp4", "mxfp4", "mxfp8", "fp8") if k in algorithm), ""):
        return alike(kind)
    named = {f.method.partition(" ")[2] for f in formats.values()}
    return told.get("quant_method") != "compressed-tensors" or told.get("format") in {None, "mixed-precision", *named}


def _other(told: Mapping[str, Any], found: Mapping[str, Parts]) -> bool:
    """Whether some are in other codes than a quantization_config says of them."""
    method, formats = told.get("quant_method"), {n: p.format for n, p in found.items()}
    if {f.method.partition(" ")[0] for f in formats.values()} != {method}:
        return True
    block, static = told.get("weight_block_size"), told.get("activation_scheme") == "static"
    e4m3 = [p for p in found.values() if p.format.method == "fp8" and p.format.code == "e4m3"]
    if any(bool(p.activation) != static or list(block or ()) != [n for n in p.format.block if n] for p in e4m3):
        return True
    said, groups = lists(told), [*(told.get("config_groups") or {}).values()]
    algorithms = {f.method.partition(" ")[2] for f in formats.values()}
    if method == "modelopt" and algorithms != {told.get("quant_algo")}:
        return True
    if method == "compressed-tensors" and not groups:
        return True
    at = {n: groups[said.groups.index(g)] if (g := said.group(n)) else None for n in found if groups}
    head = {"format": told.get("format")} if method == "compressed-tensors" else {}
    return any(group is None or not _says(head | group, formats[n], bool(head)) for n, group in at.items())


def _says(group: Mapping[str, Any], f: Format, strict: bool) -> bool:
    """Whether a group is of weights in this format. strict: also where it does not say it."""
    how, told, name = weights(f.along), group.get("weights") or {}, f.method.partition(" ")[2]
    told = told if strict else how | told
    alike = all(told.get(k) == how[k] for k in (*KIND, "symmetric", "group_size") if k in how)
    return alike and (group.get("format") == name or not strict)


def quantization_config(specs: Mapping[str, TensorSpec], found: Mapping[str, Parts]) -> dict[str, Any]:
    """What Transformers and compressed-tensors have to be told of a checkpoint in which these tensors are quantised."""
    formats = {p.format.name: p for p in found.values()}
    leader = next(iter(formats.values()))
    rest = [n.removesuffix(".weight") for n in plain_matrices(specs, found)]
    method, name = leader.format.method, leader.format.name
    if method.startswith("compressed-tensors"):
        groups = _groups(found)
        how = method.partition(" ")[2] if len(groups) == 1 else "mixed-precision"
        head = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": how}
        return head | {"config_groups": groups, "ignore": rest}
    told: dict[str, Any] = {"quant_method": method.partition(" ")[0]}
    if method.startswith("modelopt"):
        group = {"targets": ["Linear"], "weights": weights(leader.format.along)}
        return told | {"quant_algo": method.partition(" ")[2], "config_groups": {"group_0": group}, "ignore": rest}
    if method in ("gptq", "awq"):
        return told | calibrated(leader.format, [p.format.block[1] for p in found.values()], leader.order, rest)
    if method == "mxfp4":
        return told | {"modules_to_not_convert": rest}
    told |= {"activation_scheme": "static" if any(p.activation for p in found.values()) else "dynamic"}
    blocks = next((p for p in found.values() if p.format.code == "e4m3"), None)
    told["weight_block_size"] = list(blocks.format.block) if blocks and blocks.format.block[1] else None
    if blocks is None:
        told["weight_block_size"] = [128, 128]
    if name == FP4:
        told |= {EXPERT_DTYPE: "fp4"}
    if any(specs[p.scale].dtype == E8M0 for p in found.values()):
        told |= {"scale_fmt": "ue8m0"}
    return told | {"modules_to_not_convert": rest}


def _groups(found: Mapping[str, Parts]) -> dict[str, dict[str, Any]]:
    """One for each kind of weights; where there are several, each names its modules."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, p in found.items():
        kind = {"weights": weights(p.format), "format": p.format.method.partition(" ")[2]}
        kinds.setdefault(repr(kind), {"targets": [], **kind})["targets"].append(name.removesuffix(".weight"))
    made = [*kinds.values()]
    return {f"group_{i}": g if len(made) > 1 else g | {"targets": ["Linear"]} for i, g in enumerate(made)}


def plain_matrices(specs: Mapping[str, TensorSpec], found: Mapping[str, Parts]) -> list[str]:
    """The weights of modules that are not quantised."""
    codes = {p.codes for p in found.values()}
    plain = [n for n, s in specs.items() if n.endswith(".weight") and len(s.shape) == 2 and n not in codes]
    return [*dict.fromkeys((*plain, *experts_left(specs, found)))]


def experts_left(specs: Mapping[str, TensorSpec], found: Mapping[str, Parts]) -> list[str]:
    """The weights of experts that are not quantised: matrices, or stacks of them."""
    parts = {n for p in found.values() for n in p.stored}
    plain = (n for n, s in specs.items() if n not in parts and s.dtype.is_floating_point and s.dtype.itemsize > 1)
    ends = re.compile(r".*\.experts\.(\d+\.\w+\.weight|\w+(proj|weight|linear))")
    return [n for n in plain if len(specs[n].shape) in (2, 3) and ends.fullmatch(n)]
