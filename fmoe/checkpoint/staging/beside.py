"""What lies beside a checkpoint: which files go where it goes, and what is told of those that do not."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from fmoe.checkpoint.files.directory import INDEX, Checkpoint
from fmoe.checkpoint.files.disk import content
from fmoe.checkpoint.files.origin import weight_map
from fmoe.checkpoint.files.strict import MOST, read
from fmoe.checkpoint.files.weights import ADAPTER, JOURNAL, LEASE, WEIGHTS, former
from fmoe.checkpoint.remote.address import Address, Where
from fmoe.types import AdapterError


def taken_along(
    source: Checkpoint, written: Iterable[str], *, other_family: bool = False
) -> tuple[dict[str, bytes | Where], list[str]]:
    """(the files that go along, notes on an adapter among them and on those that do not). written: what is made, under
    its own names.

    other_family: what holds weights is then another model's, and stays behind.
    """
    others = {str(p): source.path / p for p in source.others()}
    another = lambda n: Path(n).suffix in WEIGHTS or n == ADAPTER
    stay = {n for n in others if n in set(written) or other_family and another(n)}
    along: dict[str, bytes | Where] = {n: path for n, path in others.items() if n not in stay}
    return along, [*an_adapter(along), *not_along([*sorted(stay), *source.left()])]


def an_adapter(names: Iterable[str]) -> list[str]:
    """A note on the LoRA adapter among the files of a whole model, for which Transformers leaves the model alone.

    >>> len(an_adapter(["adapter_config.json", "model.safetensors"])), an_adapter(["adapter_model.bin"])
    (1, [])
    """
    found = sorted(n for n in names if n == ADAPTER or n.startswith("adapter_model."))
    told = "Transformers loads the model that it names, and the adapter onto it. Fix: take it away, or fmoe.lora.merge"
    return [f"{text}: {told}" for text in _note("beside the model and not of it", found if ADAPTER in found else [])]


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
    return removed(replaced, written) + _note("left as it was", stays)


def removed(replaced: Iterable[str], written: Iterable[str]) -> list[str]:
    """A note that names which files of the model that was there go."""
    return _note("of the former model, removed", sorted({*replaced} - {*written}))


_IMPORTED = re.compile(r"^\s*(?:import|from)\s+\.(\w+(?:\.\w+)*)\s*(?:$|import)", re.MULTILINE)


def code_of(path: Path) -> set[str]:
    """The files of remote code that a config names, and those of the directory that these or the usual ones import."""
    try:
        found = read(path / "config.json", infinite=True)[0].get("auto_map", {}).values()
        named = [text for value in found for text in ([value] if isinstance(value, str) else value)]
        code = {text.rpartition("--")[2].split(".")[0] + ".py" for text in named if isinstance(text, str)}
        code = {name for name in code if "/" not in name}
    except (AdapterError, AttributeError, TypeError):
        code = set()
    left = [*code, *(n for n in former(path) if n.endswith(".py") and "/" not in n)]
    while left:
        name = left.pop()
        with suppress(AdapterError):
            text = content(path / name, most=MOST).decode(errors="replace")
            new = {PurePosixPath(name).parent / f"{n.replace('.', '/')}.py" for n in _IMPORTED.findall(text)}
            found = {str(n) for n in new if (path / n).is_file() and _ours(path, str(n))} - code
            left += found
            code |= found
    return code


def _ours(path: Path, name: str) -> bool:
    """Whether a file of this name lies in the directory, and not in another by a link."""
    above = [path / folder for folder in Path(name).parents if folder.name]
    return os.path.lexists(path / name) and not any(folder.is_symlink() for folder in above)


def shards_below(path: Where) -> set[str]:
    """Files in folders of this directory that its index says hold the tensors; at an address, if they are there."""
    try:
        named = {*weight_map(path / INDEX, read(path / INDEX)[0]).values()}
    except AdapterError:
        return set()
    return {n for n in named if "/" in n and (isinstance(path, Address) or _ours(path, n))}


def replaceable(path: Path) -> set[str]:
    """Every file of the model in this directory."""
    return former(path, code_of(path)) | shards_below(path)


def _note(what: str, names: list[str]) -> list[str]:
    return [f"{what}: {', '.join(map(repr, names))}"] if names else []
