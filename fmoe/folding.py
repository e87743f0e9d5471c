"""Many names, or many problems of one kind, in a line, the name or the kind of value that was meant: for messages."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from itertools import groupby
from math import inf, isfinite, prod
from typing import Any

_LINES = 18


class Doubt(str):
    """A note that something may be lost, or was not compared; other notes tell of what may well be meant so."""


def fold(names: Iterable[str], most: int = 3) -> str:
    """Names as patterns: numbers in a row as `{0..59}`, few texts as `{gate,up}`.

    >>> fold(f"l.{i}.{p}_proj.w" for i in range(60) for p in ("gate", "up"))
    'l.{0..59}.{gate,up}_proj.w (120 tensors)'
    >>> fold(["a", "b.0", "c.w.x"])
    "'a', 'b.0', 'c.w.x'"
    """
    unique = list(dict.fromkeys(names))
    found = _merged([p for shape in _by_shape(unique) for p in _patterns(shape)])
    if len(unique) <= most or len(found) >= len(unique):
        return listed(unique, 8)
    shown = ", ".join(".".join(map(_spelled, columns)) for columns in found[:most])
    more = f" and {len(found) - most} more forms" if len(found) > most else ""
    return f"{shown}{more} ({len(unique)} tensors)"


def meant(found: object, options: Iterable[str]) -> str:
    """The end of a message about a name that is none of the options: the nearest of them, if one is near.

    >>> meant("tritn", ["loop", "triton"]), meant("Qwen3MoE", ["qwen3_moe"]), meant("x", ["loop"]), meant(3, ["loop"])
    (". Did you mean 'triton'?", ". Did you mean 'qwen3_moe'?", '', '')
    """
    spelled = {option.lower(): option for option in options}
    near = get_close_matches(found.lower(), spelled, n=1) if isinstance(found, str) else []
    return f". Did you mean {spelled[near[0]]!r}?" if near else ""


def short(text: str) -> str:
    """A rule's text, of a long list of literal choices the first two and their number.

    >>> short("w{s=_a|_b|_c|_d|_e|_f|_g} [e d]"), short("{g=gate|up} [i d]")
    ('w{s=_a|_b|.. 5 more} [e d]', '{g=gate|up} [i d]')
    """
    return _CHOICES.sub(lambda m: f"{m[1]}|.. {m[2].count('|')} more}}", text)


def told(lines: Iterable[str]) -> Iterator[str]:
    """The lines, several keeps in a row that differ in their last segment as one.

    >>> list(told(["a", "keep x.y", "keep x.z", "keep {rest}"]))
    ['a', 'keep x.y, .z', 'keep {rest}']
    """
    stem = lambda line: line.rpartition(".")[0] + "." if line.startswith("keep ") and "." in line else line
    for _, same in groupby(lines, stem):
        first, *more = same
        yield ", ".join([first, *(f".{line.rpartition('.')[2]}" for line in more)])


def apart(line: str) -> list[str]:
    """What `told` made a line of.

    >>> apart("keep x.y, .z")
    ['keep x.y', 'keep x.z']
    """
    first, *more = line.split(", .") if line.startswith("keep ") else [line]
    return [first, *(f"{first.rpartition('.')[0]}.{last}" for last in more)]


def listed(names: Sequence[str], most: int) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(repr(n) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


_CHOICES = re.compile(r"(\{\w+=[^{}|]*\|[^{}|]*)((?:\|[^{}|]*){5,})\}")
Columns = tuple[tuple[str, ...], ...]  # for each segment between dots, what it may be


def _by_shape(names: list[str]) -> Iterable[list[list[str]]]:
    shapes: dict[tuple[str, ...], list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        shapes.setdefault(tuple("" if p.isdecimal() else p for p in parts), []).append(parts)
    return shapes.values()


def _patterns(rows: list[list[str]]) -> list[Columns]:
    """One pattern, where the rows are all combinations of what their columns hold; else one for each row."""
    columns = tuple(tuple(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    if prod(map(len, columns)) == len(rows):
        return [columns]
    return [tuple((part,) for part in row) for row in rows]


def _merged(patterns: list[Columns]) -> list[Columns]:
    """Patterns that differ in one segment, as one."""
    for at in range(max(map(len, patterns), default=0)):
        alike: dict[tuple[object, ...], list[str]] = {}
        for p in patterns:
            alike.setdefault((p[:at], p[at + 1 :]) if at < len(p) else (p, None), []).extend(
                p[at] if at < len(p) else ()
            )
        patterns = [key[0] if key[1] is None else (*key[0], tuple(parts), *key[1]) for key, parts in alike.items()]  # type: ignore[misc]
    return patterns


def _spelled(parts: tuple[str, ...]) -> str:
    if len(parts) == 1:
        return parts[0]
    if all(p.isdecimal() for p in parts):
        numbers = sorted(map(int, parts))
        if numbers[-1] - numbers[0] + 1 == len(numbers):
            return f"{{{numbers[0]}..{numbers[-1]}}}"
        return f"{{{','.join(map(str, numbers[:6]))}{',..' * (len(numbers) > 6)}}}"
    end = next((parts[0][i:] for i in range(len(parts[0])) if all(p.endswith(parts[0][i:]) for p in parts)), "")
    end = end[end.index("_") :] if "_" in end else ""
    return f"{{{','.join(p.removesuffix(end) for p in parts[:6])}{',..' * (len(parts) > 6)}}}{end}"


def lines(problems: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[str]:
    """A line for each problem, and one for three or more that differ in their names alone; about twenty in all."""
    groups: dict[str, list[tuple[str, list[list[str]]]]] = {}
    for text, keys in problems:
        marked, places = _marked(text, keys)
        groups.setdefault(marked, []).append((text, places))
    made = []
    for marked, group in groups.items():
        if len(group) < 3 or "\0" not in marked:
            made += [text for text, _ in group]
            continue
        head, *parts = marked.split("\0")
        folded = [fold(n for _, places in group for n in places[i]) for i in range(len(parts))]
        told = ["it" if name in folded[:i] else name for i, name in enumerate(folded)]
        made.append(head + "".join(map("".join, zip(told, parts, strict=True))) + f" ({len(group)} problems)")
    yield from made[:_LINES]
    if len(made) > _LINES:
        yield f"and {len(made) - _LINES} more, all of them in .problems"


_QUOTED = re.compile(r"'[^']*'(?:, '[^']*')*(?: and \d+ more)?")


def _marked(text: str, keys: Sequence[str]) -> tuple[str, list[list[str]]]:
    """A problem's text with a mark for each place where keys stand, and the keys of each; `and 3 more` are the rest."""
    known, places = {*keys}, list[list[str]]()

    def mark(hit: re.Match[str]) -> str:
        names = re.findall(r"'([^']*)'", hit[0])
        if not known.issuperset(names):
            return hit[0]
        places.append(names)
        return "\0"

    marked = _QUOTED.sub(mark, text)
    rest = [key for key in keys if repr(key) not in text]
    if rest and places and " more" in text:
        places[0] = [*places[0], *rest]
    return marked, places


