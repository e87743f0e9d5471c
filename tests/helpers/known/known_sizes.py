"""What the sizes of a model's tensors are, by its config: run as a program, this writes fmoe/families/sizes.json.

`known_sizes.py [NAME ...]`. Every class of the zoo is built without memory, with one number of its config after the
other changed, and then two. A dimension that follows as sums of products of numbers, exactly, every time, is kept;
one that any other field changes (a flag, a list, what is absent) is not.
"""

import copy
import json
import sys
from collections import defaultdict
from fractions import Fraction
from itertools import combinations, permutations, product
from math import prod
from pathlib import Path
from typing import Any

import hf
import hf_zoo as zoo
import known_names
import known_where as where
import torch
import transformers

import fmoe
from fmoe.families.known import NUMBERED, by_stack, decoder

FILE = Path(fmoe.families.__file__).with_name("sizes.json")
Dims = dict[tuple[str, int], int]
MOST = 4  # numbers in one dimension
KINDS = "layer_types"


def dims(name: str, cls: Any, config: Any) -> Dims | None:
    """(template of a native name, dimension) -> its size; None: there is no such model.

    A stack has as many layers as its last one's number says: (template of its layers, -1). Where what a list says of
    a layer decides, as "layer_types", the template names it: "#layer_types=full_attention.self_attn.q_proj.weight".
    """
    try:
        specs = known_names.sized(cls, config, name, True)
    except Exception:  # Transformers builds no such model
        return None
    stacks = by_stack(specs)
    main = decoder(stacks)
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    kinds = known_names.text_of(config).to_dict().get(KINDS) or ()
    for native, spec in specs.items():
        hit = NUMBERED.match(native)
        if ".experts." in native:
            continue
        for k, n in enumerate(spec.shape):
            found[f"{'' if hit[1] == main else hit[1] + '.'}#.{hit[3]}" if hit else native, k].add(n)
            if hit and hit[1] == main and int(hit[2]) < len(kinds):
                found[f"#{KINDS}={kinds[int(hit[2])]}.{hit[3]}", k].add(n)
    both = config.is_encoder_decoder
    counts = {(f"{s}.#", -1): max(layers) + 1 for s, layers in stacks.items() if s and (s != main or both)}
    return {at: sizes.pop() for at, sizes in found.items() if len(sizes) == 1} | counts


def changed(config: Any, values: dict[str, int]) -> Any:
    made = copy.deepcopy(config)
    try:
        for field, value in values.items():
            part, _, name = field.rpartition(".")
            setattr(getattr(made, part) if part else known_names.text_of(made), name, value)
    except Exception:  # the config's own checks
        return None
    return made


def formulas(name: str) -> dict[str, list[list[Any]]]:
    """A sum of products of config fields, as "2*a*b+c", or "a*b/c" -> the dimensions that are it: [template, which]."""
    cls, config = known_names.base(name)
    said = where.flat(config.to_dict(), known_names.text_of(config).to_dict())
    text = {n: v for n, v in said.items() if type(v) is int and v > 0}
    seen: dict[tuple[tuple[str, int], ...], Dims | None] = {}

    def at(**values: int) -> Dims | None:
        key = tuple(sorted(values.items()))
        if key not in seen:
            made = changed(config, values)
            seen[key] = None if made is None else dims(name, cls, made)
        return seen[key]

    base = at() or {}
    ways = (c for part in known_names.parts_of(config) for c in known_names.varied(config, part))
    flags = [c for c in ways if not counted(text, where.flat(c.to_dict(), known_names.text_of(c).to_dict()))]
    others = [d for other in flags if (d := dims(name, cls, other))]
    fixed = {k: n for k, n in base.items() if all(d.get(k, n) == n for d in others)}
    steps = {f: [v + 1, 2 * v] for f, v in text.items()}
    found: dict[str, list[list[Any]]] = {}
    for (template, k), size in sorted(fixed.items()):
        mine = [f for f in text if any((d := at(**{f: v})) and d.get((template, k), size) != size for v in steps[f])]
        if 0 < len(mine) <= MOST and (told := fitted((template, k), mine, text, steps, at)):
            none = [d for f in mine if (d := at(**{f: 0})) and d.get((template, k))]
            found.setdefault(told, []).append([template, k, 0] if none else [template, k])
    for kinded in [at for dims in found.values() for at in dims if at[0].startswith(f"#{KINDS}=")]:
        bare = "#." + kinded[0].partition(".")[2]
        for told, all_of in found.items():
            if any(at[:2] == [bare, kinded[1]] for at in all_of) and kinded in all_of:
                found[told] = [at for at in all_of if at != kinded]
    return found


def counted(text: dict[str, int], other: dict[str, Any]) -> bool:
    """Whether another number is what makes this config another."""
    return any(type(other.get(f)) is int and other[f] != v for f, v in text.items())


def fitted(where: tuple[str, int], mine: list[str], text: dict[str, int], steps: Any, at: Any) -> str:
    """The formula of a dimension in these fields, if one fits everything that was seen; else ""."""
    tries = [{}, *({f: v} for f in mine for v in steps[f])]
    tries += [{f: u, g: v} for f, g in combinations(mine, 2) for u in steps[f] for v in steps[g]]
    rows = [(text | t, d[where]) for t in tries if (d := at(**t)) and where in d]
    for a, c in permutations(mine, 2):  # the width of a head, where it has no field
        for times in ("", *mine):
            if all(said[a] // said[c] * said.get(times, 1) == n for said, n in rows):
                return f"{a}{times and '*'}{times}/{c}"
    for powers in product(range(3), repeat=len(mine)):  # as of a patch, "3*patch_size*patch_size"
        word = "*".join(f for f, n in zip(mine, powers, strict=True) for _ in range(n))
        values = [prod(said[f] ** n for f, n in zip(mine, powers, strict=True)) for said, _ in rows]
        if word and rows and all(rows[0][1] * v == n * values[0] for v, (_, n) in zip(values, rows, strict=True)):
            times = Fraction(rows[0][1], values[0])
            return (f"{times}*{word}" if times != 1 else word) if times.denominator == 1 else ""
    terms = [(f,) for f in mine] + list(combinations(mine, 2))
    times_of = lambda said, term: said[term[0]] * (said[term[1]] if len(term) > 1 else 1)
    matrix = torch.tensor([[times_of(said, t) for t in terms] for said, _ in rows], dtype=torch.float64)
    if len(rows) <= len(terms) or torch.linalg.matrix_rank(matrix) < len(terms):
        return ""
    solved = torch.linalg.lstsq(matrix, torch.tensor([float(n) for _, n in rows], dtype=torch.float64)[:, None])
    by = [Fraction(float(c)).limit_denominator(1) for c in solved.solution.flatten()]
    if any(sum(c * times_of(said, t) for c, t in zip(by, terms, strict=True)) != n for said, n in rows):
        return ""
    if any(c < 0 for c in by):
        return ""
    return "+".join("*".join([*([str(c)] if c != 1 else []), *t]) for c, t in zip(by, terms, strict=True) if c)


def main(names: list[str]) -> None:
    made = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in names or [*hf.MODELS, *zoo.MODELS]:
        made[known_names.family_type(name)] = formulas(name)
        FILE.write_text(json.dumps(made, sort_keys=True, separators=(",", ":")) + "\n")
        print(name, flush=True)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(sys.argv[1:])
