"""Names matched against addresses, fast: 47,000 keys have some forty shapes.

A name whose whole dotted segments are numbers is split into a *template* (each number a blank) and its numbers. An
address is compiled once and matched against the few templates; per name, only the numbers are read.
"""

import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import islice
from typing import NamedTuple

from fmoe.layout.notation import Address, Capture, Rule
from fmoe.types import AdapterError, Problem, brief

BLANK = "\0"
_DIGITS = "0|[1-9][0-9]{0,8}"  # canonical: 07 is no index, and what has ten digits counts nothing
_NUMBER = re.compile(rf"(?<![^.])(?:{_DIGITS})(?![^.])")  # a whole segment
_DOTTED = re.compile(rf"\.({_DIGITS})(?![^.\n])")  # the same where a dot stands before every segment: far faster

Value = int | str
Numbers = tuple[str, ...]
Row = tuple[str, Numbers]  # a name and its numbers
Reader = Callable[[Numbers], Value]


class Names:
    """A set of names, by template. `rows[template]` lists each name with its numbers, in order."""

    def __init__(self, names: Iterable[str]):
        if not isinstance(names, Iterable):
            raise AdapterError(f"{brief(names)}: expected key names")
        self.names = list(names)
        if odd := [n for n in self.names if not isinstance(n, str)]:
            raise AdapterError(f"{brief(odd[0])}: a key that is a {type(odd[0]).__name__}, expected a name")
        text = "." + "\n.".join(self.names)
        if BLANK in text or text.count("\n") != max(len(self.names) - 1, 0):
            bad = tuple(n for n in self.names if "\n" in n or BLANK in n)
            raise AdapterError([Problem(f"{bad[0]!r}: a name holds a line break or a zero byte", bad)])
        numbers = iter(_DOTTED.findall(text))
        found: dict[str, tuple[int, list[Row]]] = {}
        for name, dotted in zip(self.names, _DOTTED.sub("." + BLANK, text).split("\n"), strict=False):
            if dotted not in found:
                found[dotted] = (dotted.count(BLANK), [])
            count, rows = found[dotted]
            rows.append((name, tuple(islice(numbers, count))))
        self.rows = {dotted[1:]: rows for dotted, (_, rows) in found.items() if rows}


class Hit(NamedTuple):
    """An address that fits a template: how to read each capture off a name's numbers, and which names to refuse."""

    readers: dict[str, "Value | Reader"]
    tests: tuple[Callable[[Numbers], bool], ...]

    def values(self, names: Iterable[str], numbers: Numbers) -> tuple[Value, ...]:
        return tuple([r(numbers) if callable(r) else r for r in map(self.readers.__getitem__, names)])


@dataclass(frozen=True)
class Pattern:
    """An address compiled for matching. `indexed`: the captures that are numbers; the others are text."""

    address: Address
    indexed: frozenset[str]

    @cached_property
    def _compiled(self) -> tuple[re.Pattern[str], tuple[str, ...]]:
        """A regex over templates, and the numbers that the address itself spells out."""
        marked = "".join(p if isinstance(p, str) else chr(0xE000 + i) for i, p in enumerate(self.address.parts))
        out, at, spelled = "", 0, []
        for found in re.finditer(rf"{_NUMBER.pattern}|[\uE000-\uF8FF]", marked):
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
            return BLANK if before in ("", ".") and after in ("", ".") else _DIGITS
        if not before and after not in ("", "."):
            return r"(?:.+?\.)?"  # a free prefix: nothing, or whole segments with their dot
        return "[^.]+" if before and after else ".+"

    def match(self, template: str) -> Hit | None:
        regex, spelled = self._compiled
        found = regex.fullmatch(template)
        if not found:
            return None
        readers: dict[str, Value | Reader] = {}
        tests: list[Callable[[Numbers], bool]] = []
        free = list(range(template.count(BLANK)))
        for name, text in found.groupdict().items():
            span = slice(start := template.count(BLANK, 0, found.start(name)), start + text.count(BLANK))
            readers[name] = _reader(capture := self.address.captures[name], name in self.indexed, text, span)
            free = [p for p in free if not span.start <= p < span.stop]
            if capture.choices and BLANK in text:
                tests.append(partial(_is_choice, text, span, capture.choices))
        tests += [partial(_is_number, p, digits) for p, digits in zip(free, spelled, strict=True)]
        return Hit(readers, tuple(tests))

    def render(self, values: dict[str, Value]) -> str:
        """The name that the captures' values spell."""
        out = []
        for part in self.address.parts:
            if isinstance(part, str):
                out.append(part)
            else:
                value = values[part.name]
                if part.choices:
                    value = part.choices[int(value)]
                elif part.name in self.indexed:
                    value = int(value) + part.offset
                out.append(str(value))
        return "".join(out)


