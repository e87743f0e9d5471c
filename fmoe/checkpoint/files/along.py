"""Files of a directory that are none of its checkpoint's, and go where that goes."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fmoe.checkpoint.files.disk import Stamp, inside, linked, regular
from fmoe.checkpoint.remote.address import Address, Where
from fmoe.types import AdapterError


def others(root: Path, wanted: Callable[[Path], bool]) -> Iterator[Path]:
    """Every file below root that is wanted and not hidden, relative to it, in order; links to files as `inside` has it.

    Raises AdapterError for what cannot be copied as a file: a link that leads out, a link to a folder, a pipe.
    """

    def refuse(error: OSError) -> None:
        raise AdapterError(f"{error.filename} cannot be read: {error.strerror}")

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        links = [n for n in folders if os.path.islink(os.path.join(folder, n))]
        paths = [Path(folder, n).relative_to(root) for n in (*links, *names)]
        found += [path for path in paths if not path.parts[0].startswith(".") and wanted(path)]
        if Path(folder) == root:
            folders[:] = [n for n in folders if not n.startswith(".")]
    for path in sorted(found):
        _copied(root, path)
        yield path


def _copied(root: Path, path: Path) -> None:
    if not str(path).isprintable():
        raise AdapterError(f"{root} has a file named {str(path)!r}: rename it")
    try:
        if (root / path).is_symlink():
            inside(root / path, root)
        regular(root / path, os.stat(root / path).st_mode)
    except OSError as error:
        raise AdapterError(f"{root / path} cannot be read: {error.strerror}") from None


def copied(path: Where, to: Path) -> None:
    """to = a file of this machine or another; of this one, who may run it still may, as far as the umask lets them.

    Raises AdapterError where it changes meanwhile: what was read is neither what it was nor what it has become.
    """
    if isinstance(path, Address):
        with open(to, "wb") as out:
            for block in path.blocks():
                out.write(block)
        return
    with linked(path) as file:
        was = Stamp.of(file)
        shutil.copyfile(path, to)
        with linked(path, was):  # still the same
            pass
        mode = to.stat().st_mode & 0o777
        to.chmod(mode | os.fstat(file).st_mode & (mode & 0o444) >> 2)


def is_empty(path: Path) -> bool:
    """Whether it is a folder without anything in it."""
    try:
        return not path.is_symlink() and path.is_dir() and not os.listdir(path)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from None
