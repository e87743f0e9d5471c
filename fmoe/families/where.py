"""Which layers have what not all of them have, by the config: rules that `tests/helpers/known/known_where.py` read off.

A rule is a list of ways, each a list of conditions, the names that are there if all conditions of one way hold, and the
module, with its dot, that a layer must have for that. A condition: ["at", field, values], of the layer's entry in a
list; ["on" or "off", field, whether it is on where a config does not say]; ["set" or "null", field, whether it is set
where a config does not say]; ["first"] or ["later"], of the layer's number; ["every" or "other", field, remainder], of
every so many layers, or of those between, where the remainder is a number or a field; ["own", field], of those whose
entry in a list is their own number. A field may have a path, "vision_config.use_bias". Rules have the words of
Transformers' classes, into which `translated` turns a publisher's.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Rules = Sequence[Sequence[Any]]
WORDS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}
_INDEXED = {**WORDS, "full_attention": "indexed_attention"}
OWN = dict.fromkeys(("glm5_next", "glm5_next_text", "qwen4_exp", "qwen4_exp_text"), _INDEXED)
OWN["nemotron_h"] = {**WORDS, "M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
"""Model type -> the words of a class that has more of them."""
LISTS = ("layer_types", "layers_block_type")
FIELDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "granitemoehybrid": {"layer_types": ("layers_block_type", "layer_types")},
    "nemotron_h": {"layers_block_type": ("layer_types", "layers_block_type", "hybrid_override_pattern")},
}
"""Model type -> its list -> the fields that say it, the first before the others."""


def settled(rules: Rules, said: Mapping[str, Any], layer: int, held: Iterable[str]) -> dict[str, bool]:
    """Names -> whether this layer has them, of those of which the config says it.

    >>> rules = [[[[["at", "kinds", ["full"]], ["on", "sinks", True]]], ["attn.sinks"], "attn."]]
    >>> [settled(rules, {"kinds": ["full", "slid"]}, l, ["attn.q"]) for l in (0, 1, 2)]
    [{'attn.sinks': True}, {'attn.sinks': False}, {}]
    """
    held, found = [*held], dict[str, bool]()
    for ways, names, module in rules:
        told = [_all(conditions, said, layer) for conditions in ways]
        if (True in told or None not in told) and any(n.startswith(module) for n in held):
            found |= dict.fromkeys(names, True in told)
    return found


def unsaid(rules: Rules, said: Mapping[str, Any], layer: int) -> list[str]:
    """Names of which the config leaves out what says whether this layer has them.

    >>> unsaid([[[[["at", "kinds", ["full"]]]], ["attn.sinks"], "attn."]], {}, 0)
    ['attn.sinks']
    """
    told = [([_all(conditions, said, layer) for conditions in ways], names) for ways, names, _ in rules]
    return [n for ways, names in told if None in ways and True not in ways for n in names]


def says(rules: Rules, said: Mapping[str, Any], name: str) -> str:
    """The numbers by which a config says that of a name, as "period 2, offset 1"; "" for one that no number decides.

    >>> says([[[[["every", "period", "offset"]]], ["attn.q"], ""]], {"period": 2, "offset": 1}, "attn.q")
    'period 2, offset 1'
    """
    conditions = [c for ways, names, _ in rules if name in names for way in ways for c in way]
    fields = dict.fromkeys(f for c in conditions for f in c[1:] if isinstance(f, str))
    return ", ".join(f"{f} {said[f]}" for f in fields if type(said.get(f)) is int)


def _all(conditions: Sequence[Sequence[Any]], said: Mapping[str, Any], layer: int) -> bool | None:
    told = [holds(condition, said, layer) for condition in conditions]
    return False if False in told else None if None in told else True


def within(said: Mapping[str, Any], path: str) -> tuple[Mapping[str, Any], str]:
    """The part of a config that has the field at a path, or would have it, and the field's name there.

    >>> within({"vision_config": {"depth": 2}}, "vision_config.depth")
    ({'depth': 2}, 'depth')
    """
    *parts, field = path.split(".")
    for part in parts:
        said = said[part] if isinstance(said.get(part), Mapping) else {}
    return said, field


def holds(condition: Sequence[Any], said: Mapping[str, Any], layer: int) -> bool | None:
    """Whether a condition holds for a layer. None: the config does not say it.

    >>> [holds(["every", "period", 1], {"period": 2}, l) for l in (0, 1)], holds(["every", "period", 1], {}, 0)
    ([False, True], None)
    """
    kind, *rest = condition
    if not rest:
        return (layer == 0) == (kind == "first")
    said, field = within(said, rest[0])
    listed = said.get(field)
    if kind in ("own", "at"):
        value = listed[layer] if (known := isinstance(listed, list) and len(listed) > layer) else None
        return (value == layer if kind == "own" else value in rest[1]) if known else None
    if kind in ("every", "other"):
        named = isinstance(rest[1], str)
        step, first = said.get(field), said.get(rest[1]) if named else rest[1]
        if type(step) is not int or type(first) is not int:
            return None
        other = named and not 0 <= first < step  # an offset that no number leaves
        return (step > 0 and not other and (layer - first) % step == 0) == (kind == "every")
    if kind in ("set", "null"):
        return (said[field] is not None if field in said else rest[1]) == (kind == "set")
    return bool(said.get(field, rest[1])) == (kind == "on")


def field_of(config: Mapping[str, Any], field: str) -> str:
    """The field of a config in which it says what its class calls by this name.

    >>> field_of({"model_type": "nemotron_h", "hybrid_override_pattern": "M*"}, "layers_block_type")
    'hybrid_override_pattern'
    """
    ways = FIELDS.get(str(config.get("model_type")), {}).get(field, ())
    return next((way for way in ways if config.get(way) is not None), field)


def translated(config: Mapping[str, Any], part_of: str = "") -> dict[str, Any]:
    """The config with its lists of kinds of layers, and its text model's, in the words and fields of its class.

    part_of: the model type of what it is a part of, where it says none.

    >>> translated({"model_type": "qwen3_next", "layer_types": ["mamba", "attention"]})["layer_types"]
    ['linear_attention', 'full_attention']
    >>> translated({"model_type": "nemotron_h", "hybrid_override_pattern": "ME"})["layers_block_type"]
    ['linear_attention', 'moe']
    """
    made, kind = {**config}, str(config.get("model_type") or part_of)
    words = OWN.get(kind, WORDS)
    for field in LISTS:
        kinds = config.get(source := field_of(config, field))
        if isinstance(kinds, list | tuple) or source != field and isinstance(kinds, str):
            made[field] = [words.get(word, word) if isinstance(word, str) else word for word in kinds]
    if isinstance(text := config.get("text_config"), Mapping):
        made["text_config"] = translated(text, kind)
    return made
