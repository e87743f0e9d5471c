"""Sharded parameters and Hugging Face files, through torch.distributed.checkpoint: every rank its own bytes, in place.

    fmoe.dcp.load(params, path)      path's tensors into params, through strided views of them
    fmoe.dcp.save(params, path)      to_hf(params) as one checkpoint, each rank writing what it holds
    fmoe.dcp.Planner(params)         the same views for a storage reader of your own
    fmoe.dcp.surfacing()             around DCP's own functions: what goes wrong, as an AdapterError

On any mesh, and without one: what is saved on two ranks is loaded on four. DCP gathers what goes wrong on any rank, so
all ranks raise the same `AdapterError`, and none waits for another.
"""

from fmoe.dcp.boxes import surfacing
from fmoe.dcp.loading import Planner, load
from fmoe.dcp.saving import save
from fmoe.entrance import held

__all__ = ["Planner", "load", "save", "surfacing"]

held(globals(), "Planner.__init__ load save")
