"""Units: which names depend on each other through stages in a row; and the one order in which everything comes out."""

from collections.abc import Iterable, Iterator, Sequence, Set

from fmoe.layout.stage import StagePlan

Unit = tuple[list[str], list[str]]  # sources, targets


def joined(stages: Sequence[StagePlan], used: Sequence[Set[str] | dict[str, None] | None]) -> Iterator[Unit]:
    """Units of several stages: those of each are one where they share a name between them.

    used: of each stage, the targets that are needed; None: all.
    """
    if len(stages) == 1:
        yield from stages[0].units()
        return
    parent: list[int] = []
    sources: dict[int, list[str]] = {}
    owner: dict[str, int] = {}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for k, stage in enumerate(stages):
        need, made = used[k], dict[str, int]()
        for names, targets in stage.units():
            if need is not None and all(t not in need for t in targets):
                continue
            mine = {i if parent[i] == i else root(i) for n in names if (i := owner.get(n, -1)) >= 0} if k else None
            if mine:
                first = min(mine)
                for other in mine:
                    parent[other] = first
            else:  # the first stage's, or an empty range of what names count
                first = len(parent)
                parent.append(first)
                sources[first] = [] if k else list(names)
            for t in targets:
                made[t] = first
        owner = made
    units: dict[int, Unit] = {i: ([], []) for i, above in enumerate(parent) if i == above}
    for i, names in sources.items():
        units[i if parent[i] == i else root(i)][0].extend(names)
    for name, i in owner.items():
        units[i if parent[i] == i else root(i)][1].append(name)
    yield from units.values()


def in_order(units: Iterable[Unit]) -> list[Unit]:
    """By the first target's name (of a unit with none, the first source's)."""
    return sorted(units, key=lambda unit: natural((unit[1] or unit[0] or [""])[0]))


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers between dots by value, and before them text.

    >>> sorted(["l.10.b", "l.2.b", "l.a", "k"], key=natural)
    ['k', 'l.a', 'l.2.b', 'l.10.b']
    """
    return [(len(part), part) if part.isdecimal() else (0, part) for part in name.split(".")]
