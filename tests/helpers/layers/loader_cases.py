"""Directories that other systems' loaders read into blank models."""

from pathlib import Path
from typing import Any

import hf
import hf_zoo as zoo
import torch
from safetensors.torch import load_file
from torch import Tensor


def saved(name: str, path: Path) -> tuple[Any, dict[str, Tensor]]:
    """A model's config, and its tensors as they lie at path."""
    if name in hf.MODELS:
        model = hf.write(name, path)
    else:
        model = zoo.build(name)
        model.save_pretrained(path)
    return model.config, {n: t for f in path.glob("*.safetensors") for n, t in load_file(f).items()}


def blank(native: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model with these parameters, not loaded yet; its experts in their own order, as modules make them."""
    return {n: torch.full(t.shape, -7.0).to(t.dtype) for n, t in native.items()}
