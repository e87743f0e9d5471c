"""Patterns of module names, as quantization_configs have them: thousands, asked for every tensor of a large file."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property

PATTERN = "re:"
"""How a pattern begins that is a regular expression."""


@dataclass(frozen=True)
class Modules:
    """Names of modules, their beginnings and ends, globs, and `re:` with a pattern.

    >>> found = Modules(("mlp.gate", "re:.*head", "*.norm?"))
    >>> found.first("model.layers.0.mlp.gate.weight"), found.first("lm_head.weight"), found.first("a.mlp.up.weight")
    ('mlp.gate', 're:.*head', None)
    >>> found.idle(["model.mlp.gate"])
    ['re:.*head', '*.norm?']
    """

    patterns: tuple[str, ...] = ()

    def first(self, name: str) -> str | None:
        """A pattern that a tensor's module is one of."""
        module = name.removesuffix(".weight")
        found = next((part for part in _sides(module) if part in self._words), None)
        if found is None and self._globs.fullmatch(module):
            found = next(p for p in self._globbed if re.fullmatch(translate(p), module))
        return found or next((p for p, made in self._expressions if made.match(module)), None)

    def idle(self, modules: Collection[str]) -> list[str]:
        """The patterns that none of these modules is one of."""
        sides = {part for module in modules for part in _sides(module)}
        used = {p for p in self._globbed if any(map(re.compile(translate(p)).fullmatch, modules))}
        used |= {p for p, made in self._expressions if any(map(made.match, modules))}
        return [p for p in self.patterns if p not in used and (p.startswith(PATTERN) or p not in sides)]

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(p for p in self.patterns if not p.startswith(PATTERN))

    @cached_property
    def _globbed(self) -> list[str]:
        return [p for p in self.patterns if p in self._words and re.search(r"[*?[]", p)]

    @cached_property
    def _globs(self) -> re.Pattern[str]:
        return re.compile("|".join(map(translate, self._globbed)) or r"(?!)")

    @cached_property
    def _expressions(self) -> list[tuple[str, re.Pattern[str]]]:
        found = (p for p in self.patterns if p.startswith(PATTERN))
        return [(p, re.compile(p.removeprefix(PATTERN))) for p in found]


def _sides(module: str) -> Iterator[str]:
    """A module's name, and all of its beginnings and ends in whole parts."""
    yield module
    at = module.find(".")
    while at >= 0:
        yield module[:at]
        yield module[at + 1 :]
        at = module.find(".", at + 1)
