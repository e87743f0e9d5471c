"""Which formula of config fields gives the sizes that were seen: `fmoe.families.formula` says how one is written."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations, combinations_with_replacement, permutations, product
from math import prod

import torch

from fmoe.families.formula import fields, value

Row = tuple[dict[str, int], int]
"""What a config says, each field by its whole name; and the size that follows."""

PARTS = (2, 4, 8, 16)
"""Into how many parts strides and halves cut a number."""


def fitted(mine: Sequence[str], rows: list[Row]) -> str:
    """The simplest formula in these fields that every row agrees with; "" where there is none."""
    return _product(mine, rows) or _sum(mine, rows) or next(_searched(mine[::-1], rows), "")


def at(formula: str, said: dict[str, int]) -> int | None:
    """Its value where fields stand under their whole names; of one that is not said, as of 0."""
    if hit := re.fullmatch(r"(.+) if ((?:l in )?[\w.]+)( is not False)? else (.+)", formula):
        formula = hit[1] if said.get(hit[2], bool(hit[3])) else hit[4]
    for field in sorted(fields(formula), key=len, reverse=True):
        formula = formula.replace(field, str(said.get(field, 0)))
    return value(formula, {})


def _product(mine: Sequence[str], rows: list[Row]) -> str:
    """As of a patch, "3*patch_size*patch_size"."""
    for powers in product(range(3), repeat=len(mine)):
        word = "*".join(f for f, n in zip(mine, powers, strict=True) for _ in range(n))
        values = [prod(said[f] ** n for f, n in zip(mine, powers, strict=True)) for said, _ in rows]
        if word and rows and all(rows[0][1] * v == n * values[0] for v, (_, n) in zip(values, rows, strict=True)):
            times = Fraction(rows[0][1], values[0])
            if times.denominator == 1:
                return f"{times}*{word}" if times != 1 else word
    return ""


def _sum(mine: Sequence[str], rows: list[Row]) -> str:
    """Of products of two, all of them at once."""
    terms = ["*".join(t) for t in ((f,) for f in mine)] + ["*".join(t) for t in combinations(mine, 2)]
    columns = [[prod(said[f] for f in t.split("*")) for said, _ in rows] for t in terms]
    return _solved(terms, columns, rows, least=True)


def _searched(mine: Sequence[str], rows: list[Row]) -> Iterator[str]:
    """With quotients, and what is added to them; of one term, then of two."""
    words = _words(mine)
    columns = {w: column for w in words if None not in (column := _column(w, rows))}
    ones = [1] * len(rows)
    for count in (1, 2):
        for some in combinations(columns, count):
            told = [columns[w] for w in some]
            for extra in ([], ["1"]):
                if found := _solved([*some, *extra], [*told, *([ones] * len(extra))], rows):
                    yield found


def _words(mine: Sequence[str]) -> list[str]:
    cuts = [f"({a}//{c})" for a, c in permutations(mine, 2)]
    cuts += [cut for f in mine for k in PARTS for cut in (f"({f}//{k})", f"(({f}+{k - 1})//{k})")]
    both = [f"({a}*{b}//{c})" for a, b in combinations(mine, 2) for c in (*mine, 2) if c not in (a, b)]
    more = [f"{cut}*{f}" for cut in cuts for f in mine]
    pairs = ["*".join(pair) for pair in combinations_with_replacement(mine, 2)]
    return [*mine, *pairs, *cuts, *both, *more, *(f"{cut}*{cut}" for cut in cuts)]


def _column(word: str, rows: list[Row]) -> list[int | None]:
    return [at(word, said) for said, _ in rows]


def _solved(terms: list[str], columns: list[list[int]], rows: list[Row], least: bool = False) -> str:
    """Whole numbers of each term whose sum is every row's size, as rows tell them apart. least: none is below 0."""
    matrix = torch.tensor(columns, dtype=torch.float64).T
    if len(rows) <= len(terms) or torch.linalg.matrix_rank(matrix) < len(terms):
        return ""
    solved = torch.linalg.lstsq(matrix, torch.tensor([float(n) for _, n in rows], dtype=torch.float64)[:, None])
    times = [round(float(c)) for c in solved.solution.flatten()]
    sums = [sum(c * v for c, v in zip(times, row, strict=True)) for row in zip(*columns, strict=True)]
    if any(s != n for s, (_, n) in zip(sums, rows, strict=True)) or not all(
        c >= 0 or "*" not in t and not least for c, t in zip(times, terms, strict=True)
    ):
        return ""
    spelt = [_times(c, t) for c, t in sorted(zip(times, terms, strict=True), key=lambda ct: ct[0] < 0) if c]
    return "".join(f"+{s}" if not s.startswith("-") else s for s in spelt).removeprefix("+")


def _times(count: int, term: str) -> str:
    return str(count) if term == "1" else term if count == 1 else f"-{term}" if count == -1 else f"{count}*{term}"