def brief(value: object, most: int = 80) -> str:
    """`repr`, cut short: for messages about values that may be huge.

    >>> brief(range(10**5000)), brief("a" * 100, most=10)
    ('a range', "'aaaaaa...")
    """
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."


def human(nbytes: float) -> str:
    """12345 -> '12.3 kB', in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


KINDS: dict[str, tuple[Any, str]] = {
    "int": ((int,), "an int from 0 on"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "True or False"),
    "str": ((str,), "a name"),
}
"""An annotation -> what a value may be, and how that is said: a bool is a number too, but 0 and 1 are no bools."""


def check_fields(config: Any) -> None:
    """Raises ValueError, naming the field, for a value of another kind than its field's, a count below 0, and NaN.

    Infinite is a limit at most. A number beyond 64 bits is made the float that torch would take.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Sizes:
    ...     width: "int | None" = None
    >>> check_fields(Sizes(3)), check_fields(Sizes())
    (None, None)
    >>> check_fields(Sizes("3"))
    Traceback (most recent call last):
    ValueError: Sizes.width is '3', expected an int from 0 on, or None
    """
    for f in fields(config):
        value: Any = getattr(config, f.name)
        kind, _, none = _named(f.type).partition(" | ")
        if kind not in KINDS or (value is None and none):
            continue
        taken, told = KINDS[kind]
        wrong = not isinstance(value, taken)
        wrong = wrong or (kind == "int" and (isinstance(value, bool) or not 0 <= value < 2**63))
        if kind == "float" and not wrong and abs(value) >= 2**63:
            try:
                value = float(value)
                object.__setattr__(config, f.name, value)
            except OverflowError:
                wrong = True
        endless = isinstance(value, float) and not (isfinite(value) or value == inf and "limit" in f.name)
        if wrong or endless:
            end = ", or None" if none else ""
            raise ValueError(f"{type(config).__name__}.{f.name} is {brief(value)}, expected {told}{end}")


def as_flag(kind: Any, value: Any) -> Any:
    """0 and 1 as False and True where a field's annotation is bool, as JSON of other hands writes them; else as it is.

    >>> as_flag(bool, 1), as_flag(int, 1), as_flag(bool, 2)
    (True, 1, 2)
    """
    return bool(value) if _named(kind) == "bool" and type(value) is int and value in (0, 1) else value


def _named(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
