"""What a checkpoint is, in one dict that a person or a machine can read: family, layout, experts, sizes, problems."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.look.sizes import by_kind, by_layer, names_of, parameters
from fmoe.checkpoint.open import adapter_of, as_own, hf_names, plan_from
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.sides import adapters, gaps_between
from fmoe.checkpoint.staging.beside import an_adapter
from fmoe.checkpoint.stream.slices import groups
from fmoe.checkpoint.which import open_source, side
from fmoe.checkpoint.whole import gaps_of
from fmoe.families import family
from fmoe.families.kind import Family, as_dict
from fmoe.folding import apart, short
from fmoe.layout.adapter import Adapter
from fmoe.layout.claims import some
from fmoe.layout.entries import Keep, walk
from fmoe.layout.names import Names, hits
from fmoe.layout.pipeline import Plan
from fmoe.layout.table import Table
from fmoe.types import EXPERT_TENSORS, AdapterError, brief


def inspect(
    path: Where | str,
    *,
    config: Any = None,
    from_: str | None = None,
    trust_pickle: bool = False,
    adapter: Adapter | Family | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """Family, layout, expert layers, dtypes, sizes and problems of a directory; no tensor is read.

    problems: why it does not convert; notes: what else one may want to know. Raises AdapterError where the directory
    cannot be opened at all. config, from_, trust_pickle: as in `fmoe.convert`, of another system's directory.
    adapter: one of your own, in place of the family's. Choices, as e=range(0, 2), are `fmoe.load`'s, and refused here.

    >>> import fmoe.docs
    >>> found = inspect(fmoe.docs.example())
    >>> found["model_type"], found["tensors"], found["problems"]
    ('qwen3_moe', 52, [])
    """
    if choices:
        told = ", ".join(f"{n}={brief(v)}" for n, v in choices.items())
        raise AdapterError(
            f"inspect: {told}, expected no choice: it looks at all of {path}. Fix: fmoe.load takes {told}"
        )
    own = {} if adapter is None else {"adapter": as_own(adapter)}
    source = open_source(path, config, bool(own), trust_pickle, from_)
    here = ("native" if source.native else "hf") if own else side(source, from_)
    dtypes: Counter[str] = Counter()
    for spec in source.specs.values():
        dtypes[str(spec.dtype).removeprefix("torch.")] += spec.nbytes
    found: dict[str, Any] = {
        "path": str(source.path),
        "model_type": source.kind if own else source.model_type,
        "format": here,
        "tensors": len(source.specs),
        "files": len(set(source.files.values())),
        "bytes": source.nbytes,
        "dtypes": dict(dtypes.most_common()),
        "layout": {},
        "experts": None,
        "moe_config": None,
        "rules": [],
        "lossless": None,
        "problems": [],
        "notes": [],
        "quantised": _quantised(source),
        "carried": sorted(str(name) for name in source.others()),
        "parameters": None,
        "kinds": {},
        "layers": by_layer(source.specs),
        "rules_used": [],
    }
    try:
        found |= _experts(source, own) if here in ("hf", "native") else _of_system(source, here)
    except AdapterError as error:
        found["problems"] = list(error.problems)
    if unread := [str(p) for p in source.others() if p.suffix == ".safetensors" and p.parent == Path()]:
        found["notes"] = [*found["notes"], f"not in the index, so not read: {some(unread)}"]
    found["notes"] = [*found["notes"], *an_adapter(found["carried"])]
    return found


def _of_system(source: Checkpoint, here: str) -> dict[str, Any]:
    """The same of another system's directory, as far as our native layout of it says it."""
    adapter, there = adapters(source, here, "native", lossy=True)
    plan = plan_from(source, there)
    missing = gaps_between(source, here, adapter)
    stacks = {n: spec for n, spec in plan.targets.items() if n.rpartition(".")[2] in EXPERT_TENSORS}
    shapes = {bare: list(spec.shape) for bare in EXPERT_TENSORS for n, spec in stacks.items() if n.endswith(bare)}
    layers, size = dict.fromkeys(n.rpartition(".")[0] for n in stacks), sum(spec.nbytes for spec in stacks.values())
    facts = {"layers": len(layers), "shapes": shapes, "bytes": size}
    said = {} if isinstance(adapter.moe, str) else asdict(adapter.moe)
    config = {n: str(v) if n == "dtype" else v for n, v in said.items()} or None
    found = {"problems": [problem.text for problem in missing.problems], "notes": missing.notes}
    rules = str(adapter).split("\n")
    return found | {"experts": facts, "moe_config": config, "lossless": there.lossless, "rules": rules}


