"""Tables and pictures of every result, from the JSON in results/ into bench/README.md.

    python bench/render.py            # tables and pictures
    python bench/render.py --tables   # tables alone (no matplotlib)

A section is a row of SECTIONS: its file, its caption, how its rows are read, the columns shown, and what is drawn.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: python bench/render.py -->\n", "<!-- end of results -->\n"
Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """columns: title -> value of a row. bar: (title of the value, its label, a function that names its panel)."""

    file: str
    caption: str
    columns: dict[str, Callable[[Row], Any]]
    rows: Callable[[Any], list[Row]] = list
    bar: tuple[str, str, Callable[[Row], str]] | None = None


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


_CONVERT: dict[str, Callable[[Row], Any]] = {
    "checkpoint": lambda r: f"{r['family']}, {r['bytes'] / 1e9:.1f} GB",
    "what": lambda r: r["what"],
    "seconds": lambda r: r.get("seconds", r.get("error", "-")),
    "times cp": lambda r: r.get("times cp", "-"),
    "memory MB": lambda r: f"{r['memory'] / 1e6:.0f}" if "memory" in r else "-",
    "read GB": lambda r: f"{r['read'] / 1e9:.2f}" if "read" in r else "-",
    "rounds": lambda r: r.get("rounds", "-"),
}
_PANEL = lambda r: f"{r['family']}, {r['bytes'] / 1e9:.1f} GB"
SECTIONS = (
    Section(
        "experts.json",
        "Experts on a CPU: time of fmoe over the best of Transformers' eager, batched_mm and grouped_mm.",
        {name: (lambda r, name=name: r[name]) for name in ("T", "E", "K", "I", "dtype", "order")}
        | {
            "forward": lambda r: r["forward"],
            "against": lambda r: r["forward_best"],
            "forward + backward": lambda r: r["both"],
            "against ": lambda r: r["both_best"],
        },
    ),
    Section(
        "experts_codes.json",
        "Experts in codes, 32 of them, 1024 wide, I = 512, 2 a token, bf16: time over that of decoding all first, and"
        " over that of experts decoded before; MB at most held above the arguments in a step, and MB of weights read.",
        {
            "format": lambda r: r["format"],
            "T": lambda r: r["T"],
            "used": lambda r: r["used"],
            "forward / decoding first": lambda r: r["forward"],
            "both / decoding first": lambda r: r["both"],
            "forward / decoded": lambda r: r["forward_plain"],
            "both / decoded": lambda r: r["both_plain"],
            "memory": lambda r: f"{r['memory_codes'] / 1e6:.1f}",
            "decoding first": lambda r: f"{r['memory_first'] / 1e6:.1f}",
            "read": lambda r: f"{r['read_codes'] / 1e6:.1f}",
            "decoding first ": lambda r: f"{r['read_first'] / 1e6:.1f}",
        },
    ),
    Section(
        "convert.json",
        "Conversion on a disk. `durable` waits for the disk, and is compared with a durable `cp`.",
        _CONVERT,
        bar=("times cp", "what", _PANEL),
    ),
    Section(
        "convert_memory.json",
        "Conversion between files in memory: what the processor costs.",
        _CONVERT,
        bar=("times cp", "what", _PANEL),
    ),
    Section("convert_transposed.json", "Transposition there and back, five rounds.", _CONVERT),
    Section(
        "systems.json",
        "Directories of other systems, Qwen3-30B-A3B with two layers, on a machine of two cores that ten others used: "
        "seconds are hints, processor time against that of cp less so; memory and bytes are exact.",
        {
            "what": lambda r: r["what"],
            "seconds": lambda r: r["seconds"],
            "processor s": lambda r: r["cpu"],
            "times cp's": lambda r: r["cpu times cp"],
            "memory MB": lambda r: f"{r['memory'] / 1e6:.0f}",
            "read GB": lambda r: f"{r['read'] / 1e9:.2f}",
            "read / needed": lambda r: f"{r['read'] / r['needed']:.3f}",
            "rounds": lambda r: r["rounds"],
        },
    ),
    Section(
        "systems_memory.json",
        "The same between files in memory, of one layer: what the processor costs, seconds against cp's.",
        {
            "what": lambda r: r["what"],
            "seconds": lambda r: r["seconds"],
            "times cp": lambda r: r["times cp"],
            "memory MB": lambda r: f"{r['memory'] / 1e6:.0f}",
            "rounds": lambda r: r["rounds"],
        },
    ),
    Section(
        "sync.json",
        "A trainer's weights into an engine's memory, vLLM's names, a layer of Qwen3-30B-A3B: fmoe.sync and two loops.",
        {
            "what": lambda r: r["what"],
            "GB": lambda r: r["bytes"] / 1e9,
            "copies": lambda r: r["copies"],
            "copied / model": lambda r: r["copied"] / r["bytes"],
            "peak MB": lambda r: f"{r['memory'] / 1e6:.0f}",
            "processor s": lambda r: r["cpu"],
            "rounds": lambda r: r["rounds"],
        },
    ),
    Section(
        "codecs.json",
        "Decoding a value format, one core against one core that copies what is decoded.",
        {
            "format": lambda r: r["format"],
            "decode / copy": lambda r: r["ratio"],
            "least": lambda r: r["ratio_least"],
            "most": lambda r: r["ratio_most"],
            "decode GB/s": lambda r: r["decode_gbs"],
            "encode GB/s": lambda r: r.get("encode_gbs", "-"),
        },
        rows=lambda found: [{"format": name} | row for name, row in found["formats"].items()],
        bar=("decode / copy", "format", lambda r: "one core"),
    ),
    Section(
        "aot_codes.json",
        "What compilers make of the product that decodes its tiles, for sm_90: none ever run. Turned: the gradient of"
        " rows.",
        {
            "codes": lambda r: r["kind"] + " turned" * r["turned"],
            "class": lambda r: r["class"],
            "tiles": lambda r: r["tiles"],
            "registers": lambda r: r["registers"],
            "spilled bytes": lambda r: r["spills"],
            "shared bytes": lambda r: r["shared"],
            "main loop": lambda r: r["loop"],
        },
    ),
    Section(
        "remote.json",
        "Conversions from a web server on the same two busy cores, and by several processes; all wait for the disk.",
        {
            "what": lambda r: r["what"],
            "MB": lambda r: f"{r['bytes'] / 1e6:.0f}",
            "seconds": lambda r: r["seconds"],
            "times local": lambda r: r["times local"],
            "source alone": lambda r: r.get("source", "-"),
            "not hidden": lambda r: r.get("not hidden", "-"),
            "requests": lambda r: r.get("requests", "-"),
            "bytes / owned": lambda r: f"{r.get('over', r['read'] / r['bytes']):.3f}",
            "memory MB": lambda r: f"{r['memory'] / 1e6:.0f}" if "memory" in r else "-",
            "same files": lambda r: {True: "yes", False: "NO"}.get(r.get("same"), "-"),
        },
    ),
    Section(
        "plan.json",
        "`fmoe plan` of a model of 1 T parameters: processor seconds of whole processes, and bytes a tensor.",
        {
            "parameters": lambda r: f"{r['parameters'] / 1e12:.2f} T",
            "tensors": lambda r: f"{r['tensors']:,}",
            "plan": lambda r: r["plan"],
            "import torch": lambda r: r["import torch"],
            "times": lambda r: r["times"],
            "least": lambda r: r["least"],
            "bytes a tensor": lambda r: f"{r['bytes a tensor']:.0f}",
            "at most": lambda r: f"{r['at most']:.0f}",
            "rounds": lambda r: r["rounds"],
        },
    ),
    Section(
        "aot.json",
        "What compilers make of the large and the odd tiles for sm_90: instructions of a thread, none ever run.",
        {
            "kernel": lambda r: r["kernel"] + (" odd" if "odd" in r["variant"] else ""),
            "tiles": lambda r: r["config"],
            "triton": lambda r: r["triton"],
            "commit": lambda r: r.get("was", "now"),
            "registers": lambda r: r["registers"],
            "spilled bytes": lambda r: r["spills"],
            "shared bytes": lambda r: r["shared"],
            "main loop": lambda r: r["loop"],
            "epilogue": lambda r: r["epilogue"],
            "exponentials": lambda r: r["exponentials"],
        },
    ),
)


def table(section: Section, rows: list[Row]) -> str:
    lines = [list(section.columns), ["---"] * len(section.columns)]
    lines += [[_cell(value(row)) for value in section.columns.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(section: Section, rows: list[Row], path: Path) -> None:
    """Bars of one column, a panel for each machine or checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    assert section.bar is not None
    value, label, panel = section.bar
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(section.columns[value](row), int | float):
            panels.setdefault(panel(row), []).append(row)
    tall = sum(0.4 + 0.28 * len(mine) for mine in panels.values())
    heights = {"height_ratios": [len(mine) for mine in panels.values()]}
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, tall + 0.8), squeeze=False, gridspec_kw=heights)
    for axis, (title, mine) in zip(axes[:, 0], panels.items(), strict=True):
        bars = axis.barh([section.columns[label](r) for r in mine], [section.columns[value](r) for r in mine])
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set_title(f"{title}: {value}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def render(pictures: bool = True, folder: Path = HERE / "results") -> str:
    """The results as Markdown; with `pictures` each is drawn beside its JSON."""
    parts = []
    for section in SECTIONS:
        rows = section.rows(json.loads((folder / section.file).read_text()))
        picture = (folder / section.file).with_suffix(".png")
        if pictures and section.bar:
            draw(section, rows, picture)
        shown = f"\n![{section.caption}](results/{picture.name})\n" if section.bar else ""
        name = section.file.removesuffix(".json")
        parts.append(f"### {name}\n\n{section.caption}\n\n{table(section, rows)}\n{shown}")
    return "\n" + "\n".join(parts) + "\n"


def page(text: str, results: str) -> str:
    """A page with what lies between its two marks replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + results + END + rest.split(END)[1]


if __name__ == "__main__":
    readme = HERE / "README.md"
    readme.write_text(page(readme.read_text(), render("--tables" not in sys.argv)))
