"""quantization_config: where a config has it, what it says of blocks, and what a fresh export writes."""

import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from fmoe.codecs.parts import Fresh
from fmoe.folding import meant
from fmoe.types import AdapterError, brief

FIELDS = ("quantization_config", "compression_config")
DECODED = "decoded_"
"""Before the name of such a field in the config of weights that were decoded: readers see none, the way back all."""

QUANT = "hf_quant_config.json"
"""Where some writers say again what quantization_config says."""
QUANTS = (QUANT, "quantize_config.json", "quant_config.json")
"""The same, with those of GPTQ and AWQ, which nothing is read from: no file for weights in other numbers."""

_KINDS: dict[str, Any] = {"quant_method": str, "format": str, "bits": Real, "config_groups": Mapping}
_WEIGHTS: dict[str, Any] = {"type": str, "strategy": str, "num_bits": Real}
_TEXT: dict[Any, str] = {str: "a name", Real: "a number", Mapping: "an object"}


def quantization_of(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The quantization_config of a config, at its top or in its text_config; None where it has none.

    Of weights that were decoded it is the one that they had. Raises AdapterError where it is no JSON object, or what it
    says of its method, its width or its groups is of another kind.
    """
    config = config or {}
    for field in (*FIELDS, *(DECODED + f for f in FIELDS)):
        if (found := config.get(field)) is not None and found != {}:
            found = found.to_dict() if hasattr(found, "to_dict") else found
            if not isinstance(found, Mapping):
                raise AdapterError(f"{field} is {brief(found)}, expected an object with its quant_method")
            for part, kind in _KINDS.items():
                _is(f"{field}.{part}", found.get(part), kind)
            for name, group in (found.get("config_groups") or {}).items():
                at = f"{field}.config_groups.{name}"
                _is(at, group, Mapping, absent=False)
                _is(f"{at}.format", group.get("format"), str)
                _is(f"{at}.weights", weights := group.get("weights"), Mapping)
                for part, kind in _WEIGHTS.items():
                    _is(f"{at}.weights.{part}", (weights or {}).get(part), kind)
            return dict(found)
    inner = config.get("text_config")
    return quantization_of(inner) if isinstance(inner, Mapping) else None


def _is(at: str, said: Any, kind: Any, *, absent: bool = True) -> None:
    """Raises AdapterError for what is of another kind. absent: None is none."""
    if not isinstance(said, kind) and not (absent and said is None):
        raise AdapterError(f"{at} is {brief(said)}, expected {_TEXT[kind]}")


def with_quant(config: dict[str, Any], quant: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a directory whose `QUANT` says quant: the format, where config.json says none, and its modules.

    >>> with_quant({"a": 1}, {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}})
    {'a': 1, 'quantization_config': {'quant_method': 'modelopt', 'quant_algo': 'NVFP4', 'exclude_modules': ['lm_head']}}
    """
    said, before = quant.get("quantization"), quantization_of(config)
    if not isinstance(said, Mapping) or not said.get("quant_algo"):
        return config
    if before is None:
        return config | {"quantization_config": {"quant_method": "modelopt", **said}}
    more = {n: said[n] for n in ("exclude_modules",) if said.get(n) and before.get("quant_method") == "modelopt"}
    return with_told(config, more | before) if more else config


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
    if not isinstance(quantize, str) or quantize not in EXPORTS:
        raise AdapterError(
            f"quantize={brief(quantize)}: expected one of {', '.join(map(repr, EXPORTS))}{meant(quantize, EXPORTS)}"
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


def gptq_version(config: Mapping[str, Any] | None) -> str | None:
    """How a config says that GPTQ's zero points are stored: "gptq", less one, or "gptq_v2"; None: it says nothing.

    "" where it says GPTQ, and of no version: for Transformers that is the first.

    >>> gptq_version({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}})
    'gptq_v2'
    """
    told = quantization_of(config) or {}
    said = told.get("checkpoint_format")
    if said is None:
        return "" if told.get("quant_method") == "gptq" else None
    return "gptq_v2" if said == "gptq_v2" else "gptq"


def with_told(config: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """The config, whose quantization_config is that, where it has one."""
    made = {n: told if n in FIELDS and v else v for n, v in config.items()}
    if made == config and isinstance(inner := made.get("text_config"), Mapping):
        made["text_config"] = with_told(inner, told)
    return made


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config, whose dtype is this one wherever it says one: of the text model, of towers.

    >>> with_dtype({"dtype": "float32", "vision_config": {"depth": 2, "torch_dtype": "float32"}}, torch.float16)
    {'dtype': 'float16', 'vision_config': {'depth': 2, 'torch_dtype': 'float16'}}
    """
    name = str(dtype).removeprefix("torch.")
    made = {n: name if n in ("dtype", "torch_dtype") and v is not None else v for n, v in config.items()}
    parts = {n: v for n, v in made.items() if n.endswith("_config") and n not in FIELDS and isinstance(v, Mapping)}
    return made | {n: with_dtype(part, dtype) for n, part in parts.items()}


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


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    made = {n: v for n, v in config.items() if n.removeprefix(DECODED) not in FIELDS}
    inner = made.get("text_config")
    return made | {"text_config": without(inner)} if isinstance(inner, Mapping) else made
