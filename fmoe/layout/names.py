"""Names matched against addresses, fast: 47,000 keys have some forty shapes.

A name whose whole dotted segments are numbers is split into a *template* (each number a blank) and its numbers. An
address is compiled once and matched against the few templates; of the names, only the numbers are read, in columns.
"""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import product, starmap
from typing import Any, NamedTuple, cast

from fmoe.layout.notation import Rule
from fmoe.layout.spelled.address import Address, Capture
from fmoe.layout.spelled.bounds import as_list
from fmoe.layout.templates import BLANK, DIGITS, NUMBER, Columns, Rows, Value, blanked, columns, filled, template
from fmoe.types import AdapterError, Problem, brief

Reader = Callable[[Columns], Sequence[Value]]


class Names:
    """A set of names, by template: `rows[template]` are its names, and their numbers; specs: their shapes, if known."""

    def __init__(self, names: Iterable[str], specs: Mapping[str, Any] | None = None):
        if (listed := as_list(names)) is None:
            raise AdapterError(f"{brief(names)}: expected key names")
        self.names: list[str] = listed
        given = specs or (names if isinstance(names, Mapping) else {})
        self.specs = given if hasattr(next(iter(given.values()), None), "shape") else {}
        if {*map(type, self.names)} - {str} and (odd := [n for n in self.names if not isinstance(n, str)]):
            raise AdapterError(f"{brief(odd[0])}: a key that is a {type(odd[0]).__name__}, expected a name")
        text = "." + "\n.".join(self.names) + "\n"
        if BLANK in text or text.count("\n") != max(len(self.names), 1):
            bad = tuple(n for n in self.names if "\n" in n or BLANK in n)
            raise AdapterError([Problem(f"{bad[0]!r}: a name holds a line break or a zero byte", bad)])
        templates, numbers = blanked(text)
        alike: dict[str, tuple[int, list[str], list[int]]] = {}
        at = 0
        for name, dotted in zip(self.names, templates, strict=False):
            same = alike.get(dotted)
            if same is None:
                same = alike[dotted] = (dotted.count(BLANK), [], [])
            count, mine, starts = same
            mine.append(name)
            starts.append(at)
            at += count
        self.rows = {t[1:]: Rows(mine, partial(columns, numbers, s, n)) for t, (n, mine, s) in alike.items()}
        self.templates = tuple(self.rows)

    def ending(self, tails: tuple[str, ...]) -> list[str]:
        """Those that end so, in order. tails: none has a whole segment that is a number."""
        found = {n for t, rows in self.rows.items() if t.endswith(tails) for n in rows.names}
        return [n for n in self.names if n in found] if found else []

    def __contains__(self, name: str) -> bool:
        found = self.rows.get(template(name))
        return found is not None and name in found.names


class Hit(NamedTuple):
    """An address that fits a template: how to read each capture off names' numbers, and which names to refuse."""

    readers: dict[str, "Value | Reader"]
    tests: tuple[Callable[[Columns], Iterable[bool]], ...]

    def column(self, name: str, rows: Rows) -> Sequence[Value]:
        """For each row, what this capture is."""
        reader = self.readers[name]
        return reader(rows.columns) if callable(reader) else [reader] * len(rows.names)

    def values(self, names: Iterable[str], rows: Rows) -> Iterable[tuple[Value, ...]]:
        """For each row, what these captures are."""
        read = [self.column(n, rows) for n in names]
        return zip(*read, strict=True) if read else [()] * len(rows.names)


