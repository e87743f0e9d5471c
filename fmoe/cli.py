"""The command line: inspect, plan, convert, verify and demo, over the same functions that `import fmoe` gives."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from fmoe import checkpoint
from fmoe.types import AdapterError, human

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Source = Annotated[Path, typer.Argument(help="a checkpoint directory: safetensors files and a config.json")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output, and nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bar")]


class To(str, Enum):
    """The two formats of a directory."""

    native = "native"
    hf = "hf"


@app.command("inspect")
def inspect_(path: Source, as_json: Json = False) -> None:
    """Family, layout, experts, dtypes, sizes and problems; no tensor is read. Exit code 1 if there are problems."""
    found = checkpoint.inspect(path)
    if as_json:
        print(json.dumps(found))
    else:
        _show(found)
    raise typer.Exit(1 if found["problems"] else 0)


@app.command()
def plan(
    path: Source,
    experts: Annotated[str | None, typer.Option(help="only these experts, as 0:16")] = None,
    as_json: Json = False,
) -> None:
    """What a conversion would copy where, proved bijective; no tensor is read."""
    source = checkpoint.open_checkpoint(path)
    adapter = checkpoint.adapter_of(source)
    made = (adapter.inverse if source.native else adapter).plan(source.specs, **_experts(experts))
    if as_json:
        targets = {
            n: {"shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch.")} for n, s in made.targets.items()
        }
        print(json.dumps({"sources": len(made.sources), "bytes": made.nbytes, "bijective": True, "targets": targets}))
    else:
        print(made)


@app.command()
def convert(
    src: Source,
    dst: Annotated[Path, typer.Argument(help="the directory to write; it must not exist, or be empty")],
    to: Annotated[To, typer.Option(help="the layout to write")] = To.native,
    force: Annotated[bool, typer.Option("--force", help="replace the checkpoint that DST holds")] = False,
    max_shard_size: Annotated[str, typer.Option(help="the size of a file, as 5GB or 200MB")] = "5GB",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write SRC in another layout to DST: one native tensor at a time, with config, tokenizer and index.

    A native directory converts back to the very files that it was made from.
    """
    size = _size(max_shard_size)
    with _bar(f"{src} -> {dst}", src, quiet or as_json) as progress:
        report = checkpoint.convert(src, dst, to.value, max_shard_size=size, force=force, progress=progress)
    _say(report, f"{report.tensors:,} tensors -> {report.made:,} in {dst} ({human(report.nbytes)})", as_json)


@app.command()
def verify(path: Source, quiet: Quiet = False, as_json: Json = False) -> None:
    """Prove that every tensor comes back bit for bit from the other layout; nothing is written."""
    with _bar(f"verify {path}", path, quiet or as_json) as progress:
        report = checkpoint.verify(path, progress)
    _say(report, f"{report.tensors:,} tensors ({human(report.nbytes)}) come back bit for bit: {report.family}", as_json)


@app.command()
def demo(
    keep: Annotated[Path | None, typer.Option(help="write the checkpoints here, and leave them")] = None,
    as_json: Json = False,
) -> None:
    """Write a small checkpoint, convert it, run its experts on every backend here, convert back, compare."""
    from fmoe.demo import run

    found = run(keep, (lambda line: None) if as_json else print)
    if as_json:
        print(json.dumps(found))


def _show(found: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    experts, config = found["experts"], found.get("moe_config")
    table.add_row("family", f"{found['model_type']} ({found['format']})")
    table.add_row("size", f"{found['tensors']:,} tensors in {found['files']:,} files, {human(found['bytes'])}")
    table.add_row("dtypes", ", ".join(f"{n} {human(size)}" for n, size in found["dtypes"].items()))
    if experts:
        shapes = ", ".join(f"{n} {shape}" for n, shape in experts["shapes"].items())
        table.add_row("experts", f"{experts['layers']} layers, {human(experts['bytes'])}: {shapes}")
    if config:
        facts = f"E {config['n_routed_experts']}, K {config['n_activated_experts']}, {config['expert_activation']}"
        table.add_row("routing", f"{facts}, {config['score_func']}")
    for i, line in enumerate(found["rules"]):
        table.add_row("" if i else "rules", line)
    console = Console(width=None if Console().is_terminal else 10_000, highlight=False, markup=False)
    console.print(table)
    for problem in found["problems"]:
        console.print(f"problem: {problem}")


def _say(report: checkpoint.Report, text: str, as_json: bool) -> None:
    facts = report._asdict() | {"adapter": str(report.adapter)}
    print(json.dumps(facts) if as_json else text)


@contextmanager
def _bar(title: str, path: Path, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, with rate and remaining time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(title, total=checkpoint.open_checkpoint(path).nbytes)
        yield lambda nbytes: progress.advance(task, nbytes)


def _experts(text: str | None) -> dict[str, range]:
    if text is None:
        return {}
    start, colon, stop = text.partition(":")
    if not (colon and start.isdigit() and stop.isdigit()):
        raise typer.BadParameter(f"--experts is {text!r}, expected START:STOP, as 0:16")
    return {"e": range(int(start), int(stop))}


def _size(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.strip().isdigit():
        raise typer.BadParameter(f"--max-shard-size is {text!r}, expected a number and KB, MB or GB")
    return int(number) * units[unit]


def main() -> None:
    """Exit codes: 0 done, 1 it cannot be done (said on standard error), 2 wrong usage."""
    try:
        app()
    except (AdapterError, OSError) as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"fmoe: {error}")
        raise SystemExit(1) from None
