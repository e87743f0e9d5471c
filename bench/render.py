"""Tables and pictures of every result, from the JSON in results/ into bench/README.md.

    python bench/render.py            # tables and pictures
    python bench/render.py --tables   # tables alone (no matplotlib)

What is shown, and how, is a row of SECTIONS in `sections.py`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from sections import SECTIONS, Row, Section

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: python bench/render.py -->\n", "<!-- end of results -->\n"


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


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
