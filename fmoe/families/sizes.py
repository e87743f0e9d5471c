"""Have a checkpoint's tensors the sizes that its config says? What Transformers makes of a config's numbers, as data.

`sizes.json`, which `tests/helpers/known/known_sizes.py` wrote: model type -> a sum of products of config fields, as
"2*num_heads*head_dim" -> the dimensions that are that: a native name, `#` for the layer, and which; -1: how many layers
a stack has. A name that starts with `#` is of the text model's layers; with `#layer_types=word`, of those of which that
list says the word. A third entry: where the formula is 0, something else is there. A field may have a path. A quotient,
"hidden_size*num_key_value_heads/num_attention_heads", has the width of a head that no field says.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from fmoe.families.known import by_stack, decoder, entries
from fmoe.families.sparse import layer_count
from fmoe.layout.claims import some
from fmoe.types import Problem

Spell = Callable[[str], Sequence[str]]
"""What a native name is called in the files: one name, or some of what is stacked."""


def spelt(names: Iterable[str], spell: Spell) -> list[str]:
    return list(dict.fromkeys(n for name in names for n in spell(name)))


def keys(names: Iterable[str], spell: Spell) -> tuple[str, ...]:
    """What a problem of native names is about: what files call them, and they."""
    return tuple(dict.fromkeys([*spelt(names, spell), *names]))


PARTS = ("vision_config", "audio_config", "attn_config", "ffn_config")


@cache
def known_sizes() -> dict[str, dict[str, list[list[Any]]]]:
    return dict(json.loads(Path(__file__).with_name("sizes.json").read_text()))


def odd_sizes(
    config: Mapping[str, Any], said: Mapping[str, Any], native: Mapping[str, Any], spell: Spell = lambda name: (name,)
) -> Iterator[Problem]:
    """A problem for each size that the config says and tensors have not, where its class in Transformers is known.

    config: as config.json has it; said: it and its text model's fields. native: names -> what has a shape and a dtype.
    spell: as in `complete.gaps`.

    >>> import torch
    >>> config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 9}
    >>> [problem] = odd_sizes(config, config, {"lm_head.weight": torch.ones(8, 4)})
    >>> problem.text
    "'lm_head.weight': 8 in dimension 0, and config.json has vocab_size 9: expected 9"
    """
    found = entries(config)
    if not found or not found[1]:
        return
    text = config.get("text_config")
    own = {**(text if isinstance(text, Mapping) else config)}
    own |= {f"{p}.{f}": v for p in PARTS for f, v in as_part(config, p).items()}
    stacks, count = by_stack(native), layer_count(said)
    main = decoder(stacks)
    layers = [l for l in stacks.get(main, {}) if count is None or l < count]
    for formula, dims in known_sizes().get(str(config.get("model_type")), {}).items():
        fields = [f for f in re.split(r"[+*/]", formula) if not f.isdigit()]
        if any(type(own.get(f)) is not int for f in fields) or "/" in formula and "head_dim" in own:
            continue
        size, odd = _value(formula, own), dict[tuple[int, int], list[str]]()
        told = ", ".join(f"{f} {own[f]}" for f in dict.fromkeys(fields))
        for template, k, *other in dims:
            at, numbered, rest = template.partition("#")
            kind, _, rest = rest.partition(".") if numbered else ("", "", "")
            stack = at[:-1] or main
            if not size and other:
                continue
            if k < 0:
                if stack in stacks and (n := max(stacks[stack]) + 1) != size:
                    yield Problem(f"{stack}.*: {n} layers, and config.json has {told}: expected {size}", (stack,))
                continue
            here = layers if stack == main else stacks.get(stack, {})
            names = [f"{stack}.{l}.{rest}" for l in here if _of(kind, own, l)] if numbered else [template]
            held = {n: native[n].shape[k] for n in names if n in native and _plain(native[n]) > k}
            if len({*held.values()} - {size}) == 1 and size not in held.values():  # layers may be of several kinds
                odd.setdefault((k, next(iter(held.values()))), []).extend(held)
        for (k, n), names in odd.items():
            dim = f"dimension {k}" + " of the native tensor" * (spelt(names, spell) != names)
            text = f"{some(spelt(names, spell))}: {n} in {dim}, and config.json has {told}: expected {size}"
            yield Problem(text, keys(names, spell))


def _of(kind: str, said: Mapping[str, Any], layer: int) -> bool:
    """Whether a list says of a layer what "layer_types=full_attention" says; "": any layer."""
    field, _, word = kind.partition("=")
    listed = said.get(field)
    return not kind or isinstance(listed, list) and layer < len(listed) and listed[layer] == word


def as_part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _plain(spec: Any) -> int:
    """How many dimensions it has, if it is no codes."""
    whole = spec.dtype.itemsize > 1 if spec.dtype.is_floating_point else spec.dtype.itemsize == 8
    return len(spec.shape) if whole else 0


def _value(formula: str, said: Mapping[str, Any]) -> int:
    """Of a quotient "a*b/c", a // c * b, as classes take the width of a head."""
    value = lambda factor: int(factor) if factor.isdigit() else int(said[factor])
    above, _, below = formula.partition("/")
    if below:
        first, *others = map(value, above.split("*"))
        return first // max(1, value(below)) * prod(others)
    return sum(prod(map(value, term.split("*"))) for term in above.split("+"))
