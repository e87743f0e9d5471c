"""Figures into files; matplotlib is asked for here, by name."""

import io
from importlib import import_module
from pathlib import Path
from typing import Any

from fmoe.types import AdapterError

ENDINGS = (".svg", ".png", ".pdf", ".html")


def pyplot() -> Any:
    """matplotlib.pyplot, which draws into memory. Raises ImportError with what to install."""
    try:
        import_module("matplotlib").use("Agg")
        return import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError('fmoe.draw needs matplotlib: pip install "fmoe[draw]"') from error


def save(figure: Any, path: Path | str) -> None:
    """Write a figure as its file's ending says; .html is a page that holds the figure as SVG.

    Raises AdapterError for another ending.

    >>> import fmoe, tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(fmoe.draw.load(torch.ones(1, 4)), f"{folder}/load.svg")
    ...     Path(folder, "load.svg").stat().st_size > 0
    True
    """
    path = Path(path)
    if isinstance(figure, type) or not hasattr(figure, "savefig"):
        raise AdapterError(f"draw.save: figure is of type {type(figure).__name__}, expected a figure of matplotlib")
    if path.suffix.lower() not in ENDINGS:
        raise AdapterError(f"{path} ends in {path.suffix or 'nothing'!r}, expected one of {', '.join(ENDINGS)}")
    if path.suffix.lower() == ".html":
        path.write_text(html(figure), encoding="utf-8")
    else:
        figure.savefig(path, dpi=120)
    pyplot().close(figure)


def html(figure: Any) -> str:
    """A page with the figure in it."""
    return f"<!doctype html>\n<meta charset='utf-8'>\n<title>fmoe</title>\n{svg(figure)}\n"


def svg(figure: Any) -> str:
    """The figure as SVG, without the XML prolog: what a notebook or a page takes."""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]
