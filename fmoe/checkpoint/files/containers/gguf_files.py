"""A model in GGUF files, one or several (`x-00001-of-00003.gguf`), as a directory's or by the name of a file."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from fmoe.checkpoint.files.containers.gguf import DTYPES, MAGIC, File, read_file
from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem

SUFFIX = ".gguf"
_SPLIT = re.compile(r"(.*-)(\d{5})(-of-(\d{5})\.gguf)")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its first bytes or its name, or a directory of such and of no safetensors."""
    try:
        if path.is_dir():
            names = os.listdir(path)
            return any(n.endswith(SUFFIX) for n in names) and not any(n.endswith(".safetensors") for n in names)
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(4) == MAGIC or path.suffix == SUFFIX
    except OSError:  # whoever opens it says why
        return path.suffix == SUFFIX


def read_files(path: Path) -> list[File]:
    """The one GGUF model of a file or a directory, which may be split over several files, in their order.

    Raises AdapterError where a directory holds several models, or a part of a split one is not there.
    """
    names = sorted(p.name for p in path.iterdir() if p.name.endswith(SUFFIX)) if path.is_dir() else [path.name]
    home, first = (path, names[0]) if path.is_dir() else (path.parent, path.name)
    if split := _SPLIT.fullmatch(first):
        stem, _, end, count = split.groups()
        wanted = [f"{stem}{i + 1:05d}{end}" for i in range(int(count))]
        if missing := next((n for n in wanted if not (home / n).is_file()), None):
            raise AdapterError(f"{home / missing} is not there, and {first} is: download it")
    else:
        wanted = [first]
    if path.is_dir() and (more := [n for n in names if n not in wanted]):
        raise AdapterError(f"{path} holds several GGUF models: {first!r} and {some(more)}. Fix: name the file")
    files = [read_file(home / n) for n in wanted]
    for file in files:
        told = file.keys["split.count"].value if "split.count" in file.keys else 1
        if told not in (len(files), 0 if len(files) == 1 else len(files)):
            raise AdapterError(f"{file.path} is one of {told} files, by its split.count: expected {len(files)}")
    if twice := _twice(n for file in files for n in file.tensors):
        raise AdapterError([Problem(f"{home}: {some(twice)}: in several of its files", tuple(twice))])
    return files


def _twice(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [n for n in names if n in seen or seen.add(n)]  # type: ignore[func-returns-value]


def unread(files: Iterable[File]) -> None:
    """Raises AdapterError naming the tensors whose types fmoe does not decode."""
    for file in files:
        odd = {n: i.type.name for n, i in file.tensors.items() if i.type.name not in (*DTYPES, "MXFP4")}
        if odd:
            kinds = ", ".join(sorted(set(odd.values())))
            text = (
                f"{file.path}: {some(list(odd))}: {kinds}, which fmoe does not decode; it reads F32, F16, BF16, MXFP4"
            )
            raise AdapterError([Problem(f"{text}. Fix: a file of one of these types", tuple(odd))])
