"""Rules as a table, for notebooks."""

from html import escape


def table_of(text: str) -> str:
    """What `print` shows, a row for each line, the two sides of a rule in columns.

    >>> table_of("a [d]  <->  b [d]")
    '<table><tr><td><code>a [d]</code></td><td><code>b [d]</code></td></tr></table>'
    """
    rows = (
        "".join(f"<td><code>{escape(side)}</code></td>" for side in line.split("  <->  ")) for line in text.split("\n")
    )
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
