"""Which container a path is, and what lies in it: opened as a checkpoint that the engine reads as any."""

from os.path import isfile
from pathlib import Path
from typing import Any

from fmoe.checkpoint.files.containers import mp_rank
from fmoe.checkpoint.files.containers.foreign import Foreign
from fmoe.checkpoint.files.containers.gguf_files import is_gguf, read_files, unread
from fmoe.checkpoint.files.containers.orbax import open_orbax
from fmoe.checkpoint.files.containers.orbax_tree import home_of
from fmoe.checkpoint.files.containers.torch_dcp import open_dcp
from fmoe.checkpoint.files.weights import JOURNAL, METADATA
from fmoe.types import AdapterError


def container_of(path: Path) -> str | None:
    """Which container other than safetensors a directory or a file is: "dcp", "orbax", "mp_rank", "gguf", or None."""
    if isfile(path / METADATA):
        return "dcp"
    if home_of(path) is not None:
        return "orbax"
    if mp_rank.home_of(path) is not None:
        return "mp_rank"
    return "gguf" if is_gguf(path) else None


def open_foreign(path: Path, config: dict[str, Any]) -> Foreign:
    """The tensors of another system's directory, or of GGUF files, with the config that it has not."""
    if (path / JOURNAL).exists():
        raise AdapterError(f"{path} is unfinished: {JOURNAL} tells of a conversion that was interrupted; run it again")
    return OPENED[container_of(path) or "dcp"](path, config)


def _open_dcp(path: Path, config: dict[str, Any]) -> Foreign:
    found = open_dcp(path)
    return Foreign(
        path, config, found.specs, found.files, found.offsets, found.stamps, cut=found.pieces, left_out=found.left_out
    )


def _open_gguf(path: Path, config: dict[str, Any]) -> Foreign:
    files = read_files(path)
    unread(files)
    if not any(file.tensors for file in files):
        raise AdapterError(f"{path} holds no tensors, but a vocabulary alone")
    specs = {n: info.spec for file in files for n, info in file.tensors.items()}
    held = {n: file.path.name for file in files for n in file.tensors}
    offsets = {n: info.at for file in files for n, info in file.tensors.items()}
    stamps = {file.path.name: file.stamp for file in files}
    given = None if path.is_dir() else path
    return Foreign(
        files[0].path.parent, config, specs, held, offsets, stamps, container="gguf", given=given,
    )  # fmt: skip


OPENED = {"dcp": _open_dcp, "gguf": _open_gguf, "orbax": open_orbax, "mp_rank": mp_rank.open_mp_rank}
