"""sha256 of whole files, on a few threads; and whether files are still those that were written."""

from collections.abc import Callable, Mapping

from fmoe.checkpoint.files.disk import bytes_of, digest
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.stream.carry import in_order, pool
from fmoe.types import Problem

BLOCK = 2**20


def checksums(paths: Mapping[str, Where], threads: int | None, progress: Callable[[int, int], None]) -> dict[str, str]:
    """sha256 of every file, by the same keys. progress: called with the bytes that are done, and all."""
    sizes = [bytes_of(path) for path in paths.values()]
    found, done = {}, 0
    with pool(threads) as executor:
        for name, size, (_, digested) in zip(paths, sizes, in_order(executor, digest, paths.values()), strict=True):
            found[name] = digested
            done += size
            progress(done, sum(sizes))
    return found


def other_bytes(folder: Where, wanted: Mapping[str, str], threads: int | None = None) -> list[Problem]:
    """Which files of a folder have another digest than was written down, or are not there."""
    there = {file: folder / file for file in wanted if (folder / file).exists()}
    found = checksums(there, threads, lambda done, of: None)
    what = {file: f"sha256 {found[file][:16]}..." if file in found else "no such file" for file in wanted}
    return [
        Problem(f"{folder / file}: {what[file]}, expected {digest[:16]}..., as fmoe.json has it: other bytes", (file,))
        for file, digest in wanted.items()
        if found.get(file) != digest
    ]
