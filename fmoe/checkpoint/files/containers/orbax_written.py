"""An Orbax checkpoint before its data: plain chunks, each a file of its array's bytes, and the tree that names them.

A chunk is some of the first axis, uncompressed, so that the engine writes it as any tensor: which name is which chunk
is a rule of the notation, `params-w [(n c) d]` <-> `params.params.w/{n}.0 [c d]`. Orbax reads it, sharded or not.
"""

import json
from collections.abc import Mapping
from math import prod

import torch

from fmoe.checkpoint.files.weights import TREE
from fmoe.checkpoint.files.writer import Layout
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import rule, table
from fmoe.types import AdapterError, Problem, TensorSpec

CHUNK = 16 * 2**20
_DTYPES = {
    torch.float64: "<f8",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.bfloat16: "bfloat16",
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.int16: "<i2",
    torch.int8: "|i1",
    torch.uint8: "|u1",
}


def key(name: str) -> str:
    """The key of a parameter, whose name is its path below `params` joined with -."""
    return f"params.{name.replace('-', '.')}"


def chunked(specs: Mapping[str, TensorSpec], most: int = CHUNK) -> Adapter:
    """Arrays <-> their chunks: as many of the first axis as fit, and divide it."""
    return table(_chunks(name, spec, _rows(spec, most)) for name, spec in specs.items())


def _rows(spec: TensorSpec, most: int) -> int:
    count = spec.shape[0] if spec.shape else 1
    row = spec.nbytes // max(1, count)
    return max((c for c in range(1, count + 1) if count % c == 0 and c * row <= most), default=1)


def _chunks(name: str, spec: TensorSpec, rows: int) -> Adapter:
    rest = [f"a{i}" for i in range(len(spec.shape) - 1)]
    if not spec.shape:
        return rule(name, f"{key(name)}/0")
    there = ".".join(["{n}", *("0" for _ in rest)])
    axes = " ".join(rest)
    return rule(f"{name} [(n c) {axes}]", f"{key(name)}/{there} [c {axes}]", n=spec.shape[0] // rows, c=rows)


def orbax_layout(specs: Mapping[str, TensorSpec], chunks: Mapping[str, TensorSpec]) -> tuple[Layout, dict[str, bytes]]:
    """The layout of the chunks, and the small files: each array's record, and the tree."""
    if odd := {n: s.dtype for n, s in specs.items() if s.dtype not in _DTYPES or not prod(s.shape)}:
        name, dtype = next(iter(odd.items()))
        text = f"{name!r} is {dtype} {list(specs[name].shape)}: an Orbax checkpoint of fmoe's has no such arrays"
        raise AdapterError([Problem(text, tuple(odd))])
    small, tree = dict[str, bytes](), dict[str, object]()
    first = {chunk.rpartition("/")[0]: spec.shape for chunk, spec in chunks.items()}
    for name, spec in specs.items():
        record = {"zarr_format": 2, "shape": spec.shape, "chunks": first[key(name)], "dtype": _DTYPES[spec.dtype]}
        record |= {"compressor": None, "filters": None, "fill_value": None, "order": "C", "dimension_separator": "."}
        small[f"{key(name)}/.zarray"] = json.dumps(record).encode()
        words = key(name).split(".")
        path = [{"key": word, "key_type": 2} for word in words]
        value = {"value_type": "np.ndarray", "skip_deserialize": False}
        tree[str(tuple(words))] = {"key_metadata": path, "value_metadata": value}
    said = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False}
    small[TREE] = json.dumps(said | {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}).encode()
    heads = {chunk: (b"", spec.nbytes) for chunk, spec in chunks.items()}
    return Layout({n: n for n in chunks}, heads, dict.fromkeys(chunks, 0)), small
