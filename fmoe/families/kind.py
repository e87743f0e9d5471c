"""What a family is: rules, the names that its config uses, its activation, and what its FP8 checkpoints quantise."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from fmoe.codecs.cast import CastExperts
from fmoe.codecs.config import exports, gptq_version, quantization_of, weight_block
from fmoe.codecs.foreign.lists import lists
from fmoe.codecs.foreign.restarts import restarts
from fmoe.codecs.foreign.undecoded import undecoded
from fmoe.codecs.quantised import Fresh, Quantised
from fmoe.codecs.scales import in_out, matrix, seams, turned, with_scales
from fmoe.codecs.unscaled import weight_rules
from fmoe.families.defaults import left_out
from fmoe.families.refused import check_types
from fmoe.families.router import spoken, unheard, unsaid
from fmoe.families.sparse import ANY
from fmoe.folding import as_flag, meant
from fmoe.layout.adapter import Adapter
from fmoe.layout.entries import walk
from fmoe.layout.notation import Rule
from fmoe.layout.planning import asked_as, check_choices
from fmoe.layout.stage import Stage
from fmoe.layout.table import Table
from fmoe.lowrank.stage import carry
from fmoe.types import AdapterError, MoEConfig, as_dtype, brief

SWIGLU = {"silu": "swiglu", "swish": "swiglu"}
VERIFIED = {
    "block": "Transformers: round trip, numbers of the whole block",
    "experts": "Transformers: round trip, numbers of the experts; its router is not ours",
    "round trip": "Transformers: round trip; its experts are not ours",
    "keys": "key table only",
    "laws": "round trip of drawn checkpoints",
}
KEPT = ("decode", "keep")
LORA = ("peft_version", "target_parameters", "lora_r")
EXPERTS_ONLY = r".*\.experts\.\d+\.\w+\.weight"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One or more of Hugging Face's model types that store their experts alike.

    rules: HF names and axes <-> native ones. fields: MoEConfig's fields -> the config's names for them, separated by
    blanks: the first that the config has; `a.0` is the first of a list. fixed: what the architecture settles. One of
    both has to say the router, as `fixed=dict(score_func="sigmoid")`, or `dict(score_func="softmax",
    softmax_before_topk=True)`: of a family that does not, `route` and `moe` refuse the config, and `experts` works.
    activations: the config's name of the experts' activation -> ours. fp8: the names that a fresh FP8 export quantises;
    None: no FP8 form. formats: if not that, the quantised formats that it has, and what names a fresh export writes in
    each. words: config fields -> what each of their values says of MoEConfig; the first is that of a config without the
    field. unsaid: config fields that MoEConfig cannot express when they are set, and why. sizes: further letters of the
    rules, and the config's names for their sizes (a second tower's). sparse: how the config says which layers have
    experts, names of `fmoe.families.sparse.WAYS`; "": in no way. source: where it is published.
    verified: what the tests compare with Transformers, one of `VERIFIED`.
    """

    model_types: tuple[str, ...]
    rules: Adapter
    fields: dict[str, str]
    fixed: dict[str, Any] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=lambda: SWIGLU)
    activation_field: str = "hidden_act"
    fp8: str | None = None
    formats: Mapping[str, str | None] = field(default_factory=dict)
    words: Mapping[str, Mapping[Any, Mapping[str, Any]]] = field(default_factory=dict)
    unsaid: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    sparse: str = ANY
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
        return "; ".join(name + ", read only" * (pattern is None) for name, pattern in self.fresh)

    @property
    def fresh(self) -> Fresh:
        """The formats of its quantised checkpoints, and what of an unquantised one is written in each."""
        return tuple(self.formats.items()) or (("fp8 blocks", self.fp8),)

    def adapter(self, config: Any = None, **choices: Any) -> Adapter:
        """The family's adapter, its letters bound to the config's sizes and its choices made.

        config: a dict with Hugging Face's field names, or a Transformers config. dtype: cast merged experts to it.
        Other choices name one of the layouts, as `layout="fused"`. quantized="keep": codes and scales move as they are,
        with no value decoded (`fmoe/codecs/formats.py` has the names). quantize="fp8", "mxfp8", "mxfp4" or "int4": what
        `to_hf` writes of experts, and of what else the family quantises, with fresh scales. Of LoRA tensors,
        lora="peft" or "per-expert" is what `to_hf` writes; peft_version, target_parameters and lora_r (the rank, where
        the config does not count the experts) are as adapter_config.json has them; lora_A="shared" or "separate":
        whether gate and up have one matrix A. Raises AdapterError for a choice that there is not.
        """
        check_choices(choices)
        given, dtype, quantize = as_dict(config), choices.pop("dtype", None), choices.pop("quantize", None)
        if dtype is not None and not (as_dtype(dtype).is_floating_point and as_dtype(dtype).itemsize > 1):
            raise AdapterError(f"dtype={dtype!r}: expected a float of 16 bits or more. Fix: quantize= writes codes")
        if quantize and choices.get("quantized") == "keep":
            raise AdapterError(f"quantize={quantize!r} with quantized='keep': expected one of both")
        lora = {n: choices.pop(n) for n in LORA if n in choices}
        if (quantized := choices.pop("quantized", "decode")) not in KEPT:
            raise AdapterError(f"quantized={quantized!r}: expected 'decode' or 'keep'{meant(quantized, KEPT)}")
        tables = carry(self.rules.stages, self.model_types, **lora)
        known = {n: o for stage in tables if isinstance(stage, Table) for n, o in stage.choices().items()}
        axes = frozenset[str]().union(*(stage.axes() for stage in tables))
        for name in (n for n in choices if n not in known):
            if part := asked_as(name, choices[name], axes):
                raise AdapterError(f"{name}={brief(choices[name])}: {part}")
            told = "; ".join(f"{n}={' | '.join(map(repr, o))}" for n, o in known.items())
            near = meant(name, [*known, "system", "dtype", "quantize", "quantized", *LORA])
            raise AdapterError(f"{self.model_types[0]} has no choice {name!r}: expected {told or 'none'}; dtype{near}")
        check_types(config)
        if said := _contradictions(given, config if isinstance(config, Mapping) else {}, self.fields):
            raise AdapterError(f"{self.model_types[0]}: {said}")
        get = (values := self.values(given)).get
        sizes = {"e": get("n_routed_experts"), "i": get("moe_inter_dim"), "d": get("moe_latent_size") or get("dim")}
        sizes |= {letter: next(_said(given, names), None) for letter, names in self.sizes.items()}
        bounds = {a: n for a, n in sizes.items() if type(n) is int and n}  # 0 experts: all layers are dense
        if large := [a for a, n in bounds.items() if n >= 2**63]:
            raise AdapterError(f"{self.model_types[0]}: the sizes {large} of the config are beyond 2**63")
        moe = self._moe_config(given, values)
        if odd := [f"{a} is {n}" for a, n in bounds.items() if n < 0]:
            raise AdapterError(f"{self.model_types[0]}: of the config's sizes {odd[0]}, expected 0 or more")
        codec = Quantised(
            as_dtype(dtype or given.get("dtype") or given.get("torch_dtype")),
            exports(self.fresh, quantize, across=in_out(tables)) if quantize else self.fresh,
            block=weight_block(given),
            restarts=restarts(given),
            quantization=True if quantize else None,
            was=self.fresh if quantize else None,
            lists=lists(quantization_of(given)),
            undecoded=undecoded(given),
            gptq=gptq_version(given),
            keep=quantized == "keep",
            declared=quantization_of(given) is not None,
        )
        if quantize and _apart(tables):
            why = f"{self.model_types[0]}'s files hold gate and up in an order that scales have no rules for"
            raise AdapterError(f"quantize={quantize!r}: {why}. Fix: convert it to one that names them apart first")
        tables, codec = _scaled(tables, codec, (quantization_of(given) or {}).get("quant_method"))
        tables = tuple(s.bind(bounds).counted() if isinstance(s, Table) else s for s in tables)
        rules = [e for s in tables if isinstance(s, Table) for e in walk(s.entries) if isinstance(e, Rule)]
        stages = replace(codec, experts=weight_rules(rules)), *tables, *(CastExperts(as_dtype(d)) for d in [dtype] if d)
        whole = config if config is None or isinstance(config, Mapping) else config.to_dict()
        return replace(Adapter(stages).choose(**choices), moe=moe, config=whole)

    def values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """MoEConfig's fields, as far as the config says them; of what it leaves out, Transformers' defaults."""
        said = {f: next(_said(config, names), None) for f, names in self.fields.items()}
        null = [n for n in self.fields.get("norm_topk_prob", "").split() if config.get(n, 0) is None]
        said |= {"norm_topk_prob": False} if null and said["norm_topk_prob"] is None else {}  # as a class hears null
        kinds, E = (str(config.get("model_type")), self.model_types[0]), said.get("n_routed_experts")
        return {**self.fixed, **left_out(kinds, E)} | {f: value for f, value in said.items() if value is not None}

    def _moe_config(self, config: Mapping[str, Any], values: Mapping[str, Any]) -> MoEConfig | str:
        needed = ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim")
        if missing := [self.fields[f] for f in needed if f not in values]:
            return f"{self.model_types[0]}: the config does not say {', '.join(missing)}"
        if values["n_routed_experts"] == 0:
            return f"{self.model_types[0]}: the config counts 0 experts, so no layer has any"
        for name, why in self.unsaid.items():
            if any(value if isinstance(value := config.get(name), list) else [value]):
                return f"{name}={config[name]!r} {why}"
        kinds, dtype = MoEConfig.__dataclass_fields__, as_dtype(config.get("dtype") or config.get("torch_dtype"))
        extra = {"dtype": dtype} | {f: as_flag(kinds[f].type, v) for f, v in values.items() if f in kinds}
        if isinstance(told := spoken(config, self.words), str):
            return told
        extra |= told
        if "expert_activation" not in extra:
            act = config.get(self.activation_field, next(iter(self.activations)))
            if not isinstance(act, str) or act not in self.activations:
                return f"{self.activation_field}={act!r}: expected one of {', '.join(self.activations)}"
            extra["expert_activation"] = self.activations[act]
        if extra.get("latent_norm") and not extra.get("moe_latent_size"):
            return f"{self.model_types[0]}: the config does not say {self.fields['moe_latent_size']}"
        extra |= unsaid(self.model_types[0], self.fixed, self.fields, {**values, **extra})
        if uneven := [f for f, value in extra.items() if isinstance(value, list)]:
            return f"{self.fields.get(uneven[0], uneven[0])}={extra[uneven[0]]!r}: layers differ, expected one number"
        try:
            made = MoEConfig(**extra)
        except ValueError as error:
            raise AdapterError(f"{self.model_types[0]}: the config says what no layer can be: {error}") from None
        return unheard(config, self, made) or made


