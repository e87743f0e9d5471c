"""What the sizes of a model's tensors are, by its config: run as a program, this writes fmoe/families/sizes.json.

`known_sizes.py [NAME ...]`. Every class of the zoo is built without memory, with one number of its config after the
other changed, and then two. A dimension that follows from numbers by a formula, exactly, every time, is kept; one that
any other field changes (a list, what is absent) is not. Numbers that are only taken with another are changed with it.
"""

import re
import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

import known_fit
import known_names
import known_where as where
from known_dims import Dims, dims
from known_numbers import KINDS, OPTIONAL, Step, alike, changed, flags, lengths, numbers, turned

import fmoe
from fmoe.families.formula import fields
from fmoe.families.numbered import NUMBERED, by_stack, decoder
from fmoe.families.sizes import PARTS

FILE = Path(fmoe.families.__file__).with_name("sizes.json")
MOST = 4  # numbers in one dimension


class Seen:
    """A class's sizes with each config that was asked for, and how its numbers can be changed.

    kind: a list of what layers are, and what all of them are to be. read: each config is read as from a file, where the
    class may make some numbers of others, and takes fewer of them. flag: one that is turned.
    """

    def __init__(self, name: str, kind: tuple[str, Any] | None = None, read: bool = False, flag: str = ""):
        self.name, self.kind, self.read = name, kind, read
        self.cls, self.config = known_names.base(name)
        if flag:
            self.config = turned(self.config, flag)
        if kind:
            text = known_names.text_of(self.config)
            setattr(text, kind[0], [kind[1]] * len(getattr(text, kind[0])))
        self.config = alike(self.config if not kind else changed(self.config, {}, True) or self.config)
        self.said, self.flags = numbers(self.config) | lengths(self.config), flags(self.config)
        self._seen: dict[tuple[tuple[str, int], ...], Dims | None] = {}
        self.base = self({}) or {}

    @cached_property
    def main(self) -> str:
        return decoder(by_stack(known_names.natives(self.cls, self.config, self.name, True))) if self.base else ""

    @cached_property
    def steps(self) -> dict[str, list[Step]]:
        """What to change to change a number: it alone, or with one that must go with it."""
        found = {f: [s for s in ({f: v + 1}, {f: 2 * v}, {f: 3 * v}) if self(s)] for f, v in self.said.items()}
        stuck = [f for f, steps in found.items() if len(steps) < 2]
        pairs = [*combinations(stuck, 2), *product(stuck, [f for f in self.said if f not in stuck])]
        for f, g in pairs:
            if len(found[f]) < 2 or g in stuck:
                for step in filter(self, ({n: times * self.said[n] for n in (f, g)} for times in (2, 3))):
                    found[f], found[g] = [*found[f], step], [*found[g], step]
        return found

    @cached_property
    def others(self) -> list[tuple[Step, Dims]]:
        """The sizes where anything else is changed, with the numbers there: a flag, a list, what is absent."""
        ways = [c for part in known_names.parts_of(self.config) for c in known_names.varied(self.config, part)]
        ways = [made for c in ways if (made := changed(c, {}, True))] if self.read else ways
        return [(numbers(c, 0) | lengths(c) | flags(c), d) for c in ways if (d := dims(self.name, self.cls, c))]

    def kinds(self) -> Iterator[tuple[str, Any]]:
        """What lists say of layers, here or in the class's own config."""
        for field in KINDS:
            own, theirs = (known_names.text_of(c).to_dict().get(field) for c in (self.config, type(self.config)()))
            words = {*own, *(theirs or ())} if isinstance(own, list) else set()
            strings = words <= {*map(str, words)}
            words = {*where.kinds(type(self.config), field, [*words])} if words and strings else words and {0, 1}
            yield from ((field, word) for word in sorted(words, key=str))

    def __call__(self, values: Step) -> Dims | None:
        key = tuple(sorted(values.items()))
        if key not in self._seen:
            made = changed(self.config, values, self.read)
            self._seen[key] = None if made is None else dims(self.name, self.cls, made)
        return self._seen[key]

    def failing(self, told: str, k: tuple[str, int]) -> list[Step]:
        """What configs say of which a formula is not the size."""
        said = ((n, d[k]) for n, d in self.others if k in d and {*fields(told)} <= {*n, *OPTIONAL})
        return [numbers for numbers, n in said if known_fit.at(told, numbers) not in (n, None)]

    def reads(self, told: str, k: tuple[str, int]) -> bool:
        """Whether it is a size by what a file says, where the class takes one with another number alone."""
        steps = [{f: n} for f in fields(told) if (v := self.said.get(f)) for n in (v + 1, 2 * v)]
        return all(known_fit.at(told, self.said | s) == d[k] for s in steps if (d := self(s)) and k in d)

    def moved(self, k: tuple[str, int], size: int, beside: Step) -> list[str]:
        """The numbers that a size follows, and those that must be changed with them."""
        follows = lambda s: (d := self({**beside, **s})) and d.get(k, size) != size
        moves = [f for f, steps in self.steps.items() if f not in beside and any(map(follows, steps))]
        mine = {*moves, *(g for f in moves for step in self.steps[f] for g in step)}
        # of two that go together the last is taken
        best = lambda f: ("." not in f, f.partition("_")[0] in (k[0].partition("#")[0] or self.main))
        return sorted((f for f in self.said if f in mine), key=best)

    def rows(self, k: tuple[str, int], mine: list[str], beside: Step) -> list[known_fit.Row]:
        """What was seen of a size, with one of these numbers changed, and with two."""
        tries: list[Step] = [{}, *(s for f in mine for s in self.steps[f])]
        pairs = ((f, g) for f, g in combinations(mine, 2))
        tries += [{**s, **t} for f, g in pairs for s in self.steps[f][:2] for t in self.steps[g][:2]]
        found = ((self.said | beside | t, d[k]) for t in tries if (d := self({**beside, **t})) and k in d)
        return list({repr(row): row for row in found}.values())


