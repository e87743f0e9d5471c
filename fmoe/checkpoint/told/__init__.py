"""What a written directory tells of its codes: config.json to its readers, and notes of those that fail at it."""

from fmoe.checkpoint.told.listed import listing
from fmoe.checkpoint.told.unread import unread

__all__ = ["listing", "unread"]
