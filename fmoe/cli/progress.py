"""What a terminal shows meanwhile: a spinner from the first 0.3 s of silence on, then a bar with rate and time left."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SILENCE = 0.3  # seconds


@contextmanager
def waiting(title: str, quiet: bool = False) -> Iterator[None]:
    """A spinner on standard error, if that is a terminal and it takes longer than SILENCE."""
    with _shown((SpinnerColumn(), TextColumn("{task.description}")), title, quiet):
        yield


@contextmanager
def bar(title: str, quiet: bool, dst: Path | None = None) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal; it begins as a spinner.

    Interrupted inside (Ctrl-C), it says whether what is in dst can be gone on with.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with _shown(columns, title, quiet, dst) as shown:

        def progress(done: int, of: int) -> None:
            shown.update(shown.task_ids[0], completed=done, total=of)
            shown.start()

        yield progress


@contextmanager
def _shown(columns: tuple[ProgressColumn, ...], title: str, quiet: bool, dst: Path | None = None) -> Iterator[Progress]:
    console = Console(stderr=True)
    shown = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
    shown.add_task(title, total=None)
    timer = Timer(SILENCE, shown.start)
    timer.daemon = True
    timer.start()
    try:
        yield shown
    except KeyboardInterrupt:
        shown.stop()
        kept = dst is not None and (dst / "fmoe.journal").exists()  # (no import: it may be what was interrupted)
        print(f"fmoe: interrupted{'; run the same command again to go on' * kept}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        timer.cancel()
        shown.stop()
