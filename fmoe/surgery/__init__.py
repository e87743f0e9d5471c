"""Checkpoints cut, reordered, grown and merged by expert: native tensors and the Hugging Face config, in step.

    layers      the blocks of a checkpoint, by name
    select      some of the experts
    permute     other numbers for the same experts
    replicate   every expert several times, and as many times more of them for a token
    merge       one expert of each group
    upcycle     a dense checkpoint's MLPs as experts

Each function is pure and returns (native, config): router, biases and correction bias go along, every name that the
config has for a size changes, and `fmoe.save(native, path, fmoe.adapter(model_type, config))` writes what Transformers
loads.
"""

from fmoe.entrance import held
from fmoe.surgery.blocks import merge, permute, replicate, select
from fmoe.surgery.rows import layers
from fmoe.surgery.upcycle import upcycle

__all__ = ["layers", "merge", "permute", "replicate", "select", "upcycle"]

held(globals(), late="*", error=ValueError)
