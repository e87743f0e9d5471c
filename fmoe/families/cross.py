"""One family's checkpoint as another's: through the native names that they share, saying what does not carry over.

What the other family has beside experts is asked of Transformers, whose class of it is built without memory: so nobody
writes down which family has a `q_norm`. What its experts compute is compared as `MoEConfig`s. What its attention and
norms compute is not compared: of these, names, shapes and config fields are.
"""

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from reprlib import repr
from typing import Any

import torch

from fmoe.families import family
from fmoe.families.kind import Family, as_dict
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import drop, keep, rename, table
from fmoe.layout.entries import walk
from fmoe.layout.names import Names
from fmoe.layout.notation import Rule
from fmoe.layout.table import Table
from fmoe.types import AdapterError, MoEConfig, TensorSpec

TRAINING = {"train_gate", "aux_loss_coeff", "gate_bias_update_factor", "dtype", "router_weights_fp32", "inter_dim"}
"""Fields of MoEConfig that do not change what trained experts compute, rounding aside; the dense MLP's width."""
BOOKKEEPING = {"model_type", "architectures", "transformers_version", "_name_or_path", "auto_map", "text_config"}


@dataclass(frozen=True)
class Crossing:
    """adapter: native names of the source -> names of the target family. config: its config.json.

    lost: what would be lost or wrong, each a sentence. notes: what the target assumes that the source never said.
    """

    adapter: Adapter
    config: dict[str, Any]
    lost: tuple[str, ...]
    notes: tuple[str, ...]


def cross(
    source: Family, model_type: str, config: Mapping[str, Any], native: Mapping[str, TensorSpec], **choices: Any
) -> Crossing:
    """What makes a checkpoint of model_type from one of source: the two adapters in a row, and what that loses.

    config: the source's config.json. native: its tensors, under native names. choices: of the target's layout.
    Raises AdapterError where the experts cannot be carried over at all, or Transformers, which is asked for what the
    target family has, is not there or does not know it.
    """
    target = family(model_type)
    given = as_dict(config)
    here, there = block(source), block(target)
    if here.axes != there.axes:
        ways = f"{source.model_types[0]} [{here.axes}], {model_type} [{there.axes}]"
        raise AdapterError(f"experts of {source.model_types[0]} cannot be {model_type}'s: gate and up lie as {ways}")
    bridge = Adapter() if here.name == there.name else _bridge(here.name, there.name)
    moe = source.adapter(config).moe
    asked = Asked(model_type)
    made = _config(source, target, asked, given, moe)
    theirs, full = asked.holds(target, made)
    ours = bridge.from_hf(dict(native))
    surplus, absent = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    lost = [f"{_some(surplus)}: {model_type} has no such tensors"] if surplus else []
    lost += [f"{_some(absent)}: {model_type} has them, nothing here makes them"] if absent else []
    odd: dict[str, list[str]] = {}
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].shape != theirs[name].shape:
            text = f"shape {list(ours[name].shape)}, {model_type} has {list(theirs[name].shape)}: left out"
            odd.setdefault(text, []).append(name)
    lost += [f"{_some(names)}: {text}" for text, names in odd.items()]
    lost += _unlike(moe, target.adapter(made).moe)
    unsaid = [n for n, v in given.items() if v and n not in spent(source) and not asked.reads(n)]
    lost += [f"config {n}={given[n]!r}: {model_type} has no such field" for n in unsaid]
    notes = [f"config {n}={repr(v)} is {model_type}'s own" for n, v in full.items() if v and n not in made]
    drops = dict.fromkeys(re.sub(r"\.\d+\.", ".{l}.", n, count=1) for n in (*surplus, *sum(odd.values(), [])))
    because = f"{model_type} has no such tensor"
    without = [table([*(drop(n, because=because) for n in drops), keep("{rest}"), *_kept(ours)])] if drops else []
    back = target.adapter(made, **choices).inverse
    adapter = bridge
    for stage in (*without, back):
        adapter = adapter >> stage
    return Crossing(replace(adapter, config=made, moe=back.moe), made, tuple(lost), tuple(notes))


@dataclass(frozen=True)
class Block:
    """Where a family's experts lie natively: the name before `experts.`, and the axes of gate and up."""

    name: str
    axes: str


def block(kind: Family) -> Block:
    """The first rule's that makes `gate_and_up_projs`.

    >>> block(family("mixtral"))
    Block(name='{pre}layers.{l}.mlp.', axes='e d (g i)')
    """
    tables = [stage for stage in kind.rules.stages if isinstance(stage, Table)]
    rules = [entry.target for t in tables for entry in walk(t.entries) if isinstance(entry, Rule)]
    text = next(str(side) for side in rules if side.name.endswith("gate_and_up_projs"))
    name, _, axes = text.removesuffix("]").partition("experts.gate_and_up_projs [")
    return Block(name, axes)


def _bridge(here: str, there: str) -> Adapter:
    stems = [re.fullmatch(r"(\{pre\}layers\.\{l\}\.)(\w+)\.", name) for name in (here, there)]
    if not all(stems):
        raise AdapterError(
            f"experts at {here!r} cannot be put at {there!r}: expected {{pre}}layers.{{l}}.<block>. twice"
        )
    return rename(here + "{rest}", there + "{rest}")


