"""What a directory must be before it is written to: not the source, not somebody's files, and large enough."""

import errno
import os
import shutil
from pathlib import Path

from fmoe.checkpoint.files.directory import INDEX, JOURNAL, NATIVE
from fmoe.checkpoint.staging.journal import ONCE, lines
from fmoe.layout.claims import some
from fmoe.types import AdapterError, human

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_of(text: int | str) -> int:
    """Bytes of "5GB", "200MB" or a plain number. Raises AdapterError for anything else.

    >>> size_of("5GB"), size_of("1.5 MB"), size_of(300)
    (5000000000, 1500000, 300)
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    number = str(text).strip().upper()
    unit = next((u for u in ("KB", "MB", "GB", "TB", "B") if number.endswith(u)), "")
    try:
        size = int(float(number.removesuffix(unit)) * _UNITS[unit or "B"])
    except (ValueError, OverflowError):
        size = 0
    if size < 1 or isinstance(text, bool):
        raise AdapterError(f"max_shard_size is {text!r}, expected bytes, or a number and KB, MB, GB or TB, as '5GB'")
    return size


def replaced(dst: Path, source: Path | None, force: bool, *, work: str = ONCE, bystanders: bool = False) -> set[str]:
    """The files in dst that a new checkpoint replaces. Raises AdapterError where dst may not be written to.

    work: what is about to be done, which may go on where it was interrupted. bystanders: files that are no weights,
    such as a config, may be there.
    """
    if source is not None and source.resolve() in (dst.resolve(), *dst.resolve().parents):
        raise AdapterError(f"{dst} is the source itself, or lies inside it: name another directory")
    if (dst.exists() or dst.is_symlink()) and not dst.is_dir():
        raise AdapterError(f"{dst} is {'a file' if dst.exists() else 'a link to nowhere'}: name a directory")
    home = _home(dst)
    if not home.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(dst))
    if not os.access(home, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dst))
    there = sorted(p.name for p in dst.iterdir() if p.name != JOURNAL) if home == dst else []
    old = {n for n in there if n.endswith(".safetensors") or n in (INDEX, NATIVE)}
    if begun := lines(dst)[:1] if home == dst else []:
        if begun[0]["work"] not in (work, ONCE) and not force:
            why = "another source, layout or option, or the source has changed"
            raise AdapterError(f"{dst} holds the beginnings of other work ({why}): --force to start anew")
        if (new := sorted(old.difference(begun[0]["files"], begun[0]["replaces"]))) and not force:
            raise AdapterError(f"{dst} has got {some(new)} since it was begun: move that, or --force to replace it")
        return old
    if bystanders and not old:
        return set()
    if there and not force:
        raise AdapterError(f"{dst} is not empty: name another directory, or --force to replace the checkpoint in it")
    if there and not old and not all(n.endswith(".part") for n in there):
        raise AdapterError(f"{dst} holds no checkpoint, but {some(there)}: refusing to replace that")
    return old


def check_space(dst: Path, needed: int) -> None:
    """Raises AdapterError where the disk has no room for that many bytes, less what parts of it hold already."""
    held = sum(p.stat().st_blocks * 512 for p in dst.glob("*.part")) if dst.exists() else 0
    home = _home(dst)
    free = shutil.disk_usage(home).free
    if needed - held > free:
        raise AdapterError(f"{dst} needs {human(needed - held)}, and {home} has {human(free)} free: make room")


def _home(dst: Path) -> Path:
    """dst, or what it will be made in."""
    return next(p for p in (dst, *dst.absolute().parents) if p.exists())
