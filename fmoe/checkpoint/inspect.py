"""What a checkpoint is, in one dict that a person or a machine can read: family, layout, experts, sizes, problems."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fmoe.checkpoint.files import Checkpoint, open_checkpoint
from fmoe.checkpoint.open import adapter_of
from fmoe.types import EXPERT_TENSORS, AdapterError


def inspect(path: Path | str) -> dict[str, Any]:
    """Family, layout, expert layers, dtypes, sizes and problems of a directory; no tensor is read.

    Raises AdapterError where the directory cannot be opened at all; what is wrong inside is listed under "problems".
    """
    source = open_checkpoint(path)
    dtypes: Counter[str] = Counter()
    for spec in source.specs.values():
        dtypes[str(spec.dtype).removeprefix("torch.")] += spec.nbytes
    found: dict[str, Any] = {
        "path": str(path),
        "model_type": source.model_type,
        "format": "native" if source.native else "hf",
        "tensors": len(source.specs),
        "files": len(set(source.files.values())),
        "bytes": source.nbytes,
        "dtypes": dict(dtypes.most_common()),
        "experts": None,
        "rules": [],
        "lossless": None,
        "problems": [],
    }
    try:
        found |= _experts(source)
    except AdapterError as error:
        found["problems"] = list(error.problems)
    return found


def _experts(source: Checkpoint) -> dict[str, Any]:
    adapter = adapter_of(source)
    facts: dict[str, Any] = {"lossless": adapter.lossless, "rules": str(adapter).split("\n")}
    try:
        config = asdict(adapter.moe_config)
        facts["moe_config"] = config | {"dtype": str(config["dtype"]).removeprefix("torch.")}
    except AdapterError as error:
        facts["problems"] = list(error.problems)
    native = source.specs if source.native else adapter.plan(source.specs).targets
    stacks = {n: spec for n, spec in native.items() if n.rpartition(".")[2] in EXPERT_TENSORS}
    layers = dict.fromkeys(n.rpartition(".")[0] for n in stacks)
    shapes = {n.rpartition(".")[2]: list(spec.shape) for n, spec in stacks.items()}
    facts["experts"] = {"layers": len(layers), "shapes": shapes, "bytes": sum(s.nbytes for s in stacks.values())}
    return facts
