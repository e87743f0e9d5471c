"""A few files that belong together, beside whatever else their directory holds: all of them old, or all new."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from fmoe.checkpoint.files.disk import naming
from fmoe.checkpoint.files.weights import JOURNAL
from fmoe.checkpoint.staging.journal import ONCE, lines
from fmoe.checkpoint.staging.staging import staging
from fmoe.types import AdapterError


def written(
    path: Path, files: Mapping[str, Callable[[Path], object]], force: bool, former: Collection[str] = ()
) -> None:
    """Each file, by the function that writes it to a path. force: replace those that are there, and remove `former`.

    Raises AdapterError where one is there, and where other work in that directory is unfinished.
    """

    def claim() -> set[str]:
        begun = lines(path)[:1]
        if begun and not {*begun[0]["files"]} <= {*files}:
            raise AdapterError(
                f"{path} is unfinished: {JOURNAL} tells of other work that was interrupted; end that first"
            )
        there = [n for n in (*files, *former) if (path / n).exists() or (path / n).is_symlink()]
        if there and not (force or begun):
            raise AdapterError(f"{path / there[0]} is there already: pass force=True to replace it")
        return {*there}

    with staging(path, ONCE, claim, resumable=False) as stage:
        stage.begin({}, files)
        for name, write in files.items():
            with naming(stage.part(name)) as part:
                part.unlink(missing_ok=True)
                write(part)
        stage.publish()
