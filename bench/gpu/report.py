"""Tables and plots of what `gpu.sh` wrote.

    python bench/gpu/report.py [FOLDER]

Reads layers.json and kernels.json in FOLDER (bench/results), prints tables, and writes layers.png (TFLOP/s forward and
backward by shape, with the roofline) and memory.png (saved for backward against the formula).
"""

import json
import sys
from pathlib import Path
from typing import Any

# an H200: TFLOP/s of a large dense bf16 product, and TB/s of a copy, both measured
PEAK, BANDWIDTH = 790.0, 4.3


def roofline(shape: str) -> float:
    """TFLOP/s forward if every kernel ran at the peak of what limits it, and gathers at the speed of a copy."""
    from common import DECODE, SHAPES

    s = (SHAPES | DECODE)[shape]
    compute = s.forward_flops / (PEAK * 1e12)
    combine = 2.0 * (s.T * s.K + s.T) * s.D / (BANDWIDTH * 1e12)
    weights = 6.0 * min(s.E, s.T * s.K) * s.D * s.I / (BANDWIDTH * 1e12)
    return s.forward_flops / (max(compute, weights) + combine) / 1e12


def table(records: list[dict[str, Any]], columns: list[str]) -> str:
    say = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
    rows = [columns] + [
        [say(r.get(c, r.get("error", "-") if c == columns[-1] else "-")) for c in columns] for r in records
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def bars(records: list[dict[str, Any]], values: list[str], path: Path, title: str, roof: bool = False) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(r["shape"] for r in records))
    layers = list(dict.fromkeys(r["layer"] for r in records if any(v in r for v in values)))
    figure, axes = pyplot.subplots(len(values), 1, figsize=(max(8, 1.3 * len(shapes)), 4 * len(values)), squeeze=False)
    for axis, value in zip(axes[:, 0], values, strict=True):
        for i, who in enumerate(layers):
            found = {r["shape"]: r.get(value, 0) for r in records if r["layer"] == who and not r.get("skew")}
            at = [x + (i - len(layers) / 2) * 0.8 / len(layers) for x in range(len(shapes))]
            axis.bar(at, [found.get(s, 0) for s in shapes], 0.8 / len(layers), label=who, align="edge")
        if roof:
            axis.plot(range(len(shapes)), [roofline(s) for s in shapes], "k_", markersize=24, label="roofline, forward")
        axis.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
        axis.set_ylabel(value.replace("_", " "))
        axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(folder: Path) -> None:
    layers = json.loads((folder / "layers.json").read_text())
    title = f"{layers['device']}, torch {layers['torch']}, triton {layers['triton']}"
    print(title)
    speeds = ["forward_ms", "both_ms", "forward_tflops", "backward_tflops", "both_tflops"]
    print(table(layers["records"], ["shape", "layer", "skew", *speeds, "saved_bytes", "peak_bytes"]))
    timed = [r for r in layers["records"] if "forward_ms" in r]
    bars(timed, ["forward_tflops", "backward_tflops"], folder / "layers.png", title, roof=True)
    bars(timed, ["saved_bytes", "peak_bytes"], folder / "memory.png", title)
    if (folder / "kernels.json").exists():
        kernels = json.loads((folder / "kernels.json").read_text())
        print(table(kernels["records"], ["shape", "kernel", "tiles", "ms", "tflops", "gbps"]))
    if (folder / "correct.json").exists():
        correct = json.loads((folder / "correct.json").read_text())
        print(table(correct["records"], ["widths", "activation", "after_down", "dtype", "ratio", "repeats", "y", "x"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "results")
