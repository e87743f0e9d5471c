"""adapter_config.json as a value."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fmoe.lowrank.derive import CURRENT
from fmoe.types import AdapterError, brief

UNSIGNED = "0.17.1"
"""What a config without peft_version is from: releases before 0.18 did not write it."""
_MERGE = "Fix: merge it with PEFT (merge_and_unload), and convert the model"
_MORE = ("use_dora", "fan_in_fan_out", "use_bdlora", "kasa_config", "monteclora_config")
_BESIDE = "Fix: keep it beside its base, in PEFT: it has no merged model"
REFUSED = {name: f"more than two matrices A and B say. {_MERGE}" for name in _MORE} | {
    "lora_bias": f"biases beside A and B. {_MERGE}; where the base's modules have no bias PEFT cannot: keep it there",
    "use_qalora": "matrices A of groups of inputs, which PEFT merges into none. Fix: say use_qalora=false, and write "
    "A [r, inputs / g] as A.repeat_interleave(g, 1) * A.shape[1] / g, g = qalora_group_size, the same update; and an A "
    "[r, inputs], of a base that was not quantised, as it is",
    "alora_invocation_tokens": f"an update that begins at a token. {_BESIDE}",
    "arrow_config": f"a router among adapters. {_BESIDE}; or load one of its adapters alone",
    "modules_to_save": f"whole weights beside A and B. {_MERGE}",
    "trainable_token_indices": f"rows of an embedding beside A and B. {_MERGE}; but of a base whose embedding is its "
    "head too, untie it first: PEFT merges rows of one of them into both",
    "layer_replication": "other layers than the base's, of which PEFT merges all copies into one. Fix: write a base "
    "that has these layers, each a copy of its own, with num_hidden_layers of them, and leave layer_replication out",
    "bias": f"biases of the base, trained beside A and B. {_MERGE}",
}
"""Fields of adapter_config.json that two matrices cannot express, and what they mean."""
HARMLESS = {"bias": "none"}
"""What such a field says where it says nothing."""
STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of init_lora_weights that change the base's own weights too."""
LAYOUTS = ("rank_major", "grouped_by_expert")
"""How a wrapper's B packs ranks and experts in its last dimension: (r e), PEFT's; or (e r)."""


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int of more digits than floats have
        return False


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _names(value: Any) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(n, str) for n in value)


def _one_or_names(value: Any) -> bool:
    return _readable(value) if isinstance(value, str) else _names(value)


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) for n in values)


def _patterns(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(n, str) and _readable(n) and fits(v) for n, v in value.items())


def _readable(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lora_alpha": ("a finite number", _finite),
    "use_rslora": ("true or false", lambda v: isinstance(v, bool)),
    "rank_pattern": ("regular expressions and positive ints", lambda v: _patterns(v, _rank)),
    "alpha_pattern": ("regular expressions and finite numbers", lambda v: _patterns(v, _finite)),
    "target_parameters": ("a list of names", _names),
    "target_modules": ("a list of names, or a regular expression", _one_or_names),
    "exclude_modules": ("a list of names, or a regular expression", _one_or_names),
    "layers_pattern": (
        "a list of regular expressions, or one",
        lambda v: _one_or_names(v) and (isinstance(v, str) or all(map(_readable, v))),
    ),
    "layers_to_transform": (
        "a number of a layer, or a list of them",
        lambda v: _numbers(v if isinstance(v, list) else [v]),
    ),
    "peft_version": ("a version", lambda v: isinstance(v, str)),
    "base_model_name_or_path": ("a name", lambda v: isinstance(v, str)),
}
"""What a field has to be, where a config says it."""


