"""What is there beyond a class: names that its config denies, which Transformers drops, and dimensions too many."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fmoe.families.known import class_of, entries, nearest, rules_of, text_stack, with_text
from fmoe.families.numbered import NUMBERED, Layers, by_stack
from fmoe.families.sizes import Spell, keys, known_sizes, plain, spelt, stem_of
from fmoe.families.where import field_of, holds, says, settled, translated, unsaid, within
from fmoe.folding import Doubt
from fmoe.layout.claims import some
from fmoe.types import Problem

Rule = Sequence[Any]


def told_of(config: Mapping[str, Any], stacks: Mapping[str, Layers]) -> Callable[[str, int], dict[str, str]]:
    """stack, layer -> the names of which the config says whether that layer has them, and by what numbers it does.

    And those of which it would say it, had it the field that does: other layers do not say it, either.
    """
    form, said = next(iter(nearest(config, stacks)), None), with_text(config)
    rules = lambda stack: rules_of(form, stack) if form else ()
    names = lambda stack, l: (*settled(rules(stack), said, l, stacks[stack][l]), *unsaid(rules(stack), said, l))
    return lambda stack, l: {n: says(rules(stack), said, n) for n in names(stack, l)}


def denied(config: Mapping[str, Any], stacks: Mapping[str, Layers]) -> set[str]:
    """Names of layers that the config gives others of their stack, and not them."""
    said, found = with_text(config), set[str]()
    for form in nearest(config, stacks):
        for stack, layers in stacks.items():
            told = {l: settled(rules_of(form, stack), said, l, held) for l, held in layers.items()}
            rows = [(l, n, there) for l, each in told.items() for n, there in each.items()]
            given = {n for _, n, there in rows if there}
            found |= {f"{stack}.{l}.{n}" for l, n, there in rows if not there and n in given}
    return found


def dropped_by_config(
    config: Mapping[str, Any],
    stacks: Mapping[str, Layers],
    main: str,
    count: int,
    spell: Spell = lambda name: (name,),
) -> list[Doubt]:
    """A note for each word of the config by which its class has none of what is there.

    main: the text model's stack, whose layers after `count` are not the class's to judge. spell: as in `complete.gaps`.

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
    said, written = with_text(translated(config)), with_text(config)
    by: dict[tuple[str, str], list[str]] = {}
    for stack, layers in stacks.items():
        rules = rules_of(form, stack)
        for l in sorted(layers):
            for name, failing in _surplus(rules, said, l, layers[l]) if stack != main or l < count else ():
                fields = list(dict.fromkeys(field_of(written, f) for f in failing))
                why = " and ".join(_word(written, f, l) for f in fields), " or ".join(fields)
                by.setdefault(why, []).append(f"{stack}.{l}.{name}" if stack else name)
    return [
        Doubt(
            f"{some(spelt(names, spell))}: config.json has {word}, by which {class_of(config)} has none: Transformers "
            f"drops {'it' if len(names) == 1 else 'them'} in silence. Fix: mend {fields}, unless it is meant so"
        )
        for (word, fields), names in by.items()
    ]


def _surplus(rules: Sequence[Rule], said: Mapping[str, Any], l: int, held: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Names of a layer that no rule gives it and some rule takes, each with the fields that do.

    A flag that is left out is what its class takes it for. Anything else may be said in words of a publisher's own, so
    its absence takes nothing.
    """
    given = {n for rule in rules for n, there in settled([rule], said, l, held).items() if there}
    for ways, names, _ in rules:
        surplus = sorted(held & {*names} - given)
        failing = [[c[1] for c in way if _denies(c, said, l)] for way in ways]
        if surplus and failing and all(failing):
            yield from ((n, [f for way in failing for f in way]) for n in surplus)


def _denies(condition: Rule, said: Mapping[str, Any], l: int) -> bool:
    """Whether it does not hold, and is of a flag or of a field that the config has."""
    part, field = within(said, condition[1]) if len(condition) > 1 else ({}, "")
    known = condition[0] in ("on", "off", "set", "null") or part.get(field) is not None
    return known and holds(condition, said, l) is False


def _word(said: Mapping[str, Any], path: str, l: int) -> str:
    part, field = within(said, path)
    value = part.get(field)
    told = json.dumps(value[l] if isinstance(value, list) and l < len(value) else value)
    return f"{path} {told}" if field in part else f"no {path}"


@cache
def known_ranks(model_type: str) -> dict[str, int | None]:
    """A name as in `sizes.json` -> how many dimensions its tensors have at most; None, or no name, where nobody knows.

    `ranks.json`, which `tests/helpers/known/known_ranks.py` wrote, has those of which the last is none of known size.
    """
    made = dict[str, Any]()
    for name, k in (each for dims in known_sizes().get(model_type, {}).values() for each in dims):
        if k >= 0 and "=" not in name:
            made[name] = max(k + 1, made.get(name, 0))
    return made | json.loads(Path(__file__).with_name("ranks.json").read_text()).get(model_type, {})


def template(name: str, main: str) -> str:
    """A native name, as in `sizes.json`. main: the text model's stack.

    >>> template("model.layers.3.mlp.gate.weight", "model.layers")
    '#.mlp.gate.weight'
    """
    hit = NUMBERED.match(name)
    return f"{'' if hit[1] == main else f'{hit[1]}.'}#.{hit[3]}" if hit else name


def too_deep(config: Mapping[str, Any], native: Mapping[str, Any], spell: Spell) -> Iterator[Problem]:
    """A problem for tensors with a dimension of 1 more than their class has, which broadcasting would hide."""
    if entries(config) is None:
        return
    main, stem = text_stack(config, by_stack(native)), stem_of(native)
    ranks = {n.removeprefix(stem): rank for n, rank in known_ranks(str(config.get("model_type"))).items()}
    deep = dict[tuple[tuple[int, ...], int], list[str]]()
    for name, spec in native.items():
        rank = ranks.get(template(name, main)) if plain(spec) and 1 in spec.shape else None
        if rank is not None and len(spec.shape) > rank:
            deep.setdefault((tuple(spec.shape), rank), []).append(name)
    for (shape, rank), names in deep.items():
        text = f"{some(spelt(names, spell))}: {list(shape)}, and its class has {rank} dimension{'s' * (rank != 1)}"
        yield Problem(text, keys(names, spell))
