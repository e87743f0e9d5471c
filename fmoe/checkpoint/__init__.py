"""Checkpoints on disk: directories opened as values, converted tensor by tensor, verified, and described."""

from fmoe.checkpoint.convert import Report, convert, verify
from fmoe.checkpoint.files import Checkpoint, open_checkpoint
from fmoe.checkpoint.inspect import inspect
from fmoe.checkpoint.open import adapter, adapter_of

__all__ = ["Checkpoint", "Report", "adapter", "adapter_of", "convert", "inspect", "open_checkpoint", "verify"]