def _of_kinds(said: Mapping[str, Any]) -> None:
    for name, (expected, fits) in KINDS.items():
        if name in said and (said[name] is not None or name == "lora_alpha") and not fits(said[name]):
            raise AdapterError(f"adapter_config.json has {name} {brief(said[name])}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What an adapter_config.json says: ranks, alphas, what is wrapped, and by which release of PEFT.

    rank_pattern, alpha_pattern: regular expressions for the ends of names -> what holds there in place of r and
    lora_alpha. target_parameters, target_modules: what PEFT wraps; modules may be a regular expression. base: the
    model's path or hub name. other: every other field, as it is. Raises AdapterError for what is no LoRA of matrices.

    >>> LoraConfig(r=8, lora_alpha=16, alpha_pattern={"down_proj": 4}).scale("model.layers.0.mlp.experts.down_proj")
    0.5
    """

    r: int
    lora_alpha: float = 32
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    target_modules: tuple[str, ...] | str = ()
    peft_version: str = CURRENT
    base: str | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or not 1 <= self.r < 2**31:
            raise AdapterError(f"LoraConfig.r is {brief(self.r)}, expected a positive int")
        _of_kinds({**self.other, **vars(self)})
        if problems := [*_refused(self.other)]:
            raise AdapterError([f"adapter_config.json says {problem}" for problem in problems])
        if (found := self.other.get("lora_B_layout") or LAYOUTS[0]) not in LAYOUTS:
            raise AdapterError(f"adapter_config.json has lora_B_layout {found!r}, expected one of {', '.join(LAYOUTS)}")

    @property
    def grouped(self) -> bool:
        """Whether a wrapper's B holds one expert's ranks after another's."""
        return self.other.get("lora_B_layout") == LAYOUTS[1]

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> "LoraConfig":
        """The config of a JSON object, as PEFT writes it."""
        kind = said.get("peft_type")
        if kind != "LORA":
            raise AdapterError(f"adapter_config.json has peft_type {kind!r}, expected 'LORA'")
        _of_kinds(said)
        ours = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"}
        ours |= {"target_modules", "peft_version", "base_model_name_or_path", "peft_type"}
        modules = said.get("target_modules") or ()
        return cls(
            r=said.get("r", 8),
            lora_alpha=said.get("lora_alpha", 8),
            use_rslora=bool(said.get("use_rslora")),
            rank_pattern=dict(said.get("rank_pattern") or {}),
            alpha_pattern=dict(said.get("alpha_pattern") or {}),
            target_parameters=tuple(sorted(said.get("target_parameters") or ())),
            target_modules=modules if isinstance(modules, str) else tuple(sorted(modules)),
            peft_version=said.get("peft_version") or UNSIGNED,
            base=said.get("base_model_name_or_path"),
            other={n: v for n, v in said.items() if n not in ours},
        )

    def json(self) -> dict[str, Any]:
        """The JSON object: what PEFT reads."""
        modules = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        plain = {"bias": "none", "lora_dropout": 0.0, "inference_mode": True, "task_type": None}
        return (
            plain
            | dict(self.other)
            | {
                "peft_type": "LORA",
                "peft_version": self.peft_version,
                "base_model_name_or_path": self.base,
                "r": self.r,
                "lora_alpha": self.lora_alpha,
                "use_rslora": self.use_rslora,
                "rank_pattern": dict(self.rank_pattern),
                "alpha_pattern": dict(self.alpha_pattern),
                "target_modules": modules,
                "target_parameters": list(self.target_parameters) or None,
            }
        )

    def wraps(self, key: str) -> bool:
        """Whether PEFT wraps a linear module of this name.

        >>> some = {"layers_to_transform": [1], "exclude_modules": "o_proj"}
        >>> config = LoraConfig(r=8, target_modules=("q_proj",), other=some)
        >>> [config.wraps(f"model.layers.{l}.self_attn.q_proj") for l in range(3)]
        [False, True, False]
        """
        found = self.target_modules
        if listed(key, self.other.get("exclude_modules") or ()):
            return False
        if isinstance(found, str):
            return found == "all-linear" or listed(key, found)
        layers, patterns = (self.other.get(f) for f in ("layers_to_transform", "layers_pattern"))
        if key in found or layers in (None, []) or not listed(key, found):
            return listed(key, found)
        forms = [patterns] if isinstance(patterns, str) and patterns else patterns or []
        hits = (re.match(at, key) for at in [rf"(?:^|.*?\.){f}\.(\d+)\." for f in forms] or [r".*?\.[^.]*\.(\d+)\."])
        at = next((int(hit[1]) for hit in hits if hit), None)
        return at in layers if isinstance(layers, list) else at == layers

    def rank(self, key: str) -> int:
        """r of a parameter or module."""
        return _matched(self.rank_pattern, key, self.r)

    def scale(self, key: str) -> float:
        """alpha / r of a parameter or module; with rslora alpha / sqrt(r)."""
        r = self.rank(key)
        return _matched(self.alpha_pattern, key, self.lora_alpha) / (r**0.5 if self.use_rslora else r)


def _refused(other: Mapping[str, Any]) -> Iterator[str]:
    for name, why in REFUSED.items():
        if (said := other.get(name)) and said != HARMLESS.get(name):
            yield f"{name}={said!r}: {why}"
    start = other.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(STARTS):
        fix = "merge it with PEFT (merge_and_unload) where it was trained, and convert the model"
        if not start.lower().startswith("loftq"):  # of which PEFT converts none
            fix = f"save it with PEFT's path_initial_model_for_weight_conversion, or {fix}"
        yield f"init_lora_weights={start!r}: A and B belong to a base whose weights the start has changed. Fix: {fix}"


def listed(key: str, names: Any) -> bool:
    """Whether names have a module: by its end, or one of them as a regular expression."""
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(key == n or key.endswith(f".{n}") for n in names)


def _matched(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", key)), default)
