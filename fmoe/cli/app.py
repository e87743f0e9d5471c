"""The command line: inspect, plan, convert, verify and demo, over the same functions that `import fmoe` gives."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fmoe import checkpoint
from fmoe.checkpoint.files.directory import JOURNAL
from fmoe.families import FAMILIES, VERIFIED
from fmoe.types import AdapterError, human

HELP = """Mixture-of-Experts checkpoints: look into them, convert them, prove that nothing is lost.

    fmoe inspect DIR                   family, layout, experts, problems
    fmoe convert DIR NATIVE            experts stacked, in bounded memory
    fmoe convert NATIVE BACK --to hf   byte for byte what DIR was
"""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)

SHARD = "the most that a file may hold, as 5GB or 200MB; back to hf, the files are as they were"
DIRECTORY = "a checkpoint directory, Hugging Face's or native: safetensors files and a config.json"
WRITTEN = "the directory to write: a new or an empty one"
Source = Annotated[Path, typer.Argument(metavar="DIR", help=DIRECTORY, readable=False)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output, and nothing else")]
Kept = Annotated[str | None, typer.Option("--quantized", help="keep: codes and scales move as they are; or decode")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bar")]


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
    made = checkpoint.plan_from(source, adapter.inverse if source.native else adapter, **_experts(experts))
    if as_json:
        targets = {
            n: {"shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch.")} for n, s in made.targets.items()
        }
        print(json.dumps({"sources": len(made.sources), "bytes": made.nbytes, "bijective": True, "targets": targets}))
    else:
        print(made)


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help=DIRECTORY, readable=False)],
    dst: Annotated[Path, typer.Argument(metavar="DST", help=WRITTEN, readable=False)],
    to: Annotated[str, typer.Option(help="native, hf, or another family's model type, as mixtral")] = "native",
    layout: Annotated[str | None, typer.Option(help="a HF layout to write, as fused or per_expert")] = None,
    experts: Annotated[str | None, typer.Option(help="only these experts, as 0:16")] = None,
    quantized: Kept = None,
    force: Annotated[bool, typer.Option("--force", help="replace the checkpoint that DST holds")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, write nothing")] = False,
    checksums: Annotated[bool, typer.Option("--checksums", help="sha256 of every file of both sides")] = False,
    max_shard_size: Annotated[str, typer.Option(help=SHARD)] = "5GB",
    fsync: Annotated[bool, typer.Option(help="wait until the disk has everything")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="as many as there are cores, at most 8")] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="to a family: do without what does not carry over")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write SRC in another layout to DST: in bounded memory, with config, tokenizer and index.

    A native directory converts back to the very files that it was made from. Interrupted or killed, the same command
    goes on where it stopped; until all is written no file in DST bears its own name. To another family, what does not
    carry over is told on standard error, and refused without --lossy.
    """
    how: dict[str, Any] = dict(force=force, dry_run=dry_run, checksums=checksums, fsync=fsync, threads=threads)
    if to not in ("native", "hf", *FAMILIES):
        raise typer.BadParameter(f"--to is {to!r}, expected native, hf or a model type, as `fmoe families` lists them")
    how |= {n: v for n, v in (("layout", layout), ("quantized", quantized)) if v}
    how |= _experts(experts) | {"max_shard_size": _size(max_shard_size), "lossy": lossy}
    with _bar("converting", quiet or as_json, dst) as progress:
        report = checkpoint.convert(src, dst, to, progress=progress, **how)
    for kind, texts in (("lost", report.lost), ("note", report.notes)):
        for text in texts:
            print(f"fmoe: {kind}: {text}", file=sys.stderr)
    what = f"{_count(report.tensors, 'tensor')} -> {report.made:,} in {_count(report.files, 'file')}"
    would = "would be written to" if dry_run else "in"
    went_on = f", {human(report.resumed)} of it by an earlier run" if report.resumed else ""
    _say(report, f"{what} {would} {dst} ({human(report.nbytes)}{went_on})", as_json)
    for path, digest in () if as_json else report.checksums.items():
        print(f"{digest}  {path}")


