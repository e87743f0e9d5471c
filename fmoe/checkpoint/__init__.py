"""Checkpoints on disk: directories opened as values, converted, loaded, saved, verified, and described."""

from fmoe.checkpoint.convert import convert
from fmoe.checkpoint.diff import diff
from fmoe.checkpoint.files.directory import Checkpoint, open_checkpoint
from fmoe.checkpoint.inspect import inspect
from fmoe.checkpoint.load import load
from fmoe.checkpoint.open import adapter, adapter_of, plan_from
from fmoe.checkpoint.report import Report
from fmoe.checkpoint.save import save
from fmoe.checkpoint.verify import verify
from fmoe.entrance import held

__all__ = [
    "Checkpoint",
    "Report",
    "adapter",
    "adapter_of",
    "convert",
    "diff",
    "inspect",
    "load",
    "open_checkpoint",
    "plan_from",
    "save",
    "verify",
]

held(globals(), "adapter_of convert diff inspect load open_checkpoint plan_from save verify", late="adapter")
