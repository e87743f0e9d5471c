"""Tensors and files of directories of other systems, compared and saved."""

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file


def files(path):
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def saved(path, tensors):
    """As torch itself writes it."""
    dcp.save(dict(tensors), checkpoint_id=str(path), no_dist=True)
    return path
