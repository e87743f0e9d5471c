"""Tables and a picture of what `gpu.sh` wrote, beside what `model.py` predicted.

    python bench/gpu/report.py [FOLDER]

Reads FOLDER/records.jsonl (bench/results/gpu), however far it got; prints and writes report.txt, and layers.png:
TFLOP/s of every layer by shape, the roofline and the model's range.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model

Row = dict[str, Any]
COLUMNS = {
    "clocks": ["kernel", "ms", "tflops", "gbps", "clocks"],
    "correct": ["shape", "activation", "after_down", "dtype", "ratio", "repeats", "y", "x", "w_up"],
    "layers": ["shape", "layer", "skew", "forward_ms", "inference_ms", "backward_ms"]
    + ["forward_tflops", "inference_tflops", "backward_tflops", "both_tflops"],
    "waits": ["shape", "kind", "waits", "graph_repeats", "ms", "saved_bytes", "saved_bytes_formula", "peak_bytes"],
    "kernels": ["shape", "kernel", "ms", "tflops", "gbps"],
    "sweep": ["shape", "kernel", "tiles", "ms"],
    "decode": ["shape", "layer", "us", "weights_gbps"],
    "fp8": ["shape", "bf16_tflops", "fp8_tflops", "speedup", "apart"],
    "specialised": ["shape", "kernel", "same", "apart", "ms", "twin_ms"],
    "races": ["kind", "hazards", "code", "said"],
    "tests": ["kind", "code", "said"],
}
COLUMNS["layers, swept tiles"] = COLUMNS["layers"]


def read(folder: Path) -> list[Row]:
    """The records; a last line that a kill has cut short is not one."""
    found = []
    for line in (folder / "records.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def table(rows: list[Row], columns: list[str]) -> str:
    """The rows as text, with the reason instead of figures where there are none."""
    say = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
    cells = [[say(row.get(c, "")) for c in columns] + [row.get("reason", "")] for row in rows]
    cells = [[*columns, ""], *cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def text(rows: list[Row]) -> str:
    out = io.StringIO()
    say: Callable[[str], Any] = lambda line: print(line, file=out)
    machine = next((r for r in rows if "device" in r), {})
    say(f"{machine.get('device', 'no device')}, torch {machine.get('torch')}, triton {machine.get('triton')}")
    for r in rows:
        if r["step"] == "start":
            say(f"Python {r['python']}, {r['cached']} kernels in the cache, wheels: {r['wheels']}")
    for step, columns in COLUMNS.items():
        here = [r for r in rows if r["step"] == step]
        ends = [r for r in here if r.get("end") or set(r) == {"step", "dtype", "at", "reason"}]
        if here:
            told = "; ".join(
                [f"{r['seconds']} s" for r in ends if "seconds" in r] + [r["reason"] for r in ends if "reason" in r]
            )
            say(f"\n== {step} ({told or 'did not end'})")
        if kept := [r for r in here if r not in ends and "device" not in r]:
            say(table(kept, columns))
    say("\n== predicted by model.py, H200, TFLOP/s: low and high")
    say(model.text())
    return out.getvalue()


def picture(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in rows if r["step"].startswith("layers") and "forward_tflops" in r and not r.get("skew")]
    if not rows:
        return
    shapes, layers = (list(dict.fromkeys(r[key] for r in rows)) for key in ("shape", "layer"))
    figure, axes = pyplot.subplots(2, 1, figsize=(max(8, 2.2 * len(shapes)), 9))
    for axis, value in zip(axes, ("forward_tflops", "backward_tflops"), strict=True):
        for i, who in enumerate(layers):
            found = {r["shape"]: r[value] for r in rows if r["layer"] == who}
            at = [x + (i - len(layers) / 2) * 0.8 / len(layers) for x in range(len(shapes))]
            axis.bar(at, [found.get(s, 0) for s in shapes], 0.8 / len(layers), label=who, align="edge")
        for x, shape in enumerate(shapes):
            if shape in model.SHAPES:
                low, high = (model.layer(model.SHAPES[shape], feed)[value] for feed in model.FEEDS)
                axis.plot([x, x], [low, high], "k-", linewidth=3, label="predicted" if x == 0 else None)
                axis.plot(
                    [x], [model.roofline(model.SHAPES[shape])], "k_", markersize=24, label="roof" if x == 0 else None
                )
        axis.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right")
        axis.set_ylabel(value.replace("_", " "))
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(record: Callable[..., None], folder: str) -> None:
    rows = read(Path(folder))
    told = text(rows)
    (Path(folder) / "report.txt").write_text(told)
    print(told)
    picture(rows, Path(folder) / "layers.png")


if __name__ == "__main__":
    main(print, sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parents[1] / "results" / "gpu"))
