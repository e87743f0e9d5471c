"""A conversion in shards of 100 kB, what it gives, and what stops it midway."""

from collections.abc import Callable
from pathlib import Path

from directories import files

import fmoe


def convert(source: Path, dst: Path, **how: object) -> fmoe.checkpoint.Report:
    return fmoe.convert(source, dst, max_shard_size="100KB", **how)


def expected(source: Path) -> dict[str, bytes]:
    dst = source.parent / "expected"
    convert(source, dst)
    return files(dst)


def after(size: int, act: Callable[[], object]) -> Callable[[int, int], None]:
    """Progress that acts once so many bytes are done."""
    done: list[int] = []

    def progress(now: int, of: int) -> None:
        if now >= size and not done:
            done.append(now)
            act()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt
