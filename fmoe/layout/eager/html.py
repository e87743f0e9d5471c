"""Tables for notebooks."""

from collections.abc import Iterable, Sequence
from html import escape


def table_of(text: str) -> str:
    """What `print` shows, a row for each line, the two sides of a rule in columns.

    >>> table_of("a [d]  <->  b [d]")
    '<table><tr><td><code>a [d]</code></td><td><code>b [d]</code></td></tr></table>'
    """
    return table(line.split("  <->  ") for line in text.split("\n"))


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of texts as an HTML table, every text as it is.

    >>> table([("a", "<b>")])
    '<table><tr><td><code>a</code></td><td><code>&lt;b&gt;</code></td></tr></table>'
    """
    cells = ("".join(f"<td><code>{escape(cell)}</code></td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
