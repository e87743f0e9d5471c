"""Commands that write, or prove what writing would give: convert, verify, demo."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmoe.cli import ranks
from fmoe.cli.app import (
    DIRECTORY,
    Experts,
    From,
    Given,
    Json,
    Kept,
    Own,
    Quiet,
    Source,
    Trust,
    app,
    count,
    of_source,
    own,
    ranges,
    size,
)
from fmoe.cli.progress import bar

if TYPE_CHECKING:
    from fmoe.checkpoint import Report

SHARD = "the most that a file may hold, as 5GB or 200MB; back to hf, the files are as they were"
WRITTEN = "the directory to write, new or empty; or an address: s3://..., hf://ORG/NAME"


@app.command()
def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help=DIRECTORY)],
    dst: Annotated[str, typer.Argument(metavar="DST", help=WRITTEN)],
    to: Annotated[str, typer.Option(help="native, hf, another family's model type, or a system")] = "native",
    from_: From = None,
    config: Given = None,
    trust_pickle: Trust = False,
    like: Annotated[str | None, typer.Option(help="to gguf: a GGUF of the same model, for its metadata")] = None,
    layout: Annotated[str | None, typer.Option(help="a HF layout to write, as fused or per_expert")] = None,
    experts: Experts = None,
    quantized: Kept = None,
    dtype: Annotated[str | None, typer.Option(help="decoded, in bfloat16, float16 or float32")] = None,
    cast: Annotated[str | None, typer.Option(help="with --dtype: experts (and no more), or all")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="to hf, encoded afresh: fp8, mxfp8, mxfp4, int4 or nvfp4")
    ] = None,
    adapter: Own = None,
    force: Annotated[bool, typer.Option("--force", help="replace the checkpoint that DST holds")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, write nothing")] = False,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="sha256 of every file of both sides, kept for verify")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help=SHARD)] = "5GB",
    fsync: Annotated[bool, typer.Option(help="wait until the disk has everything")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="as many as there are cores, at most 8")] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="to a family: do without what does not carry over")] = False,
    number: Annotated[
        int | None, typer.Option("--ranks", min=1, max=1024, help="as many processes share the work")
    ] = None,
    bandwidth: Annotated[str | None, typer.Option(help="read at most so much in a second, as 200MB")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write SRC in another layout to DST: in bounded memory, with config, tokenizer and index.

    A native directory converts back to the very files that it was made from. Interrupted or killed, the same command
    goes on where it stopped; until all is written no file in DST bears its own name. To another family, what does not
    carry over is told on standard error, and refused without --lossy. To an address, each file is made in a folder of
    the cache, which XDG_CACHE_HOME moves, sent when it is whole, and removed there; config.json and the index go last.

        fmoe convert DIR NATIVE                        experts stacked
        fmoe convert NATIVE BACK --to hf               the files that DIR held
        fmoe convert DIR FUSED --to hf --layout fused  another Hugging Face layout
        fmoe convert FP8 BF16 --to hf --dtype bfloat16 what is quantised, decoded
        fmoe convert BF16 FP8 --to hf --quantize fp8   experts in codes with fresh scales
        fmoe convert DIR PART --experts 0:16           the first 16 experts of every layer
        fmoe convert DIR TITAN --to torchtitan         another system's directory; see `fmoe systems`
        fmoe convert MEGATRON HF --to hf --config JSON and from one, with no trainer
        fmoe convert X.gguf HF --to hf --config JSON   from llama.cpp's file; and into one, --to gguf --like X.gguf
        fmoe convert hf://ORG/NAME s3://BUCKET/NATIVE  from one address to another, file by file
    """
    if number is not None and ranks.world() == 1:
        raise typer.Exit(ranks.started(number, sys.argv[1:]))
    ranks.end_with_parent()
    quiet = quiet or not ranks.first()
    how: dict[str, Any] = dict(force=force, dry_run=dry_run, checksums=checksums, fsync=fsync, threads=threads)
    given = (
        ("like", like),
        ("layout", layout),
        ("quantized", quantized),
        ("dtype", dtype),
        ("cast", cast),
        ("quantize", quantize),
    )
    how |= {n: v for n, v in given if v}
    how |= (
        ranges(experts)
        | own(adapter)
        | of_source(from_, config, trust_pickle)
        | {"max_shard_size": size(max_shard_size), "lossy": lossy}
    )
    how |= {"bandwidth": size(bandwidth, "--bandwidth")} if bandwidth else {}
    with bar("converting", quiet or as_json, None if "://" in dst else Path(dst)) as progress:
        from fmoe import checkpoint
        from fmoe.families import FAMILIES
        from fmoe.folding import meant
        from fmoe.systems import SYSTEMS

        if to not in ("native", "hf", *FAMILIES, *SYSTEMS):
            told = "expected native, hf, a model type or a system; see `fmoe families` and `fmoe systems`"
            raise typer.BadParameter(f"--to is {to!r}, {told}{meant(to, ('native', 'hf', *FAMILIES, *SYSTEMS))}")
        with ranks.group() as processes:
            report = checkpoint.convert(src, dst, to, progress=progress, process_group=processes, **how)
    if not ranks.first():
        return
    from fmoe.types import human

    for kind, texts in (("lost", report.lost), ("note", report.notes)):
        for text in texts:
            print(f"fmoe: {kind}: {text}", file=sys.stderr)
    if report.sides and not as_json:
        print(report.sides)
    what = f"{count(report.tensors, 'tensor')} -> {report.made:,} in {count(report.files, 'file')}"
    would = "would be written to" if dry_run else "in"
    nbytes = report.written + report.resumed or report.nbytes  # written so far, or, with --dry-run, to be read
    went_on = f", {human(report.resumed)} of it by an earlier run" if report.resumed else ""
    _say(report, f"{what} {would} {report.path} ({human(nbytes)}{went_on})", as_json)
    for path, digest in () if as_json else report.checksums.items():
        print(f"{digest}  {path}")
    if not as_json and sys.stdout.isatty():
        from fmoe.cli.show import rows

        rows([("next", line) for line in _next(to, report.path, dry_run)])


