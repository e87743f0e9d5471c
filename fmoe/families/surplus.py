"""What is there though the config says that its class has none of it: Transformers drops that, and goes on without."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fmoe.families.known import class_of, entries, nearest, with_text
from fmoe.families.numbered import Layers
from fmoe.families.where import holds, settled, within
from fmoe.layout.claims import some

Rule = Sequence[Any]


def dropped_by_config(config: Mapping[str, Any], stacks: Mapping[str, Layers], main: str, count: int) -> list[str]:
    """A note for each word of the config by which its class has none of what is there.

    main: the text model's stack, whose layers after `count` are not the class's to judge.

    >>> config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False}
    >>> layers = {0: {"self_attn.q_proj.weight", "self_attn.q_proj.bias"}}
    >>> print(*dropped_by_config(config, {"model.layers": layers}, "model.layers", 1))
    'model.layers.0.self_attn.q_proj.bias': config.json has attention_bias false, by which Qwen3MoeForCausalLM has \
none: Transformers drops it in silence. Fix: mend attention_bias, unless it is meant so
    """
    found = entries(config)
    form = next(iter(nearest(config, stacks)), None)
    if not found or not found[1] or form is None:
        return []
    said = with_text(config)
    by: dict[tuple[str, str], list[str]] = {}
    for stack, layers in stacks.items():
        rules = form["where"].get(stack, ())
        for l in sorted(layers):
            for name, why in _surplus(rules, said, l, layers[l]) if stack != main or l < count else ():
                by.setdefault(why, []).append(f"{stack}.{l}.{name}" if stack else name)
    return [
        f"{some(names)}: config.json has {word}, by which {class_of(config)} has none: Transformers drops "
        f"{'it' if len(names) == 1 else 'them'} in silence. Fix: mend {fields}, unless it is meant so"
        for (word, fields), names in by.items()
    ]


def _surplus(
    rules: Sequence[Rule], said: Mapping[str, Any], l: int, held: set[str]
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names of a layer that no rule gives it and some rule takes, each with what the config says, and in what fields.

    What a config does not say may be said in words of a publisher's own, so silence takes nothing.
    """
    given = {n for rule in rules for n, there in settled([rule], said, l, held).items() if there}
    for ways, names, _ in rules:
        surplus = sorted(held & {*names} - given)
        failing = [[c[1] for c in way if _denies(c, said, l)] for way in ways]
        if surplus and failing and all(failing):
            fields = list(dict.fromkeys(f for way in failing for f in way))
            words = [f"{f} {_word(_told(said, f), l)}" for f in fields]
            yield from ((n, (" and ".join(words), " or ".join(fields))) for n in surplus)


def _denies(condition: Rule, said: Mapping[str, Any], l: int) -> bool:
    """Whether it is of a field that the config has, and does not hold."""
    return len(condition) > 1 and _told(said, condition[1]) is not None and holds(condition, said, l) is False


def _told(said: Mapping[str, Any], path: str) -> Any:
    part, field = within(said, path)
    return part.get(field)


def _word(value: Any, l: int) -> str:
    return json.dumps(value[l]) if isinstance(value, list) and l < len(value) else json.dumps(value)
