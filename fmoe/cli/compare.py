"""Commands that compare and draw: diff, draw."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fmoe.cli.app import DIRECTORY, Json, Own, Source, app, count, own, ranges
from fmoe.cli.progress import waiting
from fmoe.cli.show import grid

MOST = 40  # lines of differences


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help=DIRECTORY, readable=False)],
    other: Annotated[Path, typer.Argument(metavar="B", help="another, in whatever layout", readable=False)],
    values: Annotated[bool, typer.Option("--values", help="the largest difference of each tensor")] = False,
    adapter: Own = None,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor, across layouts; exit code 1 if they differ.

    fmoe diff HF NATIVE              one by one against stacked: under native names
    fmoe diff BASE TUNED --values    which tensors training has moved, and how far
    """
    with waiting("comparing", as_json):
        from fmoe.checkpoint.diff import diff as compare

        found = list(compare(one, other, values=values, **own(adapter)))
    unlike = [row for row in found if row["status"] != "equal"]
    equal = len(found) - len(unlike)
    if as_json:
        print(json.dumps({"equal": equal, "different": len(unlike), "differences": unlike}))
        raise typer.Exit(1 if unlike else 0)
    if unlike:
        grid(["tensor", "status", "A", "B", "largest"], [_line(row) for row in unlike[:MOST]], ["largest"])
        if len(unlike) > MOST:
            print(f"and {len(unlike) - MOST:,} more: --json has all")
    print(f"{count(equal, 'tensor')} equal, {len(unlike):,} different")
    raise typer.Exit(1 if unlike else 0)


def _line(row: dict[str, Any]) -> list[str]:
    say = lambda side: "{1} {0}".format(*row[side]) if side in row else ""
    status = row["status"].replace("in one", "in A").replace("in other", "in B")
    return [row["name"], status, say("one"), say("other"), f"{row['largest']:.3g}" if "largest" in row else ""]


@app.command()
def draw(
    path: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.svg, .png, .pdf or .html")] = Path("layout.svg"),
    experts: Annotated[str | None, typer.Option(help="mark these experts, as 0:16")] = None,
    ranks: Annotated[int, typer.Option(min=1, max=10**6, help="mark the experts of each of so many ranks")] = 1,
) -> None:
    """A picture of a checkpoint: its layouts side by side, bytes by layer and kind; no tensor is read.

    fmoe draw DIR -o layout.png --ranks 4
    """
    with waiting("drawing"):
        from fmoe.draw import checkpoint, save

        figure = checkpoint(path, ranks=ranks, **ranges(experts))
        save(figure, output)
    print(f"fmoe: wrote {output}", file=sys.stderr)
