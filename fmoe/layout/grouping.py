"""From the names and shapes that one rule claims to a `Group`: the second half of planning a table, and of its proof.

Checked here: the sources are the whole grid of stacked captures, agree in shape and dtype, and fit the axes' sizes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from math import prod
from operator import itemgetter
from typing import cast

from fmoe.folding import short
from fmoe.layout.axes import Group
from fmoe.layout.claims import Shared, some
from fmoe.layout.names import patterns
from fmoe.layout.notation import Rule
from fmoe.layout.templates import Value
from fmoe.types import Problem, TensorSpec

Specs = Mapping[str, TensorSpec]
Window = Mapping[str, range]
Found = Mapping[tuple[Value, ...], str]
_MOST_ABSENT = 1000


class Wrong(Exception):
    """The group cannot be built: `problem` says why."""

    def __init__(self, text: str, keys: tuple[str, ...]):
        self.problem = Problem(text, keys)


@dataclass(frozen=True)
class Claimed:
    """What a rule claims at one value of its shared captures: `found`, coordinates of stacked captures to names."""

    rule: Rule
    shared: Shared
    found: Found
    specs: Specs
    window: Window
    local: frozenset[str]

    @cached_property
    def given(self) -> dict[str, int]:
        """The full sizes known before any shape is read: choices, bounds, and the count of stacked names."""
        sizes = {a: r.stop for a, r in self.window.items() if a in self.local}
        for i, name in enumerate(self.rule.stacked):
            sizes[name] = int(max(map(itemgetter(i), self.found))) + 1
        sizes |= {a: len(bound) for a, bound in self.rule.bound.items() if a in self._axes}
        for side in (self.rule.source, self.rule.target):
            sizes |= {n: len(c.choices) for n, c in side.captures.items() if c.choices}
        return {a: n for a, n in sizes.items() if a in self._axes and a not in self.rule.ragged.values()}

    @cached_property
    def _axes(self) -> set[str]:
        return {*self.rule.source.atoms, *self.rule.target.atoms}

    @cached_property
    def inside(self) -> tuple[Sequence[tuple[Value, ...]], list[str]]:
        """What is found in the window, in the order of the grid: coordinates and names."""
        self._check_window({a: self.given[a] for a in self.rule.stacked if a in self.given})
        spans = [self._span(n) for n in self.rule.stacked]
        if prod(map(len, spans)) > len(self.found) + _MOST_ABSENT:  # do not count up to a number gone wild
            near = product(*(span[: len(self.found) + 2] for span in spans))
            self._holes([at for at in islice(near, _MOST_ABSENT) if at not in self.found])
        grid = list(product(*spans))
        names = list(map(self.found.get, grid))
        lost = [at for at, name in zip(grid, names, strict=True) if name is None] if None in names else []
        if lost or len(self.found) > len(grid) and not all(map(self._fits, self.found)):
            self._holes(lost)
        return grid, cast(list[str], names)

    def _span(self, name: str) -> range:
        if name in self.rule.ragged.values():
            return range(len(self.rule.source.captures[name].choices))
        return self.window.get(name, range(self.given[name]))

    def _fits(self, at: tuple[Value, ...]) -> bool:
        sizes = [self.given.get(n, 1 << 62) for n in self.rule.stacked]
        return all(0 <= int(i) < n for i, n in zip(at, sizes, strict=True))

    def _holes(self, lost: list[tuple[int, ...]]) -> None:
        pattern = patterns(self.rule)[0]
        names = dict(zip(self.rule.shared, self.shared, strict=True))
        absent = [pattern.render(names | dict(zip(self.rule.stacked, at, strict=True))) for at in lost]
        strays = [name for at, name in self.found.items() if not self._fits(at)]
        expected = ", ".join(f"{n} < {self.given[n]}" for n in self.rule.stacked if n in self.given)
        text = [f"missing {some(absent)}"] if absent else []
        text += [f"out of range {some(strays)}"] if strays else []
        if not expected:  # literal choices alone: what is there demands all of them
            strays.append(next(iter(self.found.values())))
            expected = f"all of its parts, since {strays[-1]!r} is there"
        loose = [n for n in self.rule.stacked if n not in self.rule.bound and not self.rule.source.captures[n].choices]
        for name in loose:
            i = self.rule.stacked.index(name)
            strays.append(max(self.found.items(), key=lambda item: int(item[0][i]))[1])
            expected += f", since {strays[-1]!r} is there"
        fix = ". Fix: give it all" + self._there(lost) if absent else ""
        raise Wrong(f"{'; '.join(text)}: expected {expected} (rule {short(str(self.rule))}){fix}", (*absent, *strays))

    def _there(self, lost: list[tuple[int, ...]]) -> str:
        """The range of experts that are there whole, if they are one: it can be asked for."""
        if "e" not in self.rule.stacked or "e" in self.window:
            return ""
        i = self.rule.stacked.index("e")
        held = sorted({int(at[i]) for at in self.found} - {at[i] for at in lost})
        one = held and len(held) == held[-1] + 1 - held[0]
        return f", or ask for what is there, e=range({held[0]}, {held[-1] + 1})" if one else ""

    def group(self) -> Group:
        """The group. Raises Wrong with the keys that are missing, out of range, or do not fit."""
        grid, names = self.inside
        if not names:  # an empty window: sizes from what it leaves out
            grid, names = list(self.found), list(self.found.values())
        self._alike(names)
        full = self._joined() | self.given
        lengths: dict[str, dict[str, int]] = {p: {} for p in self.rule.ragged.values()}
        for at, name in list(zip(grid, names, strict=True))[: None if lengths else 1]:
            part = {
                p: self.rule.source.captures[p].choices[int(at[i])]
                for i, p in enumerate(self.rule.stacked)
                if p in lengths
            }
            self._solve(name, full, lengths, part)
        self._check_window(full)
        parts = {p: self._lay(p, found, full, names[0]) for p, found in lengths.items()}
        shared = dict(zip(self.rule.shared, self.shared, strict=True))
        window = {a: r for a, r in self.window.items() if a in full}
        dtype = self.specs[names[0]].dtype
        return Group(self.rule, shared, full, dtype, self.found, parts, window, self.local & full.keys())

    def _joined(self) -> dict[str, int]:
        """The length of a ragged axis all of whose parts are bounded."""
        said = {p: [self.rule.bound.get(label) for label in a.split("|")] for a, p in self.rule.ragged.items()}
        return {p: sum(len(b) for b in bounds if b is not None) for p, bounds in said.items() if None not in bounds}

    def _alike(self, names: list[str]) -> None:
        """One shape and dtype: those that the axes' sizes say, where they do, else those of most."""
        every = [self.specs[n] for n in names]
        if every.count(every[0]) == len(every):
            return
        specs = dict(zip(names, every, strict=True))
        ragged = not self.rule.ragged.keys().isdisjoint(self.rule.target.atoms)
        seen = Counter((None if ragged else spec.shape, spec.dtype) for spec in specs.values())
        if len(seen) == 1:
            return
        (usual, dtype), _ = seen.most_common(1)[0]
        shape = None if ragged else self._expected() or usual
        odd = [n for n, spec in specs.items() if spec.dtype != dtype or shape is not None and spec.shape != shape]
        odd = odd if len(odd) < len(specs) / 2 or shape != usual else list(specs)
        told = ", ".join(f"{n!r} {list(specs[n].shape)} {specs[n].dtype}" for n in odd[:8])
        wanted = f"{'' if shape is None else list(shape)} {dtype}"
        text = f"one stack, several shapes or dtypes: {told}; of {len(specs)}, {len(specs) - len(odd)} are {wanted}"
        dtypes = {d for _, d in seen}
        numbers = all(d.is_floating_point and d.itemsize > 1 for d in dtypes)  # and no codes
        cast = f". Fix: cast to {dtype if len(odd) < len(specs) else 'one dtype'}" * (numbers and len(dtypes) > 1)
        fix = next(filter(None, (_turned(specs[n].shape, shape or ()) for n in odd)), cast)
        raise Wrong(f"{text} (rule {short(str(self.rule))}){fix}", tuple(odd))

    def _expected(self) -> tuple[int, ...] | None:
        """The shape that bounds and choices say, where they say all of it."""
        dims = self.rule.source.axes or ()
        if not all(a == "1" or a in self.given and a in self.rule.bound for dim in dims for a in dim):
            return None
        return tuple(prod(self._held(a, self.given) for a in dim if a != "1") for dim in dims)

    def _solve(
        self, name: str, full: dict[str, int], lengths: dict[str, dict[str, int]], part: Mapping[str, str]
    ) -> None:
        """Sizes of the axes still unknown, from one tensor's shape; `part`: which part of a ragged axis it is."""
        shape, dims = tuple(self.specs[name].shape), self.rule.source.axes or ()
        if len(shape) != len(dims):
            raise self._misfit(name, full)
        for size, dim in zip(shape, dims, strict=True):
            atoms = [self.rule.ragged.get(a, a) for a in dim if a != "1"]
            sized = {a: len(self.rule.bound[part[a]]) for a in atoms if part.get(a) in self.rule.bound}
            for axis, length in sized.items():
                lengths[axis][part[axis]] = length
            known = prod(self._held(a, full) for a in atoms if a in full and a not in part) * prod(sized.values())
            unknown = [a for a in atoms if a not in sized and (a not in full or a in part)]
            if len(unknown) > 1:
                told = f"the sizes of {', '.join(unknown)} in {self.rule} are unknown: bind all but one"
                raise Wrong(f"{name!r}: {told}, as rule(..., {'g' if 'g' in unknown else unknown[-1]}=2)", (name,))
            if (size % known if known else size) or not unknown and size != known:
                raise self._misfit(name, full)
            for axis in unknown:
                if axis in part:
                    lengths[axis][part[axis]] = size // known if known else 0
                else:
                    full[axis] = size // known if known else 0

    def _held(self, axis: str, full: Mapping[str, int]) -> int:
        return len(self.window[axis]) if axis in self.local else full[axis]

    def _misfit(self, name: str, full: Mapping[str, int]) -> Wrong:
        def show(dim: tuple[str, ...]) -> str:
            sizes = [self._held(a, full) if a in full else None for a in dim if a != "1"]
            return "?" if None in sizes else str(prod(n for n in sizes if n is not None))

        dims = [show(dim) for dim in self.rule.source.axes or ()]
        same = [n for n in self.found.values() if self.specs[n].shape == self.specs[name].shape]
        rule = short(str(self.rule))
        text = f"{some(same)}: shape {list(self.specs[name].shape)}, expected [{', '.join(dims)}] (rule {rule})"
        return Wrong(text + _turned(self.specs[name].shape, dims), tuple(same))

    def _check_window(self, full: Mapping[str, int]) -> None:
        for axis, asked in self.window.items():
            if axis in full and not (0 <= asked.start <= asked.stop <= full[axis] and asked.step == 1):
                names = tuple(self.found.values())[:8]
                raise Wrong(f"{axis}={asked}: expected a range within 0..{full[axis]}", names)

    def _lay(self, axis: str, lengths: dict[str, int], full: dict[str, int], name: str) -> tuple[range, ...]:
        """Where each part of a ragged axis lies, in the order in which the composite lists the parts."""
        labels = next(tuple(a.split("|")) for a, p in self.rule.ragged.items() if p == axis)
        bound = {a: len(r) for a, r in self.rule.bound.items() if a in labels}
        wrong = [a for a in lengths if bound.get(a, lengths[a]) != lengths[a]]
        sizes = bound | lengths
        open_ = [a for a in labels if a not in sizes]
        if len(open_) == 1 and axis in full:
            sizes[open_[0]] = full[axis] - sum(sizes.values())
        total = sum(sizes.values())
        if wrong or len(sizes) < len(labels) or min(sizes.values()) < 0 or full.setdefault(axis, total) != total:
            found = {**lengths, **({axis: full[axis]} if axis in full else {})}
            raise Wrong(f"{name!r}: parts {found} do not fit {bound or 'unbound parts'} of {self.rule}", (name,))
        at = [0]
        for label in labels:
            at.append(at[-1] + sizes[label])
        place = {label: range(at[i], at[i + 1]) for i, label in enumerate(labels)}
        captures = self.rule.source.captures | self.rule.target.captures
        return tuple(place[c] for c in captures[axis].choices)


def _turned(found: Sequence[int], expected: Sequence[object]) -> str:
    """What to do with a matrix, or a stack of them, that is transposed; nothing of another.

    >>> _turned((8, 3, 4), ["8", "4", "3"])
    '. Fix: transpose: its last two dimensions are the other way round'
    """
    other = [str(n) for n in (*found[:-2], *found[:-3:-1])]
    turned = len(found) > 1 and other == [str(n) for n in expected] and found[-1] != found[-2]
    return ". Fix: transpose: its last two dimensions are the other way round" * turned
