"""What stands in a table beside rules: what is kept, dropped, aliased, stored in one of several ways, or only together.

Each entry is frozen and has an inverse. Entries side by side are a table: one stage of an adapter.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from fmoe.folding import meant
from fmoe.layout.names import Names, hits
from fmoe.layout.notation import Rule, interned
from fmoe.layout.spelled.address import Address
from fmoe.layout.spelled.alias import Alias, Copies
from fmoe.types import AdapterError, Problem, brief


@dataclass(frozen=True)
class Keep:
    """Names that no rule claims pass through unchanged, where the pattern matches.

    sure: whatever they look like, for a stage that is not the only one to claim them.
    """

    pattern: Address
    sure: bool = False

    @property
    def inverse(self) -> "Keep":
        return self

    @cached_property
    def rule(self) -> Rule:
        """x <-> x: whose names these are."""
        return interned(self.pattern, self.pattern)

    @cached_property
    def spelled(self) -> str:
        """The text that the pattern spells out, its choices included; every capture is a dot."""
        return "".join(p if isinstance(p, str) else ".".join(["", *p.choices, ""]) for p in self.pattern.parts)

    @cached_property
    def spells(self) -> bool:
        """Whether the pattern has text of its own, other than the end of names after a free beginning."""
        first, *others = self.pattern.parts
        texts = [isinstance(p, str) or bool(p.choices) for p in others[:-1]]
        return isinstance(first, str) or bool(first.choices) or any(texts)

    def __str__(self) -> str:
        return f"keep {self.pattern}"


@dataclass(frozen=True)
class Drop:
    """HF tensors that have no native counterpart, and why. Nothing brings them back: the adapter is not lossless.

    refused: they are a problem where they are found; nothing is dropped.
    """

    pattern: Address
    because: str
    flipped: bool = False
    refused: bool = False

    @cached_property
    def inverse(self) -> "Drop":
        return replace(self, flipped=not self.flipped)

    @cached_property
    def rule(self) -> Rule:
        """x <-> x: whose names these are."""
        return interned(self.pattern, self.pattern)

    def __str__(self) -> str:
        return f"{'refuse' if self.refused else 'drop'} {self.pattern}   because {self.because}"


@dataclass(frozen=True)
class Together:
    """Rules whose HF tensors come together: where one is there, for some layer, all must be."""

    rules: tuple[Rule, ...]
    flipped: bool = False

    @cached_property
    def inverse(self) -> "Together":
        return Together(tuple(r.inverse for r in self.rules), not self.flipped)

    def __str__(self) -> str:
        return "\n".join(map(str, self.rules))


@dataclass(frozen=True)
class Either:
    """One family, stored in one of several ways; the first is the published one.

    quantized: the option in which quantised tensors are published, where that is another.
    """

    name: str
    options: tuple[tuple[str, tuple["Entry", ...]], ...]
    quantized: str | None = None

    def __post_init__(self) -> None:
        labels = [label for label, _ in self.options]
        if not labels or self.quantized not in (None, *labels):
            quantized = f", quantized={self.quantized!r}" * bool(labels)
            raise AdapterError(f"either {self.name!r}: options {labels}{quantized}, expected one of some options")

    @cached_property
    def inverse(self) -> "Either":
        options = tuple((label, tuple(e.inverse for e in entries)) for label, entries in self.options)
        return replace(self, options=options)

    def choose(self, label: str) -> tuple["Entry", ...]:
        """The entries of one option. Raises AdapterError for a label that there is not."""
        for name, entries in self.options:
            if name == label:
                return entries
        known = [name for name, _ in self.options]
        told = f"{', '.join(map(repr, known))}{meant(label, known)}"
        raise AdapterError(f"{self.name}={brief(label)}: expected one of {told}")

    def __str__(self) -> str:
        lines = []
        for i, (label, entries) in enumerate(self.options):
            lines.append(f"{self.name} = {label}{' (published)' if not i else ''}:")
            lines += ["    " + line for e in entries for line in str(e).split("\n")] or ["    nothing"]
        return "\n".join(lines)


Entry = Rule | Keep | Drop | Alias | Copies | Together | Either


def rules_of(entries: Iterable[Entry]) -> list[Rule]:
    """Every rule, with those that stand together; none of an open choice."""
    return [r for e in entries for r in (e.rules if isinstance(e, Together) else (e,)) if isinstance(r, Rule)]


def settle(entries: Iterable[Entry], names: Names, *, default: bool) -> tuple[Entry, ...]:
    """Open choices settled by the names that are there. With no evidence: published if `default`, else still open.

    Of options with the same names, by the sizes that the rules are bound to, where names come with shapes.
    Raises AdapterError where names speak for two options.
    """
    settled: list[Entry] = []
    for entry in entries:
        chosen = _evident(entry, names) if isinstance(entry, Either) else None
        if chosen is None and default and isinstance(entry, Either):
            chosen = entry.options[0][0]
        settled += entry.choose(chosen) if isinstance(entry, Either) and chosen is not None else (entry,)
    return tuple(settled)


def walk(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Every entry, those of all options and bundles included."""
    for entry in entries:
        yield entry
        if isinstance(entry, Either):
            yield from walk(e for _, option in entry.options for e in option)
        elif isinstance(entry, Together):
            yield from entry.rules


