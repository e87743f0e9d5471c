"""LoRA of a matrix that holds an expert's gate and up, which a table cuts before another stacks the halves.

W      experts.{e}.gate_and_up_proj.weight [(g i) d]         experts.{e}.{g=up_proj|gate_proj}.weight [i d]
B      experts.{e}.gate_and_up_proj.lora_B.weight [(g i) r]  experts.{e}.{g=up_proj|gate_proj}.lora_B.weight [i r]
A      experts.{e}.gate_and_up_proj.lora_A.weight            the same under both names
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fmoe.layout.entries import Entry, walk
from fmoe.layout.names import Names, hits, patterns
from fmoe.layout.notation import Rule, interned
from fmoe.layout.spelled.address import Address
from fmoe.layout.spelled.alias import Alias
from fmoe.lowrank.derive import ended, merged


@dataclass(frozen=True)
class Pair:
    """The rules of such a matrix's LoRA. a: A under the name of one half; again: the same under the other's."""

    b: Rule
    a: Rule
    again: Rule

    def rules(self, flipped: bool) -> tuple[Rule, ...]:
        """One for each name that there is, in a direction."""
        return (self.b.inverse, self.a.inverse, self.again.inverse) if flipped else (self.b, self.a)

    def hit(self, names: Names, flipped: bool) -> list[str]:
        """Those of the names that these rules are of."""
        return list(dict.fromkeys(n for r in self.rules(flipped) for _, _, rows in hits(r, names) for n in rows.names))

    def seconds(self, names: Names, flipped: bool) -> list[str]:
        """What the second names of matrices A become, or (unflipped) those names."""
        if not flipped:
            return [alias.name for alias in self.aliases(names, flipped)]
        rule, made = self.again.inverse, []
        captures = tuple(rule.source.captures)
        for _, hit, rows in hits(rule, names):
            values = hit.values(captures, rows)
            made += [patterns(self.again)[0].render(dict(zip(captures, v, strict=True))) for v in values]
        return made

    def aliases(self, names: Names, flipped: bool) -> list[Alias]:
        """The second names of matrices A: of those that come out, or (flipped) that are among the names."""
        rule, there, made = self.a.inverse if flipped else self.a, set(names.names), []
        captures = tuple(rule.source.captures)
        for _, hit, rows in hits(rule, names):
            for values in hit.values(captures, rows):
                at = dict(zip(captures, values, strict=True))
                of, name = (patterns(r)[1].render(at) for r in (self.a, self.again))
                made += [Alias(name, of, not flipped)] if not flipped or name in there else []
        return made


def pairs_of(entries: Iterable[Entry]) -> tuple[Pair, ...]:
    """Of every rule of a table that cuts the matrix of one expert into gate and up.

    >>> import fmoe
    >>> rule = fmoe.rule("x.{e}.both.weight [(g i) d]", "x.{e}.{g=up|gate}.weight [i d]")
    >>> pair, = pairs_of(rule.stages[0].entries)
    >>> print(pair.b)
    x.{e}.both.lora_B.weight [(g i) r]  <->  x.{e}.{g=up|gate}.lora_B.weight [i r]
    """
    return tuple(made for entry in walk(entries) if isinstance(entry, Rule) and (made := _pair(entry)))


def _pair(rule: Rule) -> Pair | None:
    first, *rest = rule.source.axes or ((),)
    g = rule.target.captures.get(first[0]) if len(first) == 2 and len(rest) == 1 else None
    if g is None or not g.choices or g.name in rule.source.captures or "e" not in rule.shared:
        return None
    here, there = (ended(side.parts, "", drop=".weight") for side in (rule.source, rule.target))
    bounds = tuple(b for b in rule.bounds if b[0] not in rest[0])
    b = interned(
        Address(ended(here, ".lora_B.weight"), (first, ("r",))),
        Address(ended(there, ".lora_B.weight"), (first[1:], ("r",))),
        bounds,
    )
    halves = (merged(choice if p is g else p for p in there) for choice in g.choices)
    kept = tuple(bound for bound in bounds if bound[0] in rule.shared)
    a, again = (
        interned(Address(ended(here, ".lora_A.weight")), Address(ended(h, ".lora_A.weight")), kept) for h in halves
    )
    return Pair(b, a, again)