@app.command()
def verify(
    path: Source,
    quantized: Kept = None,
    adapter: Own = None,
    from_: From = None,
    config: Given = None,
    trust_pickle: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Prove that every tensor comes back bit for bit from the other layout; nothing is written.

    fmoe verify DIR && fmoe convert DIR NATIVE
    """
    with bar("verifying", quiet or as_json) as progress:
        from fmoe import checkpoint

        how = own(adapter) | of_source(from_, config, trust_pickle) | ({"quantized": quantized} if quantized else {})
        report = checkpoint.verify(path, progress, **how)
    from fmoe.types import human

    found = f"{report.family}, {count(report.tensors, 'tensor')}, {human(report.nbytes)}"
    proved = "; ".join(
        [
            "everything comes back bit for bit" if not report.notes else "the layout comes back bit for bit",
            *report.notes,
        ]
    )
    _say(report, f"{found}: {proved}", as_json)


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option(help="write the checkpoints here, and leave them", readable=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a small checkpoint, convert it, run its experts on every backend here, convert back, compare.

    fmoe demo --keep small && fmoe inspect small/hf
    """
    from fmoe.cli.demo import run

    found = run(keep, (lambda line: None) if as_json else print)
    if as_json:
        print(json.dumps(found))


def _next(to: str, dst: str, dry_run: bool) -> list[str]:
    """What one may do with what was converted, one command a line."""
    where = shlex.quote(dst)
    if dry_run:
        return ["the same command without --dry-run writes it"]
    if to == "native":
        back = f"fmoe convert {where} BACK --to hf    # byte for byte what it was made from"
        return [f"fmoe.load({dst!r}) in Python, to train", back]
    from fmoe.families import FAMILIES

    if to == "hf" or to in FAMILIES:
        return [f"fmoe verify {where}", f"AutoModelForCausalLM.from_pretrained({dst!r}) in Python"]
    return [f"fmoe inspect {where}", f"fmoe convert {where} BACK --to hf --from {to}"]


def _say(report: "Report", text: str, as_json: bool) -> None:
    facts = {"path": report.path, "model_type": report.family, "tensors": report.tensors, "bytes": report.nbytes}
    facts |= {"made": report.made, "files": report.files, "read": report.read, "written": report.written}
    facts |= {"resumed": report.resumed, "checksums": dict(report.checksums)}
    facts |= {"lost": list(report.lost), "notes": list(report.notes)} if report.notes or report.lost else {}
    facts |= {"sides": report.sides} if report.sides else {}
    facts |= {"rules": str(report.adapter).split("\n")}
    print(json.dumps(facts) if as_json else text)
