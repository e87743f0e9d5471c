"""A disk that fails at one call, or from one on: whatever changes it is a call of `os`, or of a file that is open.

with failing(folder, 7, errno.EIO) as calls: ...    # the 7th change of a file below folder; calls: all, by name
"""

import builtins
import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

PATHS = ("unlink", "replace", "rename", "link", "mkdir", "rmdir", "truncate")
DESCRIPTORS = ("write", "pwrite", "fsync", "ftruncate", "copy_file_range", "sendfile")


@contextmanager
def failing(
    folder: Path, at: int | None, code: int = 0, *, on: bool = False, before: Callable[[str], None] = lambda call: None
) -> Iterator[list[str]]:
    """at: the number of the call that gives this errno. on: and so does every later one, but those that need no room
    on a disk that is full. What is not there when it is to be removed has gone by then. before: what is done before
    every call, which makes none of its own.
    """
    calls: list[str] = []
    inside, opened, opened_os = f"{folder}/", io.open, os.open

    full, removed = code in (errno.ENOSPC, errno.EDQUOT), os.unlink

    def change(name: str, path: str, said: bool) -> None:
        if f"{path}/".startswith(inside):
            calls.append(f"{name} {path.removeprefix(inside)}")
            before(calls[-1])
            later = on and len(calls) > (at or 0) and not (full and name in ("unlink", "rmdir"))
            if at is not None and (len(calls) - 1 == at or later):
                if (name, code) == ("unlink", errno.ENOENT):
                    removed(path)
                raise OSError(code, os.strerror(code), *([path] if said else []))

    def by_path(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda path, *args, **how: (change(name, str(path), True), real(path, *args, **how))[1]

    def by_descriptor(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if name == "copy_file_range" else 0
        return lambda *args, **how: (
            change(name, os.readlink(f"/proc/self/fd/{args[first]}"), False),
            real(*args, **how),
        )[1]

    class File:
        """An open file; what it does with the disk by itself is seen too."""

        def __init__(self, file: Any, path: str):
            self._file, self._path = file, path

        def __getattr__(self, name: str) -> Any:
            found = getattr(self._file, name)
            if name not in ("write", "truncate"):
                return found
            return lambda *args: (change(name, self._path, False), found(*args))[1]

        def __enter__(self) -> "File":
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

    def open_file(path: Any, mode: str = "r", *args: Any, **how: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return opened(path, mode, *args, **how)
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        if not isinstance(path, int):
            change("open", name, True)
        return File(opened(path, mode, *args, **how), name)

    def open_os(path: Any, flags: int, *args: Any, **how: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            change("open", str(path), True)
        return opened_os(path, flags, *args, **how)

    made = {name: by_path(name, getattr(os, name)) for name in PATHS}
    made |= {name: by_descriptor(name, getattr(os, name)) for name in DESCRIPTORS}
    with mock.patch.multiple(os, open=open_os, **made):
        with mock.patch.object(io, "open", open_file), mock.patch.object(builtins, "open", open_file):
            yield calls


def chosen(calls: list[str]) -> list[int]:
    """The first and the last call of each kind on each kind of file."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for i, call in enumerate(calls):
        name, _, path = call.partition(" ")
        kinds.setdefault((name, re.sub(r"\d+", "", path)), []).append(i)
    return sorted({i for found in kinds.values() for i in (found[0], found[-1])})
