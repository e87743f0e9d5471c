"""MaxText's directories as Orbax writes them: compressed arrays in chunks."""

import json

import torch


def saved(path, tensors, *, ocdbt=True, zarr3=False, chunk=lambda shape: shape, more=(), record=None):
    """As Orbax lays it: compressed arrays of these chunks under their keys, and the tree; no line of Orbax runs.

    record: what else is said of every array to its driver.
    """
    import tensorstore

    path.mkdir(parents=True)
    where = {"driver": "ocdbt", "base": f"file://{path}/"} if ocdbt else {"driver": "file", "path": f"{path}/"}
    tree = {}
    for name, tensor in {**tensors, **dict(more)}.items():
        words = ["params", *name.split("-")] if name in tensors else name.split(".")
        store = {**where, "path": f"{where.get('path', '')}{'.'.join(words)}/"}
        kind, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store, "dtype": kind}
        spec["schema"] = {"domain": {"shape": shape}, "chunk_layout": {"write_chunk": {"shape": list(chunk(shape))}}}
        spec["metadata"] = record or {}
        if not zarr3:
            spec["metadata"] = {"compressor": {"id": "zstd"}, "dimension_separator": "."} | spec["metadata"]
        array = tensorstore.open(spec, create=True, write=True).result()
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        array.write(raw.view(array.dtype.numpy_dtype).reshape(tensor.shape)).result()
        value = {"value_type": "jax.Array", "skip_deserialize": False}
        key = [{"key": w, "key_type": 2} for w in words]
        tree[str(tuple(words))] = {"key_metadata": key, "value_metadata": value}
    said = {"tree_metadata": tree, "use_ocdbt": ocdbt, "use_zarr3": zarr3, "store_array_data_equal_to_fill_value": True}
    (path / "_METADATA").write_text(json.dumps(said))
    return path
