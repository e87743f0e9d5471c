"""The rows of `convert.py` as a table and as a plot."""

from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def rows(family: str, size: int, rounds: list[dict[str, Row]]) -> list[Row]:
    """A row for each method: medians over the rounds, and the median of its ratio to cp in the same round."""
    made = []
    for name in rounds[0]:
        row: Row = {"family": family, "bytes": size, "what": name}
        good = [r for r in rounds if "error" not in r[name] and "error" not in r["cp"]]
        if good:
            middle = lambda key, runs=good, n=name: median(r[n][key] for r in runs)
            against = "cp, durable" if "durable" in name else "cp"
            ratios = [r[name]["seconds"] / r[against]["seconds"] for r in good]
            row |= {"seconds": middle("seconds"), "rate": size / middle("seconds"), "against": against}
            row |= {"times cp": median(ratios), "rounds": len(good)}
            row |= {key: middle(key) for key in ("memory", "read", "written", "cpu")}
            row["cpu times cp"] = median(r[name]["cpu"] / r[against]["cpu"] for r in good)
        else:
            row["error"] = rounds[0][name]["error"]
        made.append(row)
    return made


def show(found: list[Row]) -> None:
    table = Table("family", "GB", "what", "seconds", "x cp", "memory MB", "read GB", "written GB")
    for row in found:
        start = [row["family"], f"{row['bytes'] / 1e9:.1f}", row["what"]]
        if "error" in row:
            table.add_row(*start, row["error"][:60])
        else:
            sizes = (row["memory"] / 1e6, row["read"] / 1e9, row["written"] / 1e9)
            table.add_row(*start, f"{row['seconds']:.2f}", f"{row['times cp']:.2f}", *(f"{n:.1f}" for n in sizes))
    Console(width=150).print(table)


def plot(found: list[Row], path: Path) -> None:
    """Seconds of every method, a panel for each checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row["family"], row["bytes"]) for row in found))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 4 * len(panels)), squeeze=False)
    for axis, (family, size) in zip(axes[:, 0], panels, strict=True):
        mine = [r for r in found if (r["family"], r["bytes"]) == (family, size) and "seconds" in r][::-1]
        axis.barh([r["what"] for r in mine], [r["seconds"] for r in mine])
        axis.set_title(f"{family}, {size / 1e9:.1f} GB")
        axis.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
