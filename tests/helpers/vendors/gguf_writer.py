"""GGUF files by hand, well made or not: every record may be said otherwise than it is."""

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30, torch.uint8: 39, torch.int8: 24}
KEYS = {"general.architecture": "qwen3moe", "general.file_type": 7, "tokenizer.ggml.tokens": ["a", "bc"]}


def text(said: str | bytes) -> bytes:
    data = said if isinstance(said, bytes) else said.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):  # a type and what follows
        return text(name) + value
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return text(name) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    return text(name) + struct.pack("<II", 4, value)


def write(
    path: Path, tensors: dict[str, Tensor], keys: dict[str, Any] = KEYS, *, alignment: int = 32, version: int = 3,
    magic: bytes = b"GGUF", twice: str = "", **said: dict[str, Any],
) -> Path:  # fmt: skip
    """said: of some tensors another `shape` (row-major), `code` or `offset` than they have. twice: listed twice."""
    infos, data = b"", b""
    listed = [*tensors, *([twice] if twice else [])]
    for name in listed:
        t, told = tensors[name].contiguous(), said.get(name, {})
        shape = (*t.shape[:-1], t.shape[-1] // 17 * 32) if t.dtype == torch.uint8 else tuple(t.shape)
        shape = told.get("shape", shape)
        infos += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        infos += struct.pack("<IQ", told.get("code", CODES[t.dtype]), told.get("offset", len(data)))
        data += t.flatten().view(torch.uint8).numpy().tobytes()
        data += bytes(-len(data) % alignment)
    head = magic + struct.pack("<IQQ", version, len(listed), len(keys))
    head += b"".join(key(n, v) for n, v in keys.items()) + infos
    path.write_bytes(head + bytes(-len(head) % alignment) + data)
    return path
