"""Experts and the whole block as pure functions, and what only they need."""

from fmoe.entrance import held
from fmoe.layer import block, experts

held(vars(experts), late="experts", where="fmoe", error=ValueError)
held(vars(block), late="moe", where="fmoe", error=ValueError)
