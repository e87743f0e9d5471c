"""Names by their first number: what stands before it is a stack, and the number a layer of it."""

import re
from collections.abc import Iterable, Mapping

NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)", re.ASCII)
_STORED = re.compile(r"\.(qweight|weight_packed)$|(?<=_projs)_\w+$")

BESIDE = re.compile(r"\bmtp\b|vision|visual|audio")

Layers = dict[int, set[str]]
Groups = list[list[list[str]]]


def by_stack(names: Iterable[str]) -> dict[str, Layers]:
    """Stack -> layer -> what is in it; "" has in 0 what is in no stack.

    >>> by_stack(["model.layers.3.norm.weight", "lm_head.weight"])
    {'model.layers': {3: {'norm.weight'}}, '': {0: {'lm_head.weight'}}}
    """
    found: dict[str, Layers] = {}
    for name in names:
        name = _STORED.sub(lambda hit: ".weight" if hit[1] else "", name)
        hit = NUMBERED.match(name)
        stack, layer, rest = (hit[1], int(hit[2]), hit[3]) if hit else ("", 0, name)
        found.setdefault(stack, {}).setdefault(layer, set()).add(rest)
    return found


def has(stacks: Mapping[str, Layers], name: str) -> bool:
    """Whether a name is among those.

    >>> has(by_stack(["neck.0.weight"]), "neck.0.weight"), has(by_stack(["neck.0.weight"]), "neck.1.weight")
    (True, False)
    """
    hit = NUMBERED.match(name)
    return (hit[3] if hit else name) in stacks.get(hit[1] if hit else "", {}).get(int(hit[2]) if hit else 0, ())


def decoder(stacks: Mapping[str, Layers], towers: Iterable[str] = ()) -> str:
    """The stack of the text model's layers, in no tower: that of most layers with experts, or of most layers."""
    has = lambda layer: any(n.rpartition(".")[2] == "down_projs" for n in layer)
    plain = [s for s in stacks if s and not BESIDE.search(s) and not f"{s}.".startswith(tuple(towers))]
    return max(plain, key=lambda s: (sum(map(has, stacks[s].values())), len(stacks[s]), s), default="")


def groups(seen: Iterable[Iterable[str]]) -> Groups:
    """For each module that all layers have, and for all the others as one: the smallest sets of names seen in it.

    >>> groups([{"norm.w", "mlp.up"}, {"norm.w", "mlp.up", "mlp.bias"}])
    [[['mlp.up']], [['norm.w']]]
    """
    whole = {frozenset(layer) for layer in seen}
    modules = {n.split(".")[0] for layer in whole for n in layer}
    part = lambda layer, which: frozenset(n for n in layer if n.split(".")[0] in which)
    every = {m for m in modules if all(part(layer, {m}) for layer in whole)}
    parts = [{part(layer, {m}) for layer in whole} for m in sorted(every)]
    parts.append({part(layer, modules - every) for layer in whole})
    least = [[s for s in sets if not any(o < s for o in sets)] for sets in parts]
    return [sorted(map(sorted, sets)) for sets in least if sets and all(sets)]
