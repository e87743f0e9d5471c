"""What load_state_dict brings into modules: numbers, never codes in their place, which a copy would cast in silence."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fmoe.codecs.stacks import is_code
from fmoe.layer.latent import LATENT
from fmoe.shapes import DECODED
from fmoe.types import INTEGERS

RAW = (torch.uint8, torch.int8)


def as_numbers(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raises ValueError for codes, booleans or complex numbers in the place of numbers, and for these in that of codes.

    Floats of another width are cast, as torch does; the bytes of codes are taken as they are.
    """
    _check(module, dict(_read(module)), state, prefix)


def _check(module: nn.Module, read: Mapping[str, Tensor], state: dict[str, Any], prefix: str) -> None:
    for name, held in read.items():
        t = state.get(prefix + name)
        if not isinstance(t, Tensor):
            continue
        if name.endswith("tid2eid"):
            expected = "" if t.dtype in INTEGERS else "expected integers: ids of experts"
        elif is_code(held) and isinstance(held, nn.Parameter):
            expected = "" if t.dtype in (held.dtype, *RAW) else f"expected {held.dtype}, or its bytes as they are"
            state[prefix + name] = t if expected or t.dtype == held.dtype else t.view(held.dtype)
        else:
            expected = DECODED if is_code(t) else ""
        if expected:
            raise ValueError(f"{type(module).__name__}.load_state_dict: {prefix + name!r} is {t.dtype}, {expected}")


def _read(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the module computes with, by name."""
    yield from module.named_parameters(remove_duplicate=False)
    for name, t in module.named_buffers(remove_duplicate=False):
        if "e_score_correction_bias" in name or name.endswith("tid2eid"):
            yield name, t


def as_moe_takes_it(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The dict that load_state_dict is about to read, under the module's names, and the module with what it lacks.

    What `fmoe.moe` takes where it is present, and no config promises: biases, a table of experts by token id.
    """
    names = {theirs: ours for ours, theirs in LATENT.items()}
    names |= {"gate": "gate.proj"} if module.config.router_norm else {"gate.proj": "gate"}
    parts, lacking = dict(module.named_modules()), dict[str, Tensor]()
    for name in [n for n in state if n.startswith(prefix)]:
        path, dot, leaf = name.removeprefix(prefix).rpartition(".")
        ours = names.get(path, path) if leaf in ("weight", "bias") else path
        t = state[f"{prefix}{ours}{dot}{leaf}"] = state.pop(name)
        part = parts.get(ours) if dot else None
        if part is not None and part._parameters.get(leaf, t) is None:
            like = next(part.parameters())
            lacking[f"{ours}.{leaf}"] = nn.Parameter(like.new_empty(t.shape), like.requires_grad)
        if part is not None and part._buffers.get(leaf, t) is None:
            dtype = torch.float32 if t.is_floating_point() or leaf != "tid2eid" else t.dtype
            lacking[f"{ours}.{leaf}"] = next(part.parameters()).new_empty(t.shape, dtype=dtype)
    _check(module, dict(_read(module)) | lacking, state, prefix)
    for name, made in lacking.items():
        path, dot, leaf = name.rpartition(".")
        held = parts[path]._parameters if isinstance(made, nn.Parameter) else parts[path]._buffers
        held[leaf] = made