def _experts(source: Checkpoint, own: dict[str, Any]) -> dict[str, Any]:
    adapter = adapter_of(source, **own)
    facts: dict[str, Any] = {"lossless": adapter.lossless, "rules": str(adapter).split("\n")}
    try:
        config = asdict(adapter.moe_config)
        facts["moe_config"] = config | {"dtype": str(config["dtype"]).removeprefix("torch.")}
    except AdapterError as error:
        facts["notes"] = list(error.problems)
    plan = plan_from(source, adapter.inverse if source.native else adapter)
    found = gaps_of(source, source.specs if source.native else plan.targets, plan.targets, **own)
    facts["problems"] = [problem.text for problem in found.problems]
    facts["notes"] = [*facts.get("notes", ()), *found.notes]
    native = source.specs if source.native else plan.targets
    stacks = {n: spec for n, spec in native.items() if n.rpartition(".")[2] in EXPERT_TENSORS}
    layers = dict.fromkeys(n.rpartition(".")[0] for n in stacks)
    shapes = {bare: list(spec.shape) for bare in EXPERT_TENSORS for n, spec in stacks.items() if n.endswith(bare)}
    units = (s for s, targets in plan.units() if not stacks.keys().isdisjoint(s if source.native else targets))
    size = sum(source.specs[n].nbytes for sources in units for n in sources)
    facts["experts"] = {"layers": len(layers), "shapes": shapes, "bytes": size}
    kinds = by_kind(source.specs, names_of(plan.units(), stacks, source.native), native, stacks)
    moe = None if isinstance(adapter.moe, str) else adapter.moe
    facts |= {"kinds": kinds, "parameters": parameters(kinds, moe), "rules_used": _used(adapter, plan)}
    return facts | {"layout": {} if own else _layout(source, adapter)}


def _used(adapter: Adapter, plan: Plan) -> list[str]:
    """The lines of the adapter that say what is done here: its rules with a group, and its keeps of a name."""
    used = {short(str(rule)) for group in groups(plan) for rule in (group.rule, group.rule.inverse)}
    kept = Names({*plan.sources, *plan.targets})
    keeps = (e for stage in adapter.stages if isinstance(stage, Table) for e in walk(stage.entries))
    used |= {str(e) for e in keeps if isinstance(e, Keep) and any(hits(e.rule, kept))}
    return [line for line in str(adapter).split("\n") if not used.isdisjoint(apart(line.strip()))]


def _quantised(source: Checkpoint) -> str | None:
    """What config.json says of quantisation, in a few words."""
    found = source.config.get("quantization_config") or as_dict(source.config).get("quantization_config")
    if not isinstance(found, dict):
        return None
    facts = [str(found.get("quant_method") or found.get("quant_algo") or "by a method that it does not name")]
    facts += [f"{name} {found[name]}" for name in ("fmt", "format", "weight_block_size", "bits") if found.get(name)]
    return ", ".join(facts)


def _layout(source: Checkpoint, adapter: Adapter) -> dict[str, str]:
    """What the names settle: the choices that one may give to `fmoe.adapter` to name this layout."""
    opened, names = family(source.model_type).adapter(source.config), hf_names(source)
    choices = {n: o for stage in opened.stages if isinstance(stage, Table) for n, o in stage.choices().items()}
    fits = lambda name, label: opened.choose(**{name: label}).resolve(names) == adapter
    return {name: label for name, labels in choices.items() for label in labels if fits(name, label)}
