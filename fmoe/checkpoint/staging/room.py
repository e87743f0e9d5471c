"""What a directory must be before it is written to: not the source, not somebody's files, and large enough."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fmoe.checkpoint.files.directory import CONFIG, INDEX
from fmoe.checkpoint.files.weights import JOURNAL, LEASE, SUMS, checkpoints
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.staging.beside import replaceable, shards_below
from fmoe.checkpoint.staging.journal import ONCE, lines
from fmoe.codecs.config import QUANTS
from fmoe.layout.claims import some
from fmoe.types import AdapterError, human

OF_WEIGHTS = (*QUANTS, SUMS)
"""Files that tell of the weights beside them: ModelOpt's of codes, digests."""
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_of(text: int | str, what: str = "max_shard_size") -> int:
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
        raise AdapterError(f"{what} is {text!r}, expected bytes, or a number and KB, MB, GB or TB, as '5GB'")
    return size


def replaced(dst: Path, source: Where | None, force: bool, *, work: str = ONCE, bystanders: bool = False) -> set[str]:
    """The files in dst that a new checkpoint replaces. Raises AdapterError where dst may not be written to.

    work: what is about to be done, which may go on where it was interrupted. bystanders: files that are no weights,
    such as a config and a tokenizer, may be there and stay, but no adapter, which Transformers would put onto the new
    ones, and not what tells of the weights that were there; without, nothing of the model that was there does.
    """
    if isinstance(source, Path):
        _apart(dst, source)
    if (dst.exists() or dst.is_symlink()) and not dst.is_dir():
        raise AdapterError(f"{dst} is {'a file' if dst.exists() else 'a link to nowhere'}: name a directory")
    home = _home(dst)
    if not home.is_dir():
        raise AdapterError(f"{dst}: Not a directory: {home} is a file: name a directory")
    if not os.access(home, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dst))
    there = sorted(p.name for p in dst.iterdir() if not p.name.startswith((JOURNAL, LEASE))) if home == dst else []
    for name in there:
        if (checkpoints([name]) or name in (CONFIG, *OF_WEIGHTS)) and _folder(dst / name):
            raise AdapterError(f"{dst / name} is a folder, expected no more than a file of that name: move it away")
    held = checkpoints(there) | (shards_below(dst) if INDEX in there else set())
    old = held | {*OF_WEIGHTS} & set(there) if bystanders else held and replaceable(dst)
    if begun := lines(dst) if home == dst else []:
        if begun[0]["work"] not in (work, ONCE) and not force:
            why = "another source, layout or option, or the source has changed"
            raise AdapterError(f"{dst} holds the beginnings of other work ({why}): force=True (--force) to start anew")
        if (new := sorted(held.difference(begun[0]["files"], begun[0]["replaces"]))) and not force:
            raise AdapterError(
                f"{dst} has got {some(new)} since it was begun: move that, or force=True (--force) to replace it"
            )
        given = {*begun[0]["files"], *begun[0]["replaces"]} if any("publishing" in line for line in begun) else set()
        return old | {n for n in given if os.path.lexists(dst / n)}  # which may have got their names
    if bystanders and not held:
        return old
    if there and not force:
        what = f", but holds {some(sorted(held))}" if bystanders else ""
        raise AdapterError(f"{dst} is not empty{what}: name another directory, or force=True (--force) to replace it")
    if there and not held and not all(n.endswith(".part") for n in there):
        raise AdapterError(f"{dst} holds no checkpoint, but {some(there)}: refusing to replace that")
    return old


def _folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _apart(dst: Path, source: Path) -> None:
    """Raises AdapterError where one of them is the other, or lies inside it, by whatever name."""
    here, there = (list(_ids(p)) for p in (dst, source))
    if there[0] in here:
        raise AdapterError(f"{dst} is the source itself, or lies inside it: name another directory")
    if dst.exists() and here[0] in there:
        raise AdapterError(f"{dst} has the source {source} inside it: name another directory")


def _ids(path: Path) -> Iterator[tuple[int, int] | str]:
    """What the file system calls a path and everything above it."""
    real = path.resolve()
    for folder in (real, *real.parents):
        yield (found.st_dev, found.st_ino) if folder.exists() and (found := folder.stat()) else str(folder)


def check_space(dst: Path, needed: int) -> None:
    """Raises AdapterError where the disk has no room for that many bytes, less what parts of it hold already."""
    held = sum(p.lstat().st_blocks * 512 for p in dst.rglob("*.part")) if dst.exists() else 0
    home = _home(dst)
    free = shutil.disk_usage(home).free
    if needed - held > free:
        raise AdapterError(f"{dst} needs {human(needed - held)}, and {home} has {human(free)} free: make room")


def _home(dst: Path) -> Path:
    """dst, or what it will be made in."""
    return next(p for p in (dst, *dst.absolute().parents) if p.exists())
