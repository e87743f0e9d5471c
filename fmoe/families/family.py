"""What a family is: rules, the names that its config uses, its activation, and what its FP8 checkpoints quantise."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fmoe.adapter import Adapter
from fmoe.codecs.cast import CastExperts
from fmoe.codecs.fp8 import BlockFP8
from fmoe.entries import walk
from fmoe.rules import Rule
from fmoe.table import Table
from fmoe.types import AdapterError, MoEConfig, as_dtype

SWIGLU = {"silu": "swiglu", "swish": "swiglu"}
VERIFIED = {
    "block": "Transformers: round trip, numbers of the whole block",
    "experts": "Transformers: round trip, numbers of the experts; its router is not ours",
    "round trip": "Transformers: round trip; its experts are not ours",
    "keys": "key table only",
    "laws": "round trip of drawn checkpoints",
}
EXPERTS_ONLY = r".*\.experts\.\d+\.\w+\.weight"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One or more of Hugging Face's model types that store their experts alike.

    rules: HF names and axes <-> native ones. fields: MoEConfig's fields -> the config's names for them, separated by
    blanks: the first that the config has. fixed: the fields that the architecture settles. activations: the config's
    name of the experts' activation -> ours. fp8: the names that a fresh FP8 export quantises; None: no FP8 form.
    unsaid: config fields that MoEConfig cannot express when they are set, and why. source: where it is published.
    verified: what the tests compare with Transformers, one of `VERIFIED`.
    """

    model_types: tuple[str, ...]
    rules: Adapter
    fields: dict[str, str]
    fixed: dict[str, Any] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=lambda: SWIGLU)
    activation_field: str = "hidden_act"
    fp8: str | None = None
    unsaid: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    verified: str = "keys"

    @property
    def layout(self) -> str:
        """Where gate and up lie on disk as published: the first rule that makes `gate_and_up_projs`."""
        tables = [stage for stage in self.rules.stages if isinstance(stage, Table)]
        rules = [entry for t in tables for entry in walk(t.entries) if isinstance(entry, Rule)]
        return next(str(r.source) for r in rules if "gate_and_up_projs" in r.target.name)

    @property
    def quantised(self) -> str:
        """Which quantised checkpoints it reads, and writes from unquantised ones."""
        return "fp8 blocks" if self.fp8 else "fp8 blocks, read only" if "scale_inv [" in str(self.rules) else "none"

    def adapter(self, config: Any = None, **choices: Any) -> Adapter:
        """The family's adapter, its letters bound to the config's sizes and its choices made.

        config: a dict with Hugging Face's field names, or a Transformers config. dtype: cast merged experts to it.
        Other choices name one of the layouts, as `layout="fused"`. Raises AdapterError for a choice that there is not.
        """
        given = as_dict(config)
        dtype = choices.pop("dtype", None)
        known = {n: o for stage in self.rules.stages if isinstance(stage, Table) for n, o in stage.choices().items()}
        for name in choices.keys() - known:
            told = "; ".join(f"{n}={' | '.join(map(repr, o))}" for n, o in known.items())
            raise AdapterError(f"{self.model_types[0]} has no choice {name!r}: expected {told or 'none'}; dtype")
        values = self.values(given)
        sizes = {"e": values.get("n_routed_experts"), "i": values.get("moe_inter_dim")}
        sizes["d"] = values.get("moe_latent_size") or values.get("dim")
        bounds = {a: n for a, n in sizes.items() if isinstance(n, int)}
        if large := [a for a, n in bounds.items() if n >= 2**63]:
            raise ValueError(f"{self.model_types[0]}: the sizes {large} of the config are beyond 2**63")
        stages = tuple(s.bind(bounds) if isinstance(s, Table) else s for s in self.rules.stages)
        codec = BlockFP8(
            as_dtype(dtype or given.get("dtype") or given.get("torch_dtype")),
            self.fp8,
            block=_block(given.get("quantization_config")),
            declared=bool(given.get("quantization_config")),
        )
        stages = (codec, *stages)
        if dtype:
            stages = (*stages, CastExperts(as_dtype(dtype)))
        whole = config if config is None or isinstance(config, Mapping) else config.to_dict()
        return replace(Adapter(stages).choose(**choices), moe=self._moe_config(given, values), config=whole)

    def values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """MoEConfig's fields, as far as the config says them."""
        said = {
            f: [_one(config[n]) for n in names.split() if config.get(n) is not None] for f, names in self.fields.items()
        }
        return dict(self.fixed) | {f: values[0] for f, values in said.items() if values}

    def _moe_config(self, config: Mapping[str, Any], values: Mapping[str, Any]) -> MoEConfig | str:
        missing = [
            self.fields[f]
            for f in ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim")
            if f not in values
        ]
        if missing:
            return f"{self.model_types[0]}: the config does not say {', '.join(missing)}"
        for name, why in self.unsaid.items():
            if any(config.get(name) or ()):
                return f"{name}={config[name]!r} {why}"
        known = {f.name for f in fields(MoEConfig)}
        dtype = as_dtype(config.get("dtype") or config.get("torch_dtype"))
        extra = {"dtype": dtype} | {f: v for f, v in values.items() if f in known}
        if "expert_activation" not in extra:
            act = config.get(self.activation_field, next(iter(self.activations)))
            if not isinstance(act, str) or act not in self.activations:
                return f"{self.activation_field}={act!r}: expected one of {', '.join(self.activations)}"
            extra["expert_activation"] = self.activations[act]
        try:
            return MoEConfig(**extra)
        except ValueError as error:
            raise AdapterError(f"{self.model_types[0]}: the config says what no layer can be: {error}") from None


def _one(value: Any) -> Any:
    """A value that is told once for every layer, alike: that value."""
    return value[0] if isinstance(value, list) and value and value == [value[0]] * len(value) else value


def as_dict(config: Any) -> dict[str, Any]:
    """The config's fields, those of its text model (`text_config`, at any depth) and `ffn_config` (DBRX's) first."""
    if config is None:
        return {}
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise AdapterError(f"config is a {type(config).__name__}, expected a dict or a Transformers config")
    given = config if isinstance(config, Mapping) else config.to_dict()
    inner = as_dict(given.get("text_config")) | as_dict(given.get("ffn_config"))
    return {**given, **{name: value for name, value in inner.items() if value is not None}}


def _block(quantization: Any) -> int:
    """The side of the square blocks that a quantization_config declares; 128 if it says none."""
    sides = (as_dict(quantization).get("weight_block_size") if quantization else None) or [128, 128]
    if len(set(sides)) != 1:
        raise AdapterError(f"quantization_config.weight_block_size is {sides}, expected square blocks")
    return int(sides[0])
