"""Conversions as processes of their own, the moments to kill them at, and what may be left."""

import json
import shutil
from pathlib import Path

from processes import start

JOURNAL = "fmoe.journal"
Files = dict[str, bytes]


def lay(found: Files, path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    for name, data in found.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def command(source: Path, dst: Path, *more: object, threads: object = 1) -> list[object]:
    return [
        "convert",
        source,
        dst,
        "--max-shard-size",
        "100KB",
        *(more if "--threads=3" in more else ("--threads=1", *more)),
    ]


def again(source: Path, dst: Path, *more: object) -> tuple[int | None, int, str]:
    """(exit code, bytes resumed, what it said) of the same command."""
    ended = start(command(source, dst, "--json", *more), dst.parent / "notes").end()
    return ended.code, json.loads(ended.out).get("resumed", -1), ended.err
