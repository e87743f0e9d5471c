"""An item of a torch DCP file: the zip that `torch.save` makes of one tensor, its bytes stored in one run.

Read: where that run lies, from the directory at the item's end, and what the record says that it is. Written: the frame
around the run, which depends on shape and dtype alone, so that the bytes can come later.
"""

import io
import pickle
import struct
from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from fmoe.checkpoint.files.containers import pickles
from fmoe.types import AdapterError, TensorSpec

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "BFloat16Storage": torch.bfloat16,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
TAIL = 65536
NO_TIME = (0, 33)  # 1980-01-01, as torch writes
BIG = 0xFFFFFFFF


class Member(NamedTuple):
    at: int
    size: int


def members(tail: bytes, length: int, where: str) -> dict[str, Member]:
    """name -> (where its local header begins, its size), of the zip of that length which ends in `tail`."""
    end = tail.rfind(b"PK\5\6")
    if end < 0 or end + 22 > len(tail):
        raise AdapterError(f"{where} is no zip: cut short, or no item of torch's")
    count, size, start = struct.unpack("<HII", tail[end + 10 : end + 20])
    wide = tail.rfind(b"PK\6\6", 0, end)
    if BIG in (size, start) or count == 0xFFFF:
        if wide < 0:
            raise AdapterError(f"{where} is no zip: its end is broken")
        count, size, start = struct.unpack("<QQQ", tail[wide + 32 : wide + 56])
    at = start - (length - len(tail))
    if not 0 <= at <= at + size <= len(tail):
        raise AdapterError(f"{where}: its directory of {size:,} bytes lies outside of the item")
    found: dict[str, Member] = {}
    for _ in range(count):
        if tail[at : at + 4] != b"PK\1\2" or at + 46 > len(tail):
            raise AdapterError(f"{where} is no zip: its directory is broken")
        (method,) = struct.unpack("<H", tail[at + 10 : at + 12])
        packed, plain, n, m, k = struct.unpack("<IIHHH", tail[at + 20 : at + 34])
        (header,) = struct.unpack("<I", tail[at + 42 : at + 46])
        name, extra = tail[at + 46 : at + 46 + n].decode(errors="replace"), tail[at + 46 + n : at + 46 + n + m]
        plain, packed, header = _wide(extra, plain, packed, header)
        if method or packed != plain:
            raise AdapterError(f"{where}: {name!r} is compressed, expected it stored")
        if name in found:
            raise AdapterError(f"{where}: {name!r} is there twice")
        found[name] = Member(header, plain)
        at += 46 + n + m + k
    return found


def reaches(tail: bytes, length: int) -> bool:
    """Whether the end of a zip of that length holds its whole directory."""
    end = tail.rfind(b"PK\5\6")
    if end < 0 or end + 22 > len(tail):
        return True  # it holds none, and `members` says so
    size, start = struct.unpack("<II", tail[end + 12 : end + 20])
    wide = tail.rfind(b"PK\6\6", 0, end)
    if BIG in (size, start) and wide >= 0:
        size, start = struct.unpack("<QQ", tail[wide + 40 : wide + 56])
    return bool(start >= length - len(tail))


def _wide(extra: bytes, plain: int, packed: int, header: int) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack("<HH", extra[at : at + 4])
        if kind == 1:
            more = list(struct.unpack(f"<{size // 8}Q", extra[at + 4 : at + 4 + size // 8 * 8]))
            plain = more.pop(0) if plain == BIG and more else plain
            packed = more.pop(0) if packed == BIG and more else packed
            header = more.pop(0) if header == BIG and more else header
        at += 4 + size
    return plain, packed, header


def record(data: bytes, where: str) -> tuple[TensorSpec, str]:
    """What the tensor is whose `data.pkl` this is, and the key of its storage."""
    found = pickles.read(data, where, tensors=True)
    if not isinstance(found, pickles.Rebuilt):
        raise AdapterError(f"{where} holds a {type(found).__name__}, expected a tensor")
    spec = spec_of(found, where)
    if found.offset:
        raise AdapterError(f"{where} is not contiguous: strides {list(found.strides)} from {found.offset}")
    return spec, found.storage.key


def spec_of(found: pickles.Rebuilt, where: str) -> TensorSpec:
    """What a tensor's record says that it is. Raises AdapterError for one that is not contiguous."""
    dtype = found.dtype or _STORAGES.get(found.storage.kind)
    if dtype is None:
        raise AdapterError(f"{where} has the storage {found.storage.kind}, which is not known")
    if not all(type(n) is int and n >= 0 for n in (*found.shape, found.offset)):
        raise AdapterError(f"{where} has shape {list(found.shape)} from {found.offset}: no numbers")
    spec = TensorSpec(found.shape, dtype)
    if spec.numel > 1 and found.strides != strides_of(spec.shape):
        text = f"{where} is not contiguous: strides {list(found.strides)} from {found.offset}"
        raise AdapterError(f"{text}. Fix: save what tensor.contiguous() gives")
    return spec


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps, step = [], 1
    for n in reversed(shape):
        steps.append(step)
        step *= max(n, 1)
    return tuple(reversed(steps))


class Frame(NamedTuple):
    """The bytes before and after a tensor's own."""

    head: bytes
    tail: bytes


def frame(spec: TensorSpec) -> Frame:
    """What `torch.save` writes around the bytes of a tensor. (Its checksum, which torch does not read, is 0.)"""
    before = [("archive/data.pkl", _pickled(spec)), ("archive/byteorder", b"little")]
    after = [("archive/version", b"3\n")]
    head, listed = b"", []
    for name, data in before:
        listed.append(_entry(name, len(head), len(data), _crc(data)))
        head += _local(name, len(data), _crc(data)) + data
    at = len(head)
    name = "archive/data/0"
    local = _local(name, spec.nbytes, 0)
    pad = -(at + len(local) + 4) % 64
    local = _local(name, spec.nbytes, 0, b"FB" + struct.pack("<H", pad) + b"Z" * pad)
    listed.append(_entry(name, at, spec.nbytes, 0))
    head += local
    tail, offset = b"", len(head) + spec.nbytes
    for name, data in after:
        listed.append(_entry(name, offset + len(tail), len(data), _crc(data)))
        tail += _local(name, len(data), _crc(data)) + data
    start, listing = offset + len(tail), b"".join(listed)
    tail += listing
    if start >= BIG:
        tail += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, len(listed), len(listed), len(listing), start)
        tail += struct.pack("<IIQI", 0x07064B50, 0, start + len(listing), 1)
    n = len(listed)
    tail += struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, n, n, len(listing), min(start, BIG), 0)
    return Frame(head, tail)


def _crc(data: bytes) -> int:
    import zlib

    return zlib.crc32(data)


def _local(name: str, size: int, crc: int, extra: bytes = b"") -> bytes:
    wide = struct.pack("<HHQQ", 1, 16, size, size) if size >= BIG else b""
    head = struct.pack(
        "<IHHHHHIIIHH",
        0x04034B50,
        45 if wide else 20,
        0,
        0,
        *NO_TIME,
        crc,
        min(size, BIG),
        min(size, BIG),
        len(name),
        len(wide + extra),
    )
    return head + name.encode() + wide + extra


def _entry(name: str, at: int, size: int, crc: int) -> bytes:
    more = struct.pack("<QQ", size, size) * (size >= BIG) + struct.pack("<Q", at) * (at >= BIG)
    extra = struct.pack("<HH", 1, len(more)) + more if more else b""
    head = struct.pack(
        "<IHHHHHHIIIHHHHHII",
        0x02014B50,
        45,
        45 if more else 20,
        0,
        0,
        *NO_TIME,
        crc,
        min(size, BIG),
        min(size, BIG),
        len(name),
        len(extra),
        0,
        0,
        0,
        0,
        min(at, BIG),
    )
    return head + name.encode() + extra


class _Tensor:
    def __init__(self, spec: TensorSpec):
        self.spec = spec


class _Storage:
    def __init__(self, spec: TensorSpec):
        self.spec = spec


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        spec = obj.spec
        kind = getattr(torch, _NAMES[spec.dtype]) if spec.dtype in _NAMES else torch.storage.UntypedStorage
        return ("storage", kind, "0", "cpu", spec.numel if spec.dtype in _NAMES else spec.nbytes)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        spec = obj.spec
        args: tuple[Any, ...] = (_Storage(spec), 0, spec.shape, strides_of(spec.shape), False, OrderedDict())
        if spec.dtype in _NAMES:
            return torch._utils._rebuild_tensor_v2, args
        return torch._utils._rebuild_tensor_v3, (*args, spec.dtype)


def _pickled(spec: TensorSpec) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(_Tensor(spec))
    return out.getvalue()