@dataclass(frozen=True, eq=False)
class Pattern:
    """An address compiled for matching. `indexed`: the captures that are numbers; the others are text."""

    address: Address
    indexed: frozenset[str]

    @cached_property
    def _compiled(self) -> tuple[re.Pattern[str], tuple[str, ...]]:
        """A regex over templates, and the numbers that the address itself spells out."""
        marked = "".join(p if isinstance(p, str) else chr(0xE000 + i) for i, p in enumerate(self.address.parts))
        out, at, spelled = "", 0, []
        for found in re.finditer(rf"{NUMBER.pattern}|[\uE000-\uF8FF]", marked):
            out += re.escape(marked[at : found.start()])
            around = marked[max(found.start() - 1, 0) : found.start()], marked[found.end() : found.end() + 1]
            at = found.end()
            if "0" <= found[0][0] <= "9":
                out += BLANK
                spelled.append(found[0])
            else:
                capture = self.address.parts[ord(found[0]) - 0xE000]
                assert isinstance(capture, Capture)
                out += f"(?P<{capture.name}>{self._group(capture, *around)})"
        return re.compile(out + re.escape(marked[at:]), re.DOTALL), tuple(spelled)

    def _group(self, capture: Capture, before: str, after: str) -> str:
        if capture.choices:
            return "|".join(re.escape(_blanked(c, before, after)) for c in capture.choices)
        if capture.name in self.indexed:
            whole, width = before in ("", ".") and after in ("", "."), capture.width
            short = rf"0[0-9]{{{width - 1}}}|" if width else ""  # with a zero in front a segment is no blank
            return short + (BLANK if whole else rf"[1-9][0-9]{{{width - 1},8}}" if width else DIGITS)
        if not before and after not in ("", "."):
            return r"(?:.+?\.)?"  # a free prefix: nothing, or whole segments with their dot
        return "[^.]+" if before and after else ".+"

    def match(self, template: str) -> Hit | None:
        regex, spelled = self._compiled
        found = regex.fullmatch(template)
        if not found:
            return None
        readers: dict[str, Value | Reader] = {}
        tests: list[Callable[[Columns], Iterable[bool]]] = []
        free = list(range(template.count(BLANK)))
        for name, text in found.groupdict().items():
            span = slice(start := template.count(BLANK, 0, found.start(name)), start + text.count(BLANK))
            readers[name] = _reader(capture := self.address.captures[name], name in self.indexed, text, span)
            free = [p for p in free if not span.start <= p < span.stop]
            if capture.choices and BLANK in text:
                tests.append(partial(_are_choices, text, span, capture.choices))
            if capture.width and BLANK in text:
                tests.append(partial(_are_as_long, span.start, 10 ** (capture.width - 1)))
        tests += [partial(_are_number, p, int(digits)) for p, digits in zip(free, spelled, strict=True)]
        return Hit(readers, tuple(tests))

    def render(self, values: dict[str, Value]) -> str:
        """The name that the captures' values spell."""
        parts = (p if isinstance(p, str) else self._text(p, values[p.name]) for p in self.address.parts)
        return "".join(parts)

    def renders(self, fixed: Mapping[str, Value], free: Mapping[str, Iterable[Value]]) -> list[str]:
        """All names that the free captures' values spell beside fixed ones; of the free ones, the last varies first."""
        place = {n: f"{{{i}}}" for i, n in enumerate(free)}
        spelled = ""
        for part in self.address.parts:
            if isinstance(part, Capture) and part.name in free:
                spelled += place[part.name]
            else:
                text = part if isinstance(part, str) else self._text(part, fixed[part.name])
                spelled += text.replace("{", "{{").replace("}", "}}")
        texts = ([self._text(self.address.captures[n], v) for v in values] for n, values in free.items())
        return list(starmap(spelled.format, product(*texts)))

    def _text(self, capture: Capture, value: Value) -> str:
        if capture.choices:
            return capture.choices[int(value)]
        return str(int(value) + capture.offset).zfill(capture.width) if capture.name in self.indexed else str(value)


def _reader(capture: Capture, indexed: bool, text: str, span: slice) -> Value | Reader:
    """The capture's value where its text is fixed by the template, else a function of its names' numbers."""
    if capture.choices:
        read: Callable[[str], Value] = capture.choices.index
    elif indexed:
        read = lambda digits: int(digits) - capture.offset
    else:
        read = str
    if span.start == span.stop:
        return read(text)
    if indexed and not capture.choices:
        shift, at = capture.offset, span.start
        return lambda columns: [n - shift for n in columns[at]] if shift else columns[at]
    return lambda columns: [read(filled(text, numbers)) for numbers in zip(*columns[span], strict=True)]


