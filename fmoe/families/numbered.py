"""Names by their first number: what stands before it is a stack, and the number a layer of it."""

import re
from collections.abc import Iterable, Mapping

NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)", re.ASCII)
_STORED = re.compile(r"\.(qweight|weight_packed)$|(?<=_projs)_\w+$")

BESIDE = re.compile(r"\bmtp\b|vision|visual|audio")

Layers = dict[int, set[str]]


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


def decoder(stacks: Mapping[str, Layers]) -> str:
    """The stack of the text model's layers: that of most layers with experts, or of most layers."""
    has = lambda layer: any(n.rpartition(".")[2] == "down_projs" for n in layer)
    plain = [s for s in stacks if s and not BESIDE.search(s)]
    return max(plain, key=lambda s: (sum(map(has, stacks[s].values())), len(stacks[s]), s), default="")
