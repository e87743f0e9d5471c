"""Modules: parameters attached to the functions of this package, and nothing else."""

from fmoe.nn.block import MoE
from fmoe.nn.edges import GroupedExpertsDeepEP, GroupedExpertsTE
from fmoe.nn.experts import GroupedExperts

__all__ = ["GroupedExperts", "GroupedExpertsDeepEP", "GroupedExpertsTE", "MoE"]
