"""quantization_config: what it says of blocks, and what it has to say of the tensors that are written."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from fmoe.codecs.foreign.told import calibrated, weights
from fmoe.codecs.format import Format
from fmoe.codecs.formats import FOREIGN
from fmoe.codecs.parts import Fresh, Parts
from fmoe.codecs.values import E8M0
from fmoe.folding import meant
from fmoe.types import AdapterError, TensorSpec, brief

FIELDS = ("quantization_config", "compression_config")
DECODED = "decoded_"
"""Before the name of such a field in the config of weights that were decoded: readers see none, the way back all."""

QUANT = "hf_quant_config.json"
"""Where some writers say again what quantization_config says."""


def quantization_of(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The quantization_config of a config, at its top or in its text_config; None where it has none.

    Of weights that were decoded it is the one that they had. Raises AdapterError where it is no JSON object.
    """
    config = config or {}
    for field in (*FIELDS, *(DECODED + f for f in FIELDS)):
        if (found := config.get(field)) is not None and found != {}:
            found = found.to_dict() if hasattr(found, "to_dict") else found
            if not isinstance(found, Mapping):
                raise AdapterError(f"{field} is {brief(found)}, expected an object with its quant_method")
            return dict(found)
    inner = config.get("text_config")
    return quantization_of(inner) if isinstance(inner, Mapping) else None


def weight_block(config: Mapping[str, Any] | None) -> tuple[int, int]:
    """The rows and columns of FP8's blocks as weight_block_size says them; 128 by 128 where it says none.

    >>> weight_block({"quantization_config": {"weight_block_size": [1, 32]}})
    (1, 32)
    """
    sides = (quantization_of(config) or {}).get("weight_block_size")
    if sides is None:
        return 128, 128
    plain = lambda n: isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(map(plain, sides)):
        raise AdapterError(
            f"quantization_config.weight_block_size is {brief(sides)}, expected rows and columns, as [128, 128]"
        )
    return int(sides[0]), int(sides[1])


EXPORTS = {"fp8": "fp8 blocks", "mxfp8": "mxfp8", "mxfp4": "mxfp4 packed", "int4": "int4", "nvfp4": "nvfp4 packed"}
"""What `quantize=` may name -> the format that is written where a family has published none of that kind."""
ACROSS = {"nvfp4": "nvfp4 stack"}
"""The same of experts in stacks of matrices [in, out]."""
EXPERTS = r".*\.experts\.(\d+\.\w+\.weight|(gate_up|up|down)_proj)"

EXAMPLES = ("a.mlp.experts.0.up_proj.weight", "a.ffn.experts.0.w1.weight", "a.mlp.experts.gate_up_proj")


def exports(fresh: Fresh, quantize: str, *, across: bool = False) -> Fresh:
    """The formats of a family, those of one kind first and no others to be written.

    across: its experts are stacks of matrices [in, out].

    >>> exports((("mxfp4 blocks", ".*"), ("fp8 blocks", None)), "mxfp4")
    (('mxfp4 blocks', '.*'), ('fp8 blocks', None))
    """
    if quantize not in EXPORTS:
        raise AdapterError(
            f"quantize={quantize!r}: expected one of {', '.join(map(repr, EXPORTS))}{meant(quantize, EXPORTS)}"
        )
    own = [(name, pattern) for name, pattern in fresh if name.startswith(quantize) and pattern is not None]
    written = own or [(ACROSS.get(quantize, EXPORTS[quantize]) if across else EXPORTS[quantize], EXPERTS)]
    if not any(re.fullmatch(pattern or "", n) for _, pattern in written for n in EXAMPLES):
        written = [(name, f"{pattern}|{EXPERTS}") for name, pattern in written]
    read = [(name, None) for name, _ in fresh if name not in dict(written)]
    return (*written, *read)


def bits(config: Mapping[str, Any] | None) -> int | None:
    """How many bits a quantised weight has, where a quantization_config says one number for all.

    >>> bits({"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}})
    8
    """
    told = quantization_of(config) or {}
    groups = told.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, dict) else []
    found = {w.get("num_bits") for w in weights if isinstance(w, Mapping)} | {told.get("bits")} - {None}
    found.discard(None)
    return found.pop() if len(found) == 1 else None


def ruled_out(config: Mapping[str, Any] | None) -> frozenset[str]:
    """The formats that a config rules out, where names and shapes cannot: by bits, and by how zero points are stored.

    >>> sorted(ruled_out({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}}))
    ['gptq int4', 'gptq int8', 'int8 pack', 'int8 pack zeros']
    """
    other = 4 if bits(config) == 8 else 8  # without a word it is 4
    second = (quantization_of(config) or {}).get("checkpoint_format") == "gptq_v2"
    packs = [f"int{other} pack", f"int{other} pack zeros"]
    return frozenset([*packs, *(f"{'gptq' if second else 'gptq_v2'} int{n}" for n in (4, 8))])


