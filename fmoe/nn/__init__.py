"""Modules: parameters attached to the functions of this package, and nothing else."""

from fmoe.entrance import held
from fmoe.nn.block import MoE
from fmoe.nn.edges import GroupedExpertsDeepEP, GroupedExpertsTE
from fmoe.nn.experts import GroupedExperts
from fmoe.nn.mxfp4 import GroupedExpertsMXFP4

__all__ = ["GroupedExperts", "GroupedExpertsDeepEP", "GroupedExpertsMXFP4", "GroupedExpertsTE", "MoE"]

held(
    globals(),
    " ".join(__all__),
    late=" ".join(f"{n}.__init__ {n}.forward {n}.route" for n in __all__),
    error=ValueError,
)