def _blanked(choice: str, before: str, after: str) -> str:
    """A choice with blanks for the whole segments of it that are numbers, between these neighbours."""
    before, after = (beside if beside in ("", ".") else "x" for beside in (before, after))
    return NUMBER.sub(BLANK, before + choice + after)[len(before) :].removesuffix(after)


def _are_choices(text: str, span: slice, choices: tuple[str, ...], columns: Columns) -> list[bool]:
    return [filled(text, numbers) in choices for numbers in zip(*columns[span], strict=True)]


def _are_number(at: int, number: int, columns: Columns) -> list[bool]:
    return [n == number for n in columns[at]]


def _are_as_long(at: int, least: int, columns: Columns) -> list[bool]:
    return [n >= least for n in columns[at]]


def patterns(rule: Rule) -> tuple[Pattern, Pattern]:
    """The rule's two sides, compiled: once for all equal rules, which are compared once for each of them."""
    if (known := rule.__dict__.get("_patterns")) is None:
        known = rule.__dict__["_patterns"] = _patterns(rule)
    return cast(tuple[Pattern, Pattern], known)


@lru_cache(maxsize=4096)
def _patterns(rule: Rule) -> tuple[Pattern, Pattern]:
    return Pattern(rule.source, rule.numbers), Pattern(rule.target, rule.numbers)


_match = lru_cache(maxsize=1 << 16)(Pattern.match)


@lru_cache(maxsize=1 << 14)
def _fitting(patterns: tuple[Pattern, ...], templates: tuple[str, ...]) -> list[tuple[int, str, Hit]]:
    """The templates that each pattern fits, most of them none. Plans of one family ask the same again and again."""
    return [(i, t, hit) for i, p in enumerate(patterns) for t in templates if (hit := _match(p, t)) is not None]


def hits(rule: Rule, names: Names, *, within: Container[str] = ()) -> Iterator[tuple[str, Hit, Rows]]:
    """The rule's source against every template: the template, how to read its captures, and the names that it claims.

    A shared number outside its bound is not the rule's to claim. One that becomes an axis is, and is wrong later; but
    in the templates `within`, which rules share out among themselves, each claims only the numbers in its bound.
    """
    return ((at, hit, rows) for _, at, hit, rows in all_hits((rule,), names, within=within))


def all_hits(
    rules: Sequence[Rule], names: Names, *, within: Container[str] = ()
) -> Iterator[tuple[int, str, Hit, Rows]]:
    """The hits of each rule, and its place."""
    for i, at, hit in _fitting(tuple([patterns(rule)[0] for rule in rules]), names.templates):
        rule, rows = rules[i], names.rows[at]
        for test in hit.tests:
            rows = rows.where(test(rows.columns))
        for name in rule.source.captures if at in within else rule.limited:
            rows = _inside(hit, rule, name, rows)
        if rows.names and rule.unsettled:
            text = f"{rows.names[0]!r}: rule {rule} needs the size {rule.unsettled}: give a config, or bind it"
            raise AdapterError([Problem(text, (rows.names[0],))])
        if rows.names:
            yield i, at, hit, rows


def _inside(hit: Hit, rule: Rule, name: str, rows: Rows) -> Rows:
    """The rows in which this capture, if it is a number, is one that the rule can write, and within its bound."""
    if name not in rule.numbers:
        return rows
    there, bound = rule.target.captures.get(name), rule.bound.get(name)
    least = -min(there.offset, 0) if there else 0
    values = cast(Sequence[int], hit.column(name, rows))
    outside = {v for v in set(values) if v < least or bound is not None and v not in bound}
    return rows.where(v not in outside for v in values) if outside else rows