IGNORED = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude", "exclude_modules")


def ignored(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The modules that a quantization_config leaves as they are: names, their ends, globs, or `re:` and a pattern."""
    told = quantization_of(config) or {}
    names: list[str] = []
    for field in IGNORED:
        found = told.get(field) or []
        if not isinstance(found, list | tuple) or not all(isinstance(n, str) and _readable(n) for n in found):
            raise AdapterError(f"quantization_config.{field} is {brief(found)}, expected a list of module names")
        names += found
    return tuple(names)


def _readable(name: str) -> bool:
    try:
        re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
    except re.error:
        return False
    return True


def is_ignored(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor's module is one of those.

    >>> is_ignored("model.layers.0.mlp.gate.weight", ["mlp.gate"]), is_ignored("lm_head.weight", ["re:.*head"])
    (True, True)
    """
    module = name.removesuffix(".weight")
    for p in patterns:
        if p.startswith("re:"):
            if re.match(p[3:], module):
                return True
        elif module == p or module.startswith(f"{p}.") or module.endswith(f".{p}") or fnmatchcase(module, p):
            return True
    return False


def stated(config: Mapping[str, Any], specs: Mapping[str, TensorSpec], found: Mapping[str, Parts]) -> dict[str, Any]:
    """The config of a directory of these tensors, of which `found` are quantised: its quantization_config says so.

    What it said before stays, where it speaks of the same method; without quantised tensors it says nothing of any.
    """
    made = coded(config)
    before = quantization_of(config)
    if not found:
        return _without(made) if before is not None else made
    if before is not None and _speaks_of(before, {p.format.name: p.format for p in found.values()}):
        return made
    told = quantization_config(specs, found)
    return _without(made) | ({"quantization_config": told} if told["quant_method"] else {})


def _speaks_of(told: Mapping[str, Any], formats: Mapping[str, Format]) -> bool:
    """Whether a quantization_config is one that a checkpoint in these formats may have."""
    methods = {f.method.partition(" ")[0] for f in formats.values()}
    if formats.keys() <= FOREIGN.keys():  # which several tools write
        methods |= {"modelopt", "compressed-tensors", "quark", "fbgemm_fp8", "fp8"}
    if told.get("quant_method") not in methods:
        return False
    named = {f.method.partition(" ")[2] for f in formats.values()}
    return told.get("quant_method") != "compressed-tensors" or told.get("format") in {None, "mixed-precision", *named}


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config, whose dtype is this one wherever it says one."""
    name = str(dtype).removeprefix("torch.")
    made = {n: name if n in ("dtype", "torch_dtype") and v is not None else v for n, v in config.items()}
    inner = made.get("text_config")
    return made | {"text_config": with_dtype(inner, dtype)} if isinstance(inner, Mapping) else made


def quantization_config(specs: Mapping[str, TensorSpec], found: Mapping[str, Parts]) -> dict[str, Any]:
    """What Transformers and compressed-tensors have to be told of a checkpoint in which these tensors are quantised."""
    formats = {p.format.name: p for p in found.values()}
    leader = next(iter(formats.values()))
    plain = [n.removesuffix(".weight") for n, s in specs.items() if n.endswith(".weight") and len(s.shape) == 2]
    codes = {p.codes.removesuffix(".weight") for p in found.values()}
    rest = [n for n in plain if n not in codes]
    method, name = leader.format.method, leader.format.name
    if method.startswith("compressed-tensors"):
        how = method.partition(" ")[2]
        group = {"targets": ["Linear"], "weights": weights(leader.format), "format": how}
        head = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": how}
        return head | {"config_groups": {"group_0": group}, "ignore": rest}
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
    if name == "mxfp4 .scale":
        told |= {"expert_dtype": "fp4"}
    if any(specs[p.scale].dtype == E8M0 for p in found.values()):
        told |= {"scale_fmt": "ue8m0"}
    return told | {"modules_to_not_convert": rest}


def decoded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of weights decoded for a reader that knows no codes; `coded` is its inverse.

    >>> decoded({"num_experts": 2, "quantization_config": {"quant_method": "fp8"}})
    {'num_experts': 2, 'decoded_quantization_config': {'quant_method': 'fp8'}}
    """
    return _named(config, {f: DECODED + f for f in FIELDS})


def coded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the codes that `decoded` speaks of.

    >>> coded(decoded({"text_config": {"quantization_config": {}}}))
    {'text_config': {'quantization_config': {}}}
    """
    return _named(config, {DECODED + f: f for f in FIELDS})


def _named(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    made = {names.get(n, n): v for n, v in config.items()}
    inner = made.get("text_config")
    return made | {"text_config": _named(inner, names)} if isinstance(inner, Mapping) else made


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    made = {n: v for n, v in config.items() if n.removeprefix(DECODED) not in FIELDS}
    inner = made.get("text_config")
    return made | {"text_config": _without(inner)} if isinstance(inner, Mapping) else made