def _kept(names: Iterable[str]) -> list[Adapter]:
    """Keeps that spell the names that a bare one would not pass: those that look like experts'."""
    ends = {re.sub(r"\.\d+\.", ".{l}.", n, count=1) for n in names if "expert" in n or n.endswith("scale_inv")}
    return [keep(end) for end in sorted(ends)]


def spent(kind: Family) -> set[str]:
    """Config fields that a family's own names account for, or that say nothing of the model."""
    named = {n for names in kind.fields.values() for n in names.split()}
    return named | {*kind.words} | BOOKKEEPING | {kind.activation_field}


def _config(
    source: Family, target: Family, asked: "Asked", given: Mapping[str, Any], moe: MoEConfig | str
) -> dict[str, Any]:
    """The target's config: what its MoE fields are called there, and every other field that it reads."""
    made = {n: v for n, v in given.items() if n not in spent(source) and asked.reads(n)}
    values = source.values(given) if isinstance(moe, str) else asdict(moe)
    for field, names in target.fields.items():
        if field == "norm_eps" and field not in source.fields:
            continue  # the whole model's, which a source without such norms says all the same
        if values.get(field) is not None:
            made[min(names.split(), key=lambda n: (not asked.has(n), not asked.reads(n)))] = values[field]
    dim, heads = given.get("hidden_size"), given.get("num_attention_heads")
    if made.get("head_dim", 0) is None and isinstance(dim, int) and isinstance(heads, int) and heads > 0:
        made["head_dim"] = dim // heads  # which a class that takes null derives, and another may not
    if source.activation_field in given:
        made[target.activation_field] = given[source.activation_field]
    return made | {"model_type": asked.model_type} | {n: given[n] for n in ("dtype", "torch_dtype") if n in given}


def _unlike(here: MoEConfig | str, there: MoEConfig | str) -> list[str]:
    """Where two MoE layers compute something else."""
    if isinstance(here, str) or isinstance(there, str):
        return [f"what the experts compute cannot be compared: {here if isinstance(here, str) else there}"]
    a, b = asdict(here), asdict(there)
    if not any(c["latent_norm"] or c["router_norm"] for c in (a, b)):
        b["norm_eps"] = a["norm_eps"]
    return [f"{n} is {a[n]!r} here, {b[n]!r} there" for n in a if n not in TRAINING and a[n] != b[n]]


def _some(names: list[str]) -> str:
    """Names by template, with how many there are of each."""
    found = {template.replace("\0", "*"): len(rows.names) for template, rows in Names(names).rows.items()}
    return ", ".join(f"{t!r}{f' ({n})' * (n > 1)}" for t, n in found.items())


class Asked:
    """What Transformers says of a model type. Raises AdapterError where it is not there, or does not know it."""

    def __init__(self, model_type: str):
        self.model_type = model_type
        try:
            import transformers
        except ImportError as error:
            told = f"pip install transformers ({error})"
            raise AdapterError(f"Transformers says what a family has beside experts: {told}") from None
        try:
            self.config: Any = transformers.CONFIG_MAPPING[model_type]
            self.model: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[self.config]
            self._fields = set(self.config().to_dict())
        except (KeyError, AttributeError):
            text = f"Transformers has no causal language model {model_type!r}, which would say what that family has"
            raise AdapterError(text) from None
        self._base = set(transformers.PretrainedConfig().to_dict())
        self._source = inspect.getsource(sys.modules[self.model.__module__])

    def has(self, field: str) -> bool:
        """Whether its config class has a field, under this name or another."""
        return field in self._fields or field in self.config.attribute_map

    def reads(self, field: str) -> bool:
        """Whether its config class has a field, or its model reads one that the class does not name, as `head_dim`."""
        return self.has(field) or f"config.{field}" in self._source or f'"{field}"' in self._source

    def holds(self, kind: Family, config: dict[str, Any]) -> tuple[dict[str, TensorSpec], dict[str, Any]]:
        """What a checkpoint with this config holds, under native names; and the config with all that it leaves open.

        Adds the model's class to the config, as its `architectures`.
        """
        from transformers.core_model_loading import revert_weight_conversion

        try:
            settings = self.config(**{n: v for n, v in config.items() if n != "model_type"})
            with torch.device("meta"):
                model = self.model(settings)
        except Exception as error:  # whatever a model's own code says of a config that is not made for it
            text = f"Transformers builds no {self.model_type} from the config's fields that carry over"
            raise AdapterError(f"{text}: {type(error).__name__}: {error}") from error
        config["architectures"] = [self.model.__name__]
        tied = model.all_tied_weights_keys if settings.tie_word_embeddings else {}
        saved = revert_weight_conversion(model, {n: t for n, t in model.state_dict().items() if n not in tied})
        specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in saved.items()}
        full = {
            n: v
            for n, v in settings.to_dict().items()
            if n not in self._base | BOOKKEEPING | {*self.config.attribute_map}
        }
        return dict(kind.adapter(config).from_hf(specs)), full