def _reader(capture: Capture, indexed: bool, text: str, span: slice) -> Value | Reader:
    """The capture's value where its text is fixed by the template, else a function of a name's numbers."""
    if capture.choices:
        read: Callable[[str], Value] = capture.choices.index
    elif indexed:
        read = lambda digits: int(digits) - capture.offset
    else:
        read = str
    if span.start == span.stop:
        return read(text)
    if text == BLANK:
        return lambda numbers: read(numbers[span.start])
    return lambda numbers: read(_fill(text, numbers[span]))


def _blanked(choice: str, before: str, after: str) -> str:
    """A choice with blanks for the whole segments of it that are numbers, between these neighbours."""
    before, after = (beside if beside in ("", ".") else "x" for beside in (before, after))
    return _NUMBER.sub(BLANK, before + choice + after)[len(before) :].removesuffix(after)


def _is_choice(text: str, span: slice, choices: tuple[str, ...], numbers: Numbers) -> bool:
    return _fill(text, numbers[span]) in choices


def _is_number(at: int, digits: str, numbers: Numbers) -> bool:
    return numbers[at] == digits


def _fill(text: str, numbers: Numbers) -> str:
    pieces = text.split(BLANK)
    return pieces[0] + "".join(n + p for n, p in zip(numbers, pieces[1:], strict=True))


@lru_cache(maxsize=4096)
def patterns(rule: Rule) -> tuple[Pattern, Pattern]:
    """The rule's two sides, compiled."""
    names = {*rule.source.captures, *rule.target.captures}
    indexed = frozenset(n for n in names if rule.indexed(n))
    return Pattern(rule.source, indexed), Pattern(rule.target, indexed)


def hits(rule: Rule, names: Names, *, within: Container[str] = ()) -> Iterator[tuple[str, Hit, list[Row]]]:
    """The rule's source against every template: the template, how to read its captures, and the names that it claims.

    A shared number outside its bound is not the rule's to claim. One that becomes an axis is, and is wrong later; but
    in the templates `within`, which rules share out among themselves, each claims only the numbers in its bound.
    """
    pattern = patterns(rule)[0]
    captures = pattern.address.captures
    shifted = {n for side in (rule.source, rule.target) for n, c in side.captures.items() if c.offset}
    limits = [n for n in captures if rule.indexed(n) and (n in rule.shared and n in rule.bound or n in shifted)]
    for template, rows in names.rows.items():
        hit = pattern.match(template)
        if hit is not None:
            here = [n for n in captures if rule.indexed(n)] if template in within else limits
            if hit.tests or here:
                rows = [r for r in rows if all(t(r[1]) for t in hit.tests) and _inside(hit, rule, here, r[1])]
            if rows and rule.unsettled:
                text = f"{rows[0][0]!r}: rule {rule} needs the size {rule.unsettled}: give a config, or bind it"
                raise AdapterError([Problem(text, (rows[0][0],))])
            if rows:
                yield template, hit, rows


def _inside(hit: Hit, rule: Rule, limits: list[str], numbers: Numbers) -> bool:
    for name, value in zip(limits, hit.values(limits, numbers), strict=True):
        if isinstance(value, int):
            there = rule.target.captures.get(name)
            least = -min(there.offset, 0) if there else 0
            if value < least or name in rule.bound and value not in rule.bound[name]:
                return False
    return True
