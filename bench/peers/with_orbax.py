"""Orbax beside ours: it restores what fmoe wrote, and fmoe reads what it saved, in its three forms.

python bench/peers/with_orbax.py     where orbax-checkpoint and tensorstore are installed
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import torch
from models import MODELS, directory, files, same

import fmoe


def leaves(tree, path=()):
    for name, value in tree.items():
        yield from leaves(value, (*path, name)) if isinstance(value, dict) else [("-".join((*path, name)), value)]


def tensor(array) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    dtype = getattr(torch, str(array.dtype))
    return torch.from_numpy(array.reshape(-1).view(np.uint8).copy()).view(dtype).view(array.shape)


def tree_of(tensors):
    tree: dict = {}
    for name, value in tensors.items():
        *path, last = ("params", *name.split("-"))
        inside = tree
        for word in path:
            inside = inside.setdefault(word, {})
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        inside[last] = jax.numpy.asarray(raw.view(jax.numpy.dtype(str(value.dtype)[6:])).reshape(value.shape))
    return tree


def main() -> None:
    for name in MODELS:
        for scan in (False, True):
            with tempfile.TemporaryDirectory() as out:
                here = directory(name, Path(out) / "hf")
                config, tensors = here
                want = fmoe.adapter(config["model_type"], config, system="maxtext", scan=scan).from_hf(tensors)
                fmoe.convert(f"{out}/hf", f"{out}/ours", to="maxtext", scan=scan)
                plain = ocp.PyTreeCheckpointer().restore(f"{out}/ours")
                same({n.removeprefix("params-"): tensor(v) for n, v in leaves(plain)}, want)
                one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
                args = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=one), plain)  # noqa: B023
                found = ocp.PyTreeCheckpointer().restore(f"{out}/ours", restore_args=args)
                assert all(isinstance(v, jax.Array) for _, v in leaves(found))
                same({n.removeprefix("params-"): tensor(v) for n, v in leaves(found)}, want)
                for how in (dict(use_ocdbt=True), dict(use_ocdbt=True, use_zarr3=True), dict(use_ocdbt=False)):
                    theirs = Path(out) / f"theirs-{'-'.join(how)}-{how['use_ocdbt']}" / "items"
                    saved = tree_of(want) | {"step": jax.numpy.zeros(())}
                    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how)).save(theirs, saved)
                    fmoe.convert(theirs.parent, f"{theirs}-back", to="hf", config=config)
                    same(files(Path(f"{theirs}-back")), tensors)
            print(f"{name}, scan={scan}: equal, with orbax-checkpoint {ocp.__version__}")


if __name__ == "__main__":
    main()
