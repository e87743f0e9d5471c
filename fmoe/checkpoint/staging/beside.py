"""What lies beside a checkpoint: which files go where it goes, and what is told of those that do not."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.files.weights import JOURNAL, LEASE, WEIGHTS, former
from fmoe.checkpoint.remote.address import Where


def taken_along(
    source: Checkpoint, written: Iterable[str], *, other_family: bool = False
) -> tuple[dict[str, bytes | Where], list[str]]:
    """(the files that go along, notes that name those that do not). written: what is made, under its own names.

    other_family: what holds weights is then another model's, and stays behind.
    """
    others = {str(p): source.path / p for p in source.others()}
    stay = {n for n in others if n in set(written) or other_family and Path(n).suffix in WEIGHTS}
    along: dict[str, bytes | Where] = {n: path for n, path in others.items() if n not in stay}
    return along, not_along([*sorted(stay), *source.left()])


def not_along(names: list[str]) -> list[str]:
    """A note that names the files of a source that stay behind, if any do."""
    return _note("not taken along", names)


def of_the_former(dst: Path, replaced: Iterable[str], written: Iterable[str]) -> list[str]:
    """Notes that name which files of the model that was in dst go, and what stays there."""
    replaced, written = set(replaced), set(written)
    there = (
        [n for n in sorted(os.listdir(dst)) if not n.startswith((JOURNAL, LEASE)) and not n.endswith(".part")]
        if dst.is_dir()
        else []
    )
    folders = {n.split("/")[0] for n in (*written, *replaced) if "/" in n}
    stays = [n for n in there if n not in replaced | written | folders] if replaced else []
    return _note("of the former model, removed", sorted(replaced - written)) + _note("left as it was", stays)


def code_of(path: Path) -> set[str]:
    """The files of remote code that a config names."""
    try:
        found = json.loads((path / "config.json").read_bytes()).get("auto_map", {}).values()
        named = [text for value in found for text in ([value] if isinstance(value, str) else value)]
        return {text.rpartition("--")[2].split(".")[0] + ".py" for text in named if isinstance(text, str)}
    except (OSError, ValueError, AttributeError, TypeError):
        return set()


def replaceable(path: Path) -> set[str]:
    """Every file of the model in this directory."""
    return former(path, code_of(path))


def _note(what: str, names: list[str]) -> list[str]:
    return [f"{what}: {', '.join(map(repr, names))}"] if names else []
