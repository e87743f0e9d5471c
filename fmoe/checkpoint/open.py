"""`fmoe.adapter`: by directory, by model type and config, or from your own rules."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.files.fit import layers_fit
from fmoe.checkpoint.files.origin import OWN, held_ranges
from fmoe.checkpoint.remote.address import place
from fmoe.checkpoint.which import open_ours
from fmoe.checkpoint.whole import gaps_of, whole
from fmoe.codecs.carried import written
from fmoe.codecs.parts import in_file
from fmoe.codecs.quantised import Quantised
from fmoe.families import FAMILIES, KNOWN, family
from fmoe.families.kind import Family
from fmoe.folding import meant
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import as_adapter, table
from fmoe.layout.names import Names
from fmoe.layout.pipeline import Plan
from fmoe.systems import adapter as of_system
from fmoe.types import AdapterError, Problem, TensorSpec


def adapter(
    path_or_model_type: "str | Path | Adapter | Iterable[Adapter]",
    config: Any = None,
    *,
    system: str = "native",
    **choices: Any,
) -> Adapter:
    """The adapter of a checkpoint directory, of a `model_type` with its config, or of your own rules side by side.

    A directory is resolved: `to_hf` gives back the layout that is there. A model type is open: `from_hf` settles the
    layout for each call, `to_hf` writes the published one. config: a dict with Hugging Face's field names or a
    Transformers config; without one, sizes are taken from the tensors. choices: `dtype=` casts merged experts,
    `quantized="keep"` moves codes and scales as they are, the others name a layout, as `layout="fused"`.

    system: whose names and axes `from_hf` gives, one of `fmoe.systems.SYSTEMS`; "native" is ours. That of another
    system claims the whole model, and `a.inverse >> b` goes from one to another. What has no place there is refused by
    name; lossy=True leaves it out. Raises AdapterError for an unknown family, system, choice or directory.

    >>> config = {"num_experts": 2, "hidden_size": 4, "moe_intermediate_size": 3, "num_experts_per_tok": 1}
    >>> adapter("qwen3_moe", config).moe_config.n_routed_experts
    2
    """
    if isinstance(path_or_model_type, str) and path_or_model_type in FAMILIES:
        return _made(path_or_model_type, config, system, choices)
    if isinstance(path_or_model_type, str | Path):
        place(path_or_model_type)
        if "://" not in str(path_or_model_type) and not Path(path_or_model_type).exists():
            text = f"{str(path_or_model_type)!r} is neither a directory nor a known model type. {KNOWN}"
            raise AdapterError(text + meant(path_or_model_type, FAMILIES))
        source = open_ours(path_or_model_type, "open", own="adapter" in choices)
        return adapter_of(source, config, system=system, **choices)
    if isinstance(path_or_model_type, Adapter):
        path_or_model_type = [path_or_model_type]
    if choices or config is not None or system != "native":
        raise AdapterError("rules of your own take no config and no choices: bind their letters in `rule`")
    return table(path_or_model_type)


def _made(model_type: str, config: Any, system: str, choices: dict[str, Any]) -> Adapter:
    if isinstance(config, Mapping) and config.get("model_type") is None:  # what its class has is known by it
        config = {**config, "model_type": model_type}
    if system == "native":
        return family(model_type).adapter(config, **choices)
    return of_system(system, model_type, config, **choices)


def adapter_of(checkpoint: Checkpoint, config: Any = None, *, system: str = "native", **choices: Any) -> Adapter:
    """The adapter of an open checkpoint, its alternatives settled by the names of its HF tensors, or its origin's.

    adapter=: one of your own, or a Family, in place of the family's; then there are no other choices.

    >>> import fmoe.docs
    >>> adapter_of(open_ours(fmoe.docs.example(), "open")).moe_config.n_routed_experts
    8
    """
    if (own := choices.pop("adapter", None)) is not None:
        own = as_own(own)
        if isinstance(own, Family):
            own = own.adapter(checkpoint.config)
        if choices or config is not None or system != "native":
            told = ", ".join(choices) or ("a config" if config is not None else f"system={system!r}")
            raise AdapterError(f"adapter= comes with {told}, expected it alone. Fix: adapter.choose(...)")
        return own.resolve(hf_names(checkpoint))
    decodes = lambda n, v: n == "dtype" or n == "quantized" and isinstance(v, str) and v == "decode"
    asked = [f"{n}={v!r}" for n, v in choices.items() if decodes(n, v)]
    if asked and holds_codes(checkpoint):
        text = f"{checkpoint.path} was made with quantized='keep', and holds codes: found {' and '.join(asked)}"
        fix = f"Fix: fmoe convert {checkpoint.path} HF --to hf --dtype bfloat16, then HF"
        raise AdapterError(f"{text}, expected neither. {fix}")
    choices = made_with(checkpoint) | choices
    if config is None:
        layers_fit(checkpoint.path / "config.json", checkpoint.config, checkpoint.specs)
    family(checkpoint.model_type)
    try:
        made = _made(checkpoint.model_type, checkpoint.config if config is None else config, system, choices)
    except ValueError as error:  # a size or a dtype that is none, or a choice that there is not
        where = "" if config is not None or choices else f"{checkpoint.path / 'config.json'}: "
        raise AdapterError(f"{where}{error}") from None
    return made.resolve(hf_names(checkpoint))


def as_own(found: object) -> Adapter | Family:
    """What `adapter=` takes: an adapter, or a Family. Raises AdapterError for anything else.

    >>> as_own(table([])) == table([])
    True
    """
    also = "rule(...) | fmoe.keep(...), or an fmoe.families.Family"
    return found if isinstance(found, Family) else as_adapter(found, also=also)


def made_with(checkpoint: Checkpoint) -> dict[str, str]:
    """The choices that a native directory was made with, as its `fmoe.json` keeps them.

    Raises AdapterError for one that was made with rules of somebody's own: those have to be given.
    """
    choices = dict((checkpoint.origin or {}).get("choices", {}))
    if OWN.items() <= choices.items():
        fix = "Fix: adapter=, --adapter package.module:name"
        raise AdapterError(f"{checkpoint.path} was made with an adapter of your own. {fix}")
    return choices


def bare(made: Adapter, back: Adapter, specs: Mapping[str, TensorSpec]) -> Adapter:
    """made, without scales beside what it decodes where back writes numbers, or codes of which none keep theirs."""
    codec, other = made.stages[0], back.stages[0]
    if not isinstance(codec, Quantised) or not isinstance(other, Quantised):
        return made
    found = in_file(specs, Names(specs), codec.readable, codec.known, codec.lists)[0]
    plain = other.quantization is False or other.was is not None and not written(found, other.fresh)[0]
    return made if not plain else made >> Adapter((replace(codec, flipped=True, quantization=False),))


def holds_codes(checkpoint: Checkpoint) -> bool:
    """Whether it is a native directory of codes and scales, as quantized="keep" makes them."""
    beside = lambda n: any(n[: m.start()] in checkpoint.specs for m in re.finditer("_scale", n))
    return checkpoint.native and made_with(checkpoint).get("quantized") == "keep" and any(map(beside, checkpoint.specs))


def hf_names(checkpoint: Checkpoint) -> Iterable[str]:
    """The names of its HF tensors; of a native one, of those that it was made from."""
    return checkpoint.origin["weight_map"] if checkpoint.origin else checkpoint.specs


def plan_from(source: Checkpoint, there: Adapter, **axis_ranges: range) -> Plan:
    """What an adapter makes of a checkpoint; of a native one that holds a range of an axis, with that range's names.

    >>> import fmoe.docs
    >>> source = open_ours(fmoe.docs.example(), "open")
    >>> len(source.specs), len(plan_from(source, adapter_of(source)).targets)
    (52, 8)
    """
    if (held := held_ranges(source.origin)) and axis_ranges:
        raise AdapterError(f"{source.path} holds the range {held} only: no range of that can be asked for")
    try:
        return there._plan(source.specs, held, frozenset(held)) if held else there.plan(source.specs, **axis_ranges)
    except AdapterError as error:
        raise AdapterError([*error.found, *_besides(source, error.keys)], error.rest) from None


COUNT = re.compile(r"\d+")


def _besides(source: Checkpoint, wrong: Collection[str]) -> list[Problem]:
    """What else a checkpoint lacks, looked for as if the missing ones among the wrong names were there."""
    if source.kind not in FAMILIES:
        return []
    like = {COUNT.sub("0", name): spec for name, spec in source.specs.items()}
    lost = {n: like[COUNT.sub("0", n)] for n in wrong if n not in source.specs and COUNT.sub("0", n) in like}
    try:
        native = source.specs if source.native else adapter_of(source).plan({**source.specs, **lost}).targets
        return [problem for problem in gaps_of(source, native).problems if not {*problem.keys} <= {*wrong}]
    except AdapterError:
        return []


def complete(source: Checkpoint, adapter: Adapter, plan: Plan, to: str, how: Mapping[str, Any]) -> tuple[str, ...]:
    """The notes on a source from which nothing is missing, and on rules that match nothing; else AdapterError."""
    how = {**how, "adapter": adapter} if "adapter" in how else how
    if to == "native":
        return whole(source, plan.targets, **how) + plan.notes
    if not source.native:
        return whole(source, adapter.plan(source.specs).targets, **how) + plan.notes
    same = source.origin and source.origin["weight_map"].keys() == plan.targets.keys()
    back = plan.targets if same or "adapter" in how else plan_from(source, adapter_of(source).inverse).targets
    return whole(source, source.specs, back, **how) + plan.notes