def _apart(stages: Iterable[Stage]) -> bool:
    """Whether expert weights are cut or joined before the rules that make stacks of them: then scales have no rules."""
    tables = [[e for e in walk(s.entries) if isinstance(e, Rule)] for s in stages if isinstance(s, Table)]
    early = takewhile(lambda rules: not any(map(matrix, rules)), tables)
    return any(rule.source.axes and "experts." in rule.source.name for rules in early for rule in rules)


def _scaled(stages: tuple[Stage, ...], codec: Quantised, method: Any) -> tuple[tuple[Stage, ...], Quantised]:
    """The stages with the rules of scales, and the codec with what it must know of rules. method: as config says it."""
    tables, flip = [s.entries for s in stages if isinstance(s, Table)], turned(codec.formats, method)
    joined = tuple(seam for entries in tables for seam in seams(entries, codec.formats, flip)) if codec.keep else ()
    scaled = lambda table: with_scales(table.entries, codec.formats, keep=codec.keep, flip=flip)
    made = lambda s: replace(s, entries=scaled(s)) if isinstance(s, Table) else s
    return tuple(map(made, stages)), replace(codec, seams=joined)


def _said(config: Mapping[str, Any], names: str) -> Iterator[Any]:
    """What a config says under each of some names, where it says anything; a number after a dot is an index."""
    for name in names.split():
        field, _, at = name.partition(".")
        value = config.get(field)
        if at:
            value = value[int(at)] if isinstance(value, list) and int(at) < len(value) else None
        if value is not None:
            yield _one(value)


COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


def _contradictions(given: Mapping[str, Any], top: Mapping[str, Any], fields: Mapping[str, str]) -> str:
    """Fields of one config that count the same thing and differ, in a sentence; empty where there are none."""
    for names in (" ".join(COUNTS), fields.get("n_activated_experts", "")):
        told = {n: v for n in names.split() for v in _said(given, n) if type(v) is int}
        told |= {f"{n} of the outer config": v for n in told for v in _said(top, n) if type(v) is int and v != told[n]}
        if len(set(told.values())) > 1:
            sizes = ", ".join(f"{n} {v}" for n, v in told.items())
            return f"the config contradicts itself: {sizes}, expected one number. Fix: make config.json say it once"
    return ""


def _one(value: Any) -> Any:
    """A value that is told once for every layer, alike: that value."""
    return value[0] if isinstance(value, list) and value and value == [value[0]] * len(value) else value


def as_dict(config: Any) -> dict[str, Any]:
    """The config's fields: its text model's (`text_config`, at any depth) and `ffn_config`'s first, but for dtypes."""
    if config is None:
        return {}
    if isinstance(config, type) or not (isinstance(config, Mapping) or hasattr(config, "to_dict")):
        raise AdapterError(f"config is a {type(config).__name__}, expected a dict or a Transformers config")
    given = config if isinstance(config, Mapping) else config.to_dict()
    inner = as_dict(given.get("text_config")) | as_dict(given.get("ffn_config"))
    first = lambda name, value: given.get(name) is None or value is not None and not name.endswith("dtype")
    return {**given, **{name: value for name, value in inner.items() if first(name, value)}}
