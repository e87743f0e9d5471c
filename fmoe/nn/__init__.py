"""Modules: parameters attached to the functions of this package, and nothing else."""

from fmoe.nn.block import MoE
from fmoe.nn.edges import GroupedExpertsDeepEP, GroupedExpertsTE
from fmoe.nn.experts import GroupedExperts
from fmoe.nn.mxfp4 import GroupedExpertsMXFP4

__all__ = ["GroupedExperts", "GroupedExpertsDeepEP", "GroupedExpertsMXFP4", "GroupedExpertsTE", "MoE"]