def formulas(name: str) -> dict[str, list[list[Any]]]:
    """A formula of config fields -> the dimensions that are it: [template, which]."""
    seen = Seen(name)
    again = Seen(name, read=True)
    found = {at: told for at in sorted(seen.base) if (told := read(seen, again, at))}
    for kind in seen.kinds():
        other, word = Seen(name, kind), f"#{kind[0]}={kind[1]}."
        left = [(t, k) for t, k in sorted(other.base) if t.startswith(word) and (t, k) not in found]
        left = [(t, k) for t, k in left if (f"#.{t.removeprefix(word)}", k) not in found and other.main == seen.main]
        again = Seen(name, kind, read=True)
        for at in left:
            found |= {at: told} if (told := read(other, again, at)) else {}
    made: dict[str, list[list[Any]]] = {}
    for (template, k), told in by_layer(found).items():
        if "=" not in template or ("#." + template.partition(".")[2], k) not in found:
            made.setdefault(told, []).append([template, k])
    return made


def by_layer(found: dict[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """The same, with one formula for what each layer of a tower, from the first or second on, has by its own entries.

    >>> found = {("a.0.w", 0): "n[0]", ("a.1.w", 0): "n[1]*n[0]", ("a.2.w", 0): "n[2]*n[1]", ("w", 0): "2*n[2]"}
    >>> by_layer(found)
    {('w', 0): '2*n[l]', ('a.#.w', 0): 'n[l]*n[l-1] if l else n[l]'}
    """
    apart: dict[tuple[str, int], dict[int, str]] = {}
    for (template, k), told in found.items():
        hit = NUMBERED.match(template)
        if hit and "#" not in hit[1] and "[" in told:
            own = lambda at: {hit[2]: "[l]", str(int(hit[2]) - 1): "[l-1]"}.get(at[1], at[0])  # noqa: B023
            apart.setdefault((f"{hit[1]}.#.{hit[3]}", k), {})[int(hit[2])] = re.sub(r"\[(\d+)\]", own, told)
    made, lists = {}, dict[str, int]()
    for at, told in apart.items():
        first, later = told.get(0, ""), {*told.values()} - {told.get(0)}
        if len(told) > 2 and first and len(later) < 2 and not re.search(r"\[\d", first.join(later)):
            made[at] = f"{later.pop()} if l else {first}" if later else first
            lists |= {field: max(told) for field in re.findall(r"([\w.]+)\[l", made[at])}
    merged = {(f"{s}.{l}.{rest}", k) for (t, k) in made for s, _, rest in [t.partition(".#.")] for l in apart[t, k]}
    last = lambda hit: f"{hit[1]}[l]" if lists.get(hit[1]) == int(hit[2]) else hit[0]
    left = {at: told for at, told in found.items() if at not in merged}
    rest = {
        at: told if re.search(r"#|\.\d", at[0]) else re.sub(r"([\w.]+)\[(\d+)\]", last, told)
        for at, told in left.items()
    }
    return rest | made


def read(seen: Seen, again: Seen, k: tuple[str, int]) -> str:
    """A dimension's formula that is right by what a file says. again: the same class as it reads files."""
    found = formula(seen, k)
    return found if not found or again.reads(found, k) else formula(again, k) if k in again.base else ""


def formula(seen: Seen, k: tuple[str, int]) -> str:
    """The formula of a dimension, if it is fixed by few numbers, and perhaps a flag, and by nothing else."""
    told = unflagged(seen, k)
    return flagged(seen, k, told) if told and seen.failing(told, k) else told


def unflagged(seen: Seen, k: tuple[str, int]) -> str:
    """The formula of a dimension while no flag is turned."""
    mine = seen.moved(k, seen.base[k], {})
    told = fitted(seen, k, mine) if 0 < len(mine) <= MOST else ""
    return told and at_zero(seen, k, told)


def flagged(seen: Seen, k: tuple[str, int], told: str) -> str:
    """The formula that a flag decides, where one that is turned is all that a formula fails of; else ""."""
    failing = seen.failing(told, k)
    for flag, on in seen.flags.items():
        mine = all(numbers.get(flag) == (not on) for numbers in failing)
        other = Seen(seen.name, seen.kind, seen.read, flag) if mine else seen
        if mine and k in other.base and (turn := unflagged(other, k)):
            test = flag + " is not False" * (flags(seen.cls.config_class()).get(flag) is True)
            both = f"{told if on else turn} if {test} else {turn if on else told}"
            return "" if seen.failing(both, k) else both
    return ""


def fitted(seen: Seen, k: tuple[str, int], mine: list[str]) -> str:
    """The formula of a dimension in these fields. A head's width that no field says is taken from where one may."""
    rows = seen.rows(k, mine, {})
    told = known_fit.fitted(mine, rows)
    for cut in re.findall(r"\(([\w.]*?)\w+//[a-z_][\w.]*\)", told):
        width = next((f"{p}.head_dim" for p in PARTS if cut.startswith(p)), "head_dim")
        with_width = seen({width: 14}) if width not in seen.said else None
        if with_width and with_width.get(k) != seen.base[k]:
            told = re.sub(r"\((\S+?//\S+?)\)", rf"({width} or \1)", told)
            if known_fit.at(told, seen.said | {width: 14}) != with_width.get(k):
                return ""
    return told


def at_zero(seen: Seen, k: tuple[str, int], told: str) -> str:
    """The formula with what stands for a field of it, or for all, that is 0: `or None` for what nobody knows."""
    for f in fields(told):
        none = None if known_fit.at(told, seen.said | {f: 0}) else seen({f: 0})
        if not none or not (size := none.get(k)):
            continue
        others = seen.moved(k, size, {f: 0})
        rows = seen.rows(k, others, {f: 0})
        cuts = (told.replace(f, f"({f} or {a}//{b})") for a, b in permutations({*others, *fields(told)} - {f}, 2))
        fits = lambda cut: all(known_fit.at(cut, said) == n for said, n in rows)  # noqa: B023
        whole = known_fit.fitted(others, rows) if len(others) == 1 else ""
        other = next(filter(fits, sorted(cuts)), "") or f"{whole or None}"
        if numbers(seen.cls.config_class()).get(f):  # left out, it is what its class says
            return f"{told} if {f} is not False else {other}"
        return other if f"({f} or " in other else f"{told} or {other}"
    return told


if __name__ == "__main__":
    known_names.rewrite(FILE, lambda name, was: formulas(name), sys.argv[1:])