@app.command()
def verify(path: Source, quantized: Kept = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """Prove that every tensor comes back bit for bit from the other layout; nothing is written."""
    with _bar("verifying", quiet or as_json) as progress:
        report = checkpoint.verify(path, progress, **({"quantized": quantized} if quantized else {}))
    found = f"{report.family}, {_count(report.tensors, 'tensor')}, {human(report.nbytes)}"
    _say(report, f"{found}: everything comes back bit for bit", as_json)


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option(help="write the checkpoints here, and leave them", readable=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a small checkpoint, convert it, run its experts on every backend here, convert back, compare."""
    from fmoe.cli.demo import run

    found = run(keep, (lambda line: None) if as_json else print)
    if as_json:
        print(json.dumps(found))


@app.command()
def families(as_json: Json = False) -> None:
    """Every known model type: where its experts lie, what it reads quantised, what was verified against what."""
    facts = {
        name: {
            "layout": kind.layout,
            "quantised": kind.quantised,
            "verified": VERIFIED[kind.verified],
            "source": kind.source,
        }
        for name, kind in sorted(FAMILIES.items())
    }
    if as_json:
        print(json.dumps(facts))
        return
    for name, told in facts.items():
        print(f"{name:<24}{told['layout']}\n{'':<24}quantised: {told['quantised']}; verified: {told['verified']}")


def _show(found: dict[str, Any]) -> None:
    experts, config, size = found["experts"], found["moe_config"], human(found["bytes"])
    dtypes = ", ".join(f"{n} {human(nbytes)}" for n, nbytes in found["dtypes"].items())
    layout = "".join(f", {name}={label}" for name, label in found["layout"].items())
    rows = [("family", f"{found['model_type']} ({found['format']}{layout})")]
    rows += [("size", f"{_count(found['tensors'], 'tensor')} in {_count(found['files'], 'file')}, {size}: {dtypes}")]
    if experts:
        shapes = ", ".join(f"{n} {shape}" for n, shape in experts["shapes"].items())
        rows += [("experts", f"{_count(experts['layers'], 'layer')}, {human(experts['bytes'])}, natively {shapes}")]
    if config:
        facts = f"E {config['n_routed_experts']}, K {config['n_activated_experts']}, {config['expert_activation']}"
        rows += [("routing", f"{facts}, {config['score_func']}")]
    rows += [("rules", line) for line in found["rules"]]
    rows += [("note", text) for text in found["notes"]] + [("problem", text) for text in found["problems"]]
    for before, (label, text) in zip([("", ""), *rows], rows, strict=False):
        print(f"{label if label != before[0] else '':<9}{text}")


def _say(report: checkpoint.Report, text: str, as_json: bool) -> None:
    facts = {"path": report.path, "model_type": report.family, "tensors": report.tensors, "bytes": report.nbytes}
    facts |= {"made": report.made, "files": report.files, "read": report.read, "written": report.written}
    facts |= {"resumed": report.resumed, "checksums": dict(report.checksums)}
    facts |= {"lost": list(report.lost), "notes": list(report.notes)} if report.notes or report.lost else {}
    facts |= {"rules": str(report.adapter).split("\n")}
    print(json.dumps(facts) if as_json else text)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


@contextmanager
def _bar(title: str, quiet: bool, dst: Path | None = None) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with rate and remaining time on standard error, if that is a terminal.

    Interrupted inside (Ctrl-C), it says whether what is in dst can be gone on with.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
    task = bar.add_task(title, total=None)

    def progress(done: int, of: int) -> None:
        bar.update(task, completed=done, total=of)
        bar.start()

    try:
        yield progress
    except KeyboardInterrupt:
        bar.stop()
        kept = dst is not None and (dst / JOURNAL).exists()
        print(f"fmoe: interrupted{'; run the same command again to go on' * kept}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        bar.stop()


def _experts(text: str | None) -> dict[str, range]:
    if text is None:
        return {}
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise typer.BadParameter(f"--experts is {text!r}, expected START:STOP, as 0:16")
    return {"e": range(int(start), int(stop))}


def _size(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.strip().isdecimal() or not int(number):
        raise typer.BadParameter(f"--max-shard-size is {text!r}, expected a whole number and KB, MB, GB or TB")
    return int(number) * units[unit]


def main() -> None:
    """Exit codes: 0 done, 1 it cannot be done (said on standard error), 2 wrong usage, 130 interrupted."""
    try:
        app()
    except AdapterError as error:
        why = str(error)
    except OSError as error:
        name = error.filename2 or error.filename
        why = f"{name}: {error.strerror}" if name else str(error)
    print(f"fmoe: {why}", file=sys.stderr)
    raise SystemExit(1)
