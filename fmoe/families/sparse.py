"""Which layers of a model have experts, as its config says it: every way in which a family's config does, by name."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from fmoe.types import AdapterError, brief

Config = Mapping[str, Any]
COUNTS = ("num_hidden_layers", "n_layers", "num_layers")
MOST = 10_000
LISTS = ("layers_block_type", "hybrid_override_pattern")
AHEAD = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_layers")


def layer_count(config: Config) -> int | None:
    """How many layers the (text) model has. None: the config does not say.

    Raises AdapterError for fewer than none, and for more than any model has.
    """
    listed = (len(v) for v in map(config.get, LISTS) if isinstance(v, list | str) and v)
    field, count = next(((f, n) for f in COUNTS if type(n := config.get(f)) is int), ("", next(listed, None)))
    if count is not None and not 0 <= count <= MOST:
        told = f"config.json has {field} {count}" if field else f"config.json lists {count} layers"
        raise AdapterError(f"{told}: expected 0 to {MOST} layers. Fix: mend {field or 'the list'}")
    return count


def declared_ahead(config: Config) -> tuple[str, int]:
    """How many layers for multi-token prediction a config declares, and in which field.

    >>> declared_ahead({"num_nextn_predict_layers": 1}), declared_ahead({})
    (('num_nextn_predict_layers', 1), ('', 0))

    Raises AdapterError for more than any model has.
    """
    field, count = next(((f, n) for f in AHEAD if type(n := config.get(f)) is int and n > 0), ("", 0))
    if count > MOST:
        raise AdapterError(f"config.json has {field} {brief(count)}: expected 0 to {MOST} layers. Fix: mend {field}")
    return field, count


def sparse_layers(config: Config, ways: str) -> set[int] | None:
    """The layers with experts. None: the config says it in none of these ways.

    ways: names of `WAYS`, separated by blanks; the first whose field the config has decides.

    >>> sparse_layers({"num_hidden_layers": 4, "first_k_dense_replace": 1}, "mlp_layer_types first_k_dense_replace")
    {1, 2, 3}
    """
    count = layer_count(config)
    if count is None:
        return None
    for way in ways.split():
        if way == "every" or config.get(way) is not None:
            try:
                return {l for l in range(count) if WAYS[way](config, l, count)}
            except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
                raise AdapterError(
                    f"config.json has {way} {config.get(way)!r}: that says of no layer what it has"
                ) from None
    return None


def _in(field: str, words: Collection[Any]) -> Callable[[Config, int, int], bool]:
    return lambda config, l, count: config[field][l] in words


def _each(config: Config, field: str, l: int) -> bool:
    """A frequency: a number, or a flag for each layer."""
    value = config.get(field) or 1
    return bool(value[l]) if isinstance(value, list) else l % value == 0


def _listed(value: Any) -> list[int]:
    """Layers as "1,3", or as a list of them."""
    return [int(l) for l in (value.split(",") if isinstance(value, str) else value) if str(l).strip()]


def _least(value: Any) -> int:
    """ERNIE-VL says some numbers once for text, once for images."""
    return int(min(value) if isinstance(value, list) else value)


def _ernie(config: Config, l: int, count: int) -> bool:
    end = config.get("moe_layer_end_index")
    end = max(end) if isinstance(end, list) else end
    step = config.get("moe_layer_interval") or 1
    return (l + 1) % step == 0 and _least(config["moe_layer_start_index"]) <= l <= (count if end in (None, -1) else end)


WAYS: dict[str, Callable[[Config, int, int], bool]] = {
    "mlp_layer_types": lambda c, l, n: c["mlp_layer_types"][l] != "dense",
    "layers_block_type": _in("layers_block_type", ("moe",)),
    "hybrid_override_pattern": _in("hybrid_override_pattern", ("E",)),
    "moe_layers": lambda c, l, n: l in c["moe_layers"],
    "interleave_moe_layer_step": lambda c, l, n: (l + 1) % c["interleave_moe_layer_step"] == 0,
    "moe_layers_enum": lambda c, l, n: l in _listed(c["moe_layers_enum"]),
    "expert_layer_period": lambda c, l, n: (
        l % c["expert_layer_period"] == (c.get("expert_layer_offset") or 0) and c.get("num_experts") != 1
    ),
    "decoder_sparse_step": lambda c, l, n: (
        l not in (c.get("mlp_only_layers") or ()) and (l + 1) % c["decoder_sparse_step"] == 0
    ),
    "mlp_only_layers": lambda c, l, n: l not in c["mlp_only_layers"],
    "moe_layer_start_index": _ernie,
    "first_k_dense_replace": lambda c, l, n: l >= c["first_k_dense_replace"] and _each(c, "moe_layer_freq", l),
    "moe_layer_freq": lambda c, l, n: _each(c, "moe_layer_freq", l),
    "num_dense_layers": lambda c, l, n: l >= c["num_dense_layers"],
    "dense_mlp_idx": lambda c, l, n: l >= c["dense_mlp_idx"],
    "moe_layer_num_skipped": lambda c, l, n: l >= c["moe_layer_num_skipped"],
    "enable_moe_block": lambda c, l, n: bool(c["enable_moe_block"]),
    "every": lambda c, l, n: True,
}
EVERY = " ".join(WAYS)
ANY = EVERY.removesuffix(" every")
"""All that configs are known to say it by; EVERY: and where they say nothing, every layer has experts."""
