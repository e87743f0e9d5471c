"""A rank's own journal, beside the first one's: which jobs it has done. Any number of ranks may go on from them."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fmoe.checkpoint.files.disk import naming
from fmoe.checkpoint.files.weights import JOURNAL
from fmoe.checkpoint.staging.heard import line_of
from fmoe.checkpoint.staging.journal import boot, note
from fmoe.codecs.survival import Survival


class Share:
    """Written by one rank while it works."""

    def __init__(self, path: Path, rank: int, work: str):
        self._place = path / f"{JOURNAL}.{rank}"
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._journal = os.open(self._place, flags, 0o644)
        with naming(self._place):
            os.write(self._journal, b"\n")  # what an interruption cut short ends here
        self._note(work=work, boot=boot())

    def mark(self, item: int, heard: Iterable[Survival] = (), sum_: int | None = None) -> None:
        self._note(item=item, **line_of(heard, sum_))

    def synced(self, items: Iterable[int]) -> None:
        """The disk has what these have written."""
        self._note(synced=list(items))
        with naming(self._place):
            os.fsync(self._journal)

    def lost(self) -> None:
        """The disk has failed to take something: what was not synced counts no longer."""
        self._note(work="", boot="")

    def close(self) -> None:
        os.close(self._journal)

    def _note(self, **line: Any) -> None:
        with naming(self._place):
            note(self._journal, **line)


def shared(path: Path, work: str) -> dict[int, dict[str, Any]]:
    """The jobs of this work that count as done, and what is told of each.

    Of this boot of the machine all, else those known to be on the disk.
    """
    return {item: line for place in _places(path) for item, line in _done(place, work).items()}


def forget(path: Path) -> None:
    for place in _places(path):
        place.unlink(missing_ok=True)


def _places(path: Path) -> list[Path]:
    return [p for p in sorted(path.glob(f"{JOURNAL}.*")) if p.is_file() or p.is_symlink()]


def _done(place: Path, work: str) -> dict[int, dict[str, Any]]:
    done, synced, last, ours = set[int](), set[int](), "", False
    lines: dict[int, dict[str, Any]] = {}
    if place.is_symlink():
        return {}
    for line in place.read_text(encoding="utf-8", errors="replace").split("\n"):
        said = None
        with suppress(ValueError):
            said = json.loads(line)
        if not isinstance(said, dict):
            continue
        if "work" in said:
            kept = ours and bool(said["boot"]) and said["boot"] == last
            ours = ours and said["work"] == "" or said["work"] == work
            synced = synced if ours else set()
            done, last = done if kept else set(synced), said["boot"]
        elif ours:
            synced |= set(said.get("synced", ()))
            done |= {said["item"]} if "item" in said else set(said.get("synced", ()))
            lines |= {said["item"]: said} if "item" in said else {}
    counts = done if ours and last and last == boot() else synced if ours else set()
    return {item: lines.get(item, {}) for item in counts}
