"""The stage that is a table of entries: planned, resolved, and turned round as one."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fmoe.folding import short, told
from fmoe.layout.claims import claim
from fmoe.layout.entries import Drop, Either, Entry, Keep, bind, settle, walk
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names, hits, patterns
from fmoe.layout.notation import Rule
from fmoe.layout.plan import TablePlan, plan_table
from fmoe.layout.proved.suspects import of_experts


@dataclass(frozen=True)
class Table:
    """Entries side by side: every name is claimed by exactly one of them."""

    entries: tuple[Entry, ...] = ()
    guards: tuple[bool, bool] = field(default=(True, True), compare=False, repr=False, kw_only=True)
    """Whether a name like an expert's must be spelled to be kept: on the way there, on the way back (`planning.py`)."""
    heard: bool = field(default=True, compare=False, repr=False, kw_only=True)
    """Whether an entry that matches no name is told (`proved/idle.py`): of rules of one's own, not of a family's."""

    @property
    def inverse(self) -> "Table":
        return Table(tuple(e.inverse for e in self.entries), heard=self.heard)

    @property
    def has_experts(self) -> bool:
        """Whether a rule for experts is among its entries, those of all options included."""
        return any(map(of_experts, self.rules()))

    def rules(self) -> list[Rule]:
        """Its rules, those of all options and bundles included."""
        return [e for e in walk(self.entries) if isinstance(e, Rule)]

    def guarded(self, there: bool, back: bool) -> "Table":
        return replace(self, guards=(there, back))

    @property
    def lossless(self) -> bool:
        return not any(isinstance(e, Drop) and not e.refused for e in walk(self.entries))

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> TablePlan:
        return plan_table(self.entries, specs, names, window, local, self.guards)

    def resolve(self, names: Names, *, default: bool) -> "Table":
        return Table(settle(self.entries, names, default=default), heard=self.heard)

    def rename(self, names: Names) -> list[str]:
        claims = claim(self.entries, names)
        made = list(claims.pairs.values())
        for i, shared in claims.groups:
            rule = claims.rules[i]
            first = dict.fromkeys(rule.target.captures, 0) | dict(zip(rule.shared, shared, strict=True))
            made.append(patterns(rule)[1].render(first))
        return list(dict.fromkeys(made))

    def claimed(self, names: Names) -> list[str]:
        """The names that its rules claim, what it merely keeps left out."""
        claims = claim(tuple(e for e in settle(self.entries, names, default=True) if not isinstance(e, Keep)), names)
        stacked = [name for found in claims.groups.values() for name in found.values()]
        return stacked + list(claims.pairs) + claims.dropped + [a.name for a, there in claims.aliases.items() if there]

    def kept(self, names: Names) -> dict[str, bool]:
        """The names that its keeps fit, and whether one of them spells any of the name: `{rest}` alone does not."""
        keeps = [e for e in settle(self.entries, names, default=True) if isinstance(e, Keep)]
        keeps.sort(key=lambda keep: keep.spelled.strip(".") != "")
        return {n: k.spelled.strip(".") != "" for k in keeps for _, _, rows in hits(k.rule, names) for n in rows.names}

    def choose(self, choices: Mapping[str, Any]) -> "Table":
        made: list[Entry] = []
        for entry in self.entries:
            label = choices.get(entry.name) if isinstance(entry, Either) else None
            if isinstance(entry, Either) and label is None and choices.get("quantization"):
                label = entry.quantized
            made += entry.choose(label) if isinstance(entry, Either) and label is not None else (entry,)
        return Table(tuple(made), heard=self.heard)

    def bind(self, sizes: Mapping[str, int | Iterable[int]]) -> "Table":
        """The same table with the letters of its rules bounded: an int is a size, an iterable the values allowed."""
        return Table(tuple(bind(e, sizes) for e in self.entries), heard=self.heard)

    def counted(self) -> "Table":
        """The same without renames of what comes after all experts, where nobody says how many those are."""
        return replace(self, entries=tuple(_counted(self.entries)))

    def choices(self) -> dict[str, tuple[str, ...]]:
        return {e.name: tuple(label for label, _ in e.options) for e in self.entries if isinstance(e, Either)}

    def axes(self) -> frozenset[str]:
        return frozenset(a for r in self.rules() for side in (r.source, r.target) for a in side.atoms if "|" not in a)

    def __str__(self) -> str:
        return "\n".join(map(short, told(map(str, self.entries))))


def _counted(entries: Iterable[Entry]) -> Iterator[Entry]:
    for entry in entries:
        if isinstance(entry, Either):
            options = tuple((label, tuple(_counted(option))) for label, option in entry.options)
            yield entry if options == entry.options else replace(entry, options=options)
        elif not (isinstance(entry, Rule) and entry.unsettled == "E" and entry.source.axes is None):
            yield entry
