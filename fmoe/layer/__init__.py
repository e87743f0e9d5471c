"""Experts and the whole block as pure functions, and what only they need."""
