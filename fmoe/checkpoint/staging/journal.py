"""What unfinished work in a directory has come to: lines of JSON in a file beside it.

The first says what the work is, the others how far it is. It holds after a power failure too: of what an earlier boot
of the machine did, and of what the disk failed to take, only what was known to have reached it counts.
"""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fmoe.checkpoint.files.weights import JOURNAL
from fmoe.types import AdapterError

ONCE = "once"  # work that begins anew when it is interrupted
_HEAD = {"work", "boot", "files", "replaces", "fresh"}
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Told(NamedTuple):
    """done: how many jobs count as done; None before the first. stale: once the files are being published, those that
    they replace.
    """

    done: int | None
    stale: list[str] | None


def lines(path: Path) -> list[dict[str, Any]]:
    """Of the journal in this directory, from its last beginning on; without what an interruption cut short.

    Raises AdapterError where it is no file, as a link that leads elsewhere.
    """
    try:
        descriptor = opened(path, os.O_RDONLY)
    except FileNotFoundError:
        return []
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        text = file.read()
    found: list[dict[str, Any]] = []
    for line in text.split("\n"):
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):  # no line of ours is nested
            continue
        if isinstance(said, dict) and said.keys() >= _HEAD:
            found = [said]
        elif isinstance(said, dict) and found:
            found.append(said)
    return found


def opened(path: Path, flags: int) -> int:
    """A descriptor of the journal in this directory. Raises AdapterError where that name is no file; OSError."""
    journal = path / JOURNAL
    with suppress(FileNotFoundError):
        found = os.lstat(journal)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # under another name it may be anybody's
            raise AdapterError(f"{journal} is a link, or no file: fmoe writes to nothing but a file there: remove it")
    return os.open(journal, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def told(found: list[dict[str, Any]]) -> Told:
    """How far the work of these lines is."""
    done = synced = stale = last = None
    safe = False
    for line in found:
        if "boot" in line:
            done, last = done if _same(line["boot"], last) else synced, line["boot"]
        done, synced = line.get("done", done), line.get("synced", synced)
        stale, safe = line.get("publishing", stale), line.get("safe", safe)
    here = _same(boot(), last)
    return Told(done if here else synced, stale if here or safe else None)


def _same(boot: str, other: str | None) -> bool:
    return bool(boot) and boot == other


def boot() -> str:
    """Which start of the machine this is; empty where that cannot be told, and then it is never the same one."""
    return _BOOT.read_text().strip() if _BOOT.exists() else ""


def note(journal: int, **line: Any) -> None:
    """One line more, in one call, so that two threads do not mix theirs. Raises OSError where it was cut short."""
    text = (json.dumps(line) + "\n").encode()
    if os.write(journal, text) < len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def forgotten(said: Callable[[], None], parts: Iterable[Path]) -> None:
    """What was done does not count: the journal says so, or, where it cannot, as on a full disk, the parts are gone."""
    try:
        said()
    except OSError:
        for part in parts:
            with suppress(OSError):
                part.unlink()