def bind(entry: Entry, sizes: Mapping[str, int | Iterable[int]]) -> Entry:
    """The entry with the letters of its rules bounded."""
    if isinstance(entry, Rule):
        return entry.bind(sizes)
    if isinstance(entry, Copies):
        return replace(entry, bounds=entry.copy.bind(sizes).bounds)
    if isinstance(entry, Together):
        return replace(entry, rules=tuple(r.bind(sizes) for r in entry.rules))
    if isinstance(entry, Either):
        return replace(entry, options=tuple((n, tuple(bind(e, sizes) for e in o)) for n, o in entry.options))
    return entry


def _evident(either: Either, names: Names) -> str | None:
    """The option that the names speak for: of those that claim any, the one whose claims include all others'."""
    claims = {label: _claims(entries, names) for label, entries in either.options}
    found = {label: claim for label, claim in claims.items() if claim}
    if not found:
        return None
    scaled = any("_scale" in template.rpartition(".")[2] for claim in found.values() for template in claim)
    best = max(found, key=lambda label: (len(found[label]), scaled and label == either.quantized))
    for label, claim in found.items():
        if not claim.keys() <= found[best].keys():
            keys = (next(iter(claim.values())), next(iter(found[best].values())))
            text = f"mixed layouts: {keys[0]!r} is {either.name} {label!r}, {keys[1]!r} is {either.name} {best!r}"
            raise AdapterError([Problem(f"{text}; a checkpoint has one", keys)])
    rivals = [label for label, claim in found.items() if claim.keys() == found[best].keys()]
    if len(rivals) == 1 or not names.specs:
        return best
    return max(rivals, key=lambda label: (_fitting(either.choose(label), names), label == best))


def _fitting(entries: Iterable[Entry], names: Names) -> int:
    """How many of the tensors that these rules claim have the sizes that they are bound to."""
    pairs = ((rule, name) for rule in walk(entries) if isinstance(rule, Rule)
             for _, _, rows in hits(rule, names) for name in rows.names)  # fmt: skip
    return sum(rule.fits(names.specs[name].shape) for rule, name in pairs if name in names.specs)


def _claims(entries: Iterable[Entry], names: Names) -> dict[str, str]:
    """Every template that one of the entries claims, with a name: enough to compare options by."""
    found: dict[str, str] = {}
    for entry in walk(entries):
        if isinstance(entry, Rule):
            found |= {template: rows.names[0] for template, _, rows in hits(entry, names)}
        elif isinstance(entry, Alias) and not entry.flipped and entry.name in names:
            found[entry.name] = entry.name
        elif isinstance(entry, Drop | Copies) and not entry.flipped:
            rule = entry.rule if isinstance(entry, Drop) else entry.copy
            found |= {template: rows.names[0] for template, _, rows in hits(rule, names)}
    return found
