"""The sizes of what a model of a config saves: of its tensors, its stacks of layers, its lists."""

import re
from collections import defaultdict
from functools import cache
from typing import Any

import known_names
import known_saved
from known_numbers import KINDS

from fmoe.families.numbered import NUMBERED, by_stack, decoder
from fmoe.families.sizes import LAYERS, LIST
from fmoe.types import EXPERT_TENSORS, TensorSpec

Dims = dict[tuple[str, int], int]
RANGED = re.compile(rf"\.experts\.(\d+\.|({'|'.join(EXPERT_TENSORS)})$)")


def dims(name: str, cls: Any, config: Any) -> Dims | None:
    """(template of a native name, dimension) -> its size, as published, in memory, and of a base alone.

    None: there is no such model.

    A stack has as many layers as its last one's number says: (template of its layers, -1), as one within a layer has,
    (as "blocks.0.convs.#", -1); a list of tensors, -2.
    Where what a list says of a layer decides, the template names it: "#layer_types=full_attention.self_attn.q_norm".
    """
    try:
        made = [
            _dims(config, known_names.sized(of, config, name, original))
            for of in (cls, _base(name))
            if of
            for original in known_saved.originals(name)
        ]
    except Exception:  # Transformers builds no such model
        return None
    found = dict(made[0])
    for (template, k), n in (item for each in made[1:] for item in each.items()):
        if not template.startswith("#") and (f"model.{template}", k) not in found:
            found.setdefault((template, k), n)
    return found


_base = cache(known_names.two_parts)


def _dims(config: Any, specs: dict[str, TensorSpec]) -> Dims:
    stacks = by_stack(specs)
    main = decoder(stacks)
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    apart: dict[tuple[str, int], Dims] = defaultdict(dict)  # what is numbered, and no layers
    said = known_names.text_of(config).to_dict()
    kinds = {f: said[f] for f in KINDS if isinstance(said.get(f), list)}
    counts: Dims = {}
    for native, spec in specs.items():
        hit = NUMBERED.match(native)
        if RANGED.search(native) and not (hit and known_names.TOWER.search(hit[1])):  # ranges of experts are read too
            continue
        bare, _, number = native.rpartition(".")
        if not hit and number.isdigit():
            counts[f"{bare}.#", LIST] = max(int(number) + 1, counts.get((f"{bare}.#", LIST), 0))
        if hit and hit[1] != main and (within := NUMBERED.match(hit[3])):
            at = f"{hit[1]}.{hit[2]}.{within[1]}.#", LAYERS
            counts[at] = max(int(within[2]) + 1, counts.get(at, 0))
        beside = hit and hit[1] != main
        for k, n in enumerate(spec.shape):
            template = (f"{hit[1]}.#." if beside else "#.") + hit[3] if hit else native
            found[template, k].add(n)
            apart[template, k] |= {(native, k): n} if beside else {}
            for field, listed in kinds.items() if hit and hit[1] == main else ():
                if int(hit[2]) < len(listed):
                    found[f"#{field}={listed[int(hit[2])]}.{hit[3]}", k].add(n)
    both = config.is_encoder_decoder
    counts |= {(f"{s}.#", LAYERS): max(layers) + 1 for s, layers in stacks.items() if s and (s != main or both)}
    each = {at: n for template, sizes in found.items() if len(sizes) > 1 for at, n in apart[template].items()}
    return {at: sizes.pop() for at, sizes in found.items() if len(sizes) == 1} | each | counts
