"""Pickles that are read as data: an exact list of names, each an inert record; anything else is refused, and never run.

A module-wide list is not enough: a dotted name leads out of any module. So names are compared whole.
"""

import io
import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from fmoe.types import AdapterError


class Record:
    """An instance of a class that was named and not imported: its state."""

    state: dict[Any, Any]

    def __new__(cls, *args: Any, **named: Any) -> "Record":
        made = super().__new__(cls)
        made.state = {}
        return made

    def __init__(self, *args: Any, **named: Any): ...

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"state": state}

    def get(self, name: str, default: Any = None) -> Any:
        return self.state.get(name, default)

    def __hash__(self) -> int:  # it may be a key
        return id(self)


def _record(name: str) -> type[Record]:
    return type(name, (Record,), {})


class Storage(NamedTuple):
    """A storage that a tensor's pickle names."""

    kind: str
    key: str
    size: int


class Rebuilt(NamedTuple):
    """A tensor's record: storage, offset, shape, strides, dtype (None: the storage's)."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype | None


META, FILES, PLANNER = (f"torch.distributed.checkpoint.{n}" for n in ("metadata", "filesystem", "planner"))
RECORDS = {
    *(
        (META, n)
        for n in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "StorageMeta",
            "ChunkStorageMetadata",
            "TensorProperties",
        )
    ),
    (META, "_MEM_FORMAT_ENCODING"),
    (FILES, "_StorageInfo"),
    (FILES, "_StoragePrefix"),
    (FILES, "_StorageWriterTransforms"),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    *((PLANNER, n) for n in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *(("megatron.core.dist_checkpointing.strategies.torch", n) for n in ("MCoreSavePlan",)),
    ("torch.serialization", "_get_layout"),
    ("torch", "device"),
    *(
        (module, n)  # Python 3.13 names the second
        for module in ("pathlib", "pathlib._local")
        for n in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path")
    ),
}
"""What the `.metadata` of torch and of Megatron-Core names: nothing of it is imported."""
_ENUMS = "megatron.core.transformer.enums"
TRAINING = {
    ("argparse", "Namespace"),
    *((module, "set") for module in ("builtins", "__builtin__")),
    ("io", "BytesIO"),
    ("signal", "Signals"),
    ("_codecs", "encode"),
    *((m, n) for m in ("numpy.core.multiarray", "numpy._core.multiarray") for n in ("_reconstruct", "scalar")),
    *(("numpy", n) for n in ("ndarray", "dtype")),
    *(("megatron.core.enums", n) for n in ("ModelType", "Fp8Recipe", "Fp4Recipe")),
    *(
        (_ENUMS, n)
        for n in "ModelType LayerType AttnType AttnMaskType AttnBackend CudaGraphScope InferenceCudaGraphScope".split()
    ),
    *(("megatron.core.rerun_state_machine", f"Rerun{n}") for n in ("Diagnostic", "Mode", "State", "ValidationStatus")),
}
"""What a training state of Megatron's names beside tensors (arguments, random numbers): inert here, as the others."""


class Reader(pickle.Unpickler):
    """A pickle as data. Raises AdapterError for a name that is not on the list, whatever stands behind it."""

    def __init__(self, data: bytes, where: str, tensors: bool = False, training: bool = False):
        super().__init__(io.BytesIO(data))
        self.where, self.tensors, self.records = where, tensors, RECORDS | TRAINING if training else RECORDS

    def find_class(self, module: str, name: str) -> Any:
        if self.tensors:
            if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")):
                return _rebuild
            if (module, name) == ("torch._utils", "_rebuild_parameter"):
                return _parameter
            if (
                module == "torch"
                and name.endswith("Storage")
                and name.isidentifier()
                or (module, name) == ("torch.storage", "UntypedStorage")
            ):
                return name
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype) and name.isidentifier():
            return found
        if (module, name) in self.records:
            return _record(name)
        raise AdapterError(f"{self.where} names {module}.{name}: refused, and nothing of it was run")

    def persistent_load(self, pid: Any) -> Any:
        if self.tensors and isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
            return Storage(str(pid[1]), str(pid[2]), int(pid[4]))
        raise AdapterError(f"{self.where} holds a reference {str(pid)[:80]!r}: refused")


def _rebuild(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any = None, *_: Any
) -> Rebuilt:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise AdapterError("a tensor's record is malformed")
    return Rebuilt(storage, offset, shape, strides, dtype if isinstance(dtype, torch.dtype) else None)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def read(data: bytes, where: str, *, tensors: bool = False, training: bool = False) -> Any:
    """What a pickle holds; tensors, training: of tensors, and of a training state around them.

    Raises AdapterError naming it, for anything that is no plain record.
    """
    try:
        return Reader(data, where, tensors, training).load()
    except AdapterError:
        raise
    except Exception as error:  # whatever a broken pickle does
        raise AdapterError(f"{where} is no pickle that can be read: {type(error).__name__}: {error}") from None
