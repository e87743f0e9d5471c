"""Is a directory whole? What its config, class and own layers demand, and what `fmoe.json` says must come back."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from inspect import currentframe
from typing import Any

from fmoe.checkpoint.files.directory import NATIVE, Checkpoint
from fmoe.checkpoint.files.origin import rules_of
from fmoe.checkpoint.report import CheckpointWarning
from fmoe.codecs.agree import untold
from fmoe.codecs.config import quantization_of
from fmoe.families import FAMILIES
from fmoe.families.complete import Gaps, gaps
from fmoe.families.kind import as_dict
from fmoe.families.refused import check_types
from fmoe.families.sizes import Spell
from fmoe.folding import Doubt
from fmoe.layout.adapter import Adapter
from fmoe.layout.beside import Beside
from fmoe.layout.claims import some
from fmoe.layout.entries import Drop, Entry, walk
from fmoe.layout.grouping import Specs
from fmoe.layout.names import Names
from fmoe.layout.pipeline import Plan
from fmoe.layout.proved.idle import dropped
from fmoe.layout.stage import Stage
from fmoe.layout.table import Table
from fmoe.types import AdapterError, Params, Problem, TensorSpec


def other_rules(source: Checkpoint, adapter: Any) -> list[str]:
    """A note where rules of one's own are not, as they print, those that a native directory was made by."""
    origin = source.origin or {"choices": {}}
    if "rules" not in origin.get("choices", {}) or not isinstance(adapter, Adapter):
        return []
    if rules_of(adapter, origin["weight_map"]) in ({}, {"rules": origin["choices"]["rules"]}):
        return []
    text = f"adapter= prints other rules than {source.path / NATIVE} was made by"
    return [f"{text}: names and shapes fit, values may be swapped. Fix: pass the rules that made it"]


def gaps_of(
    source: Checkpoint, native: Iterable[str], back: Mapping[str, object] | None = None, **choices: Any
) -> Gaps:
    """What a directory lacks, and notes on what is absent as a whole.

    native: its native names. back: of a native directory, the HF names that come back from it. choices: those that
    native was made with; of rules of one's own, and of another system, nobody knows what is whole.
    """
    choices = (source.origin or {}).get("choices", {}) | choices
    foreign = "adapter" in choices or choices.get("system", "native") != "native"
    kind = None if foreign else FAMILIES.get(source.model_type)
    there = lambda: kind.adapter(source.config).resolve(source.specs).inverse if kind else Adapter()
    spell = (lambda name: (name,)) if source.native else spelling(there)
    found = gaps(kind, source.config, native, spell) if kind else Gaps([], [])
    if kind and not source.native:
        found = Gaps(found.problems, [*found.notes, *untold(source.config, source.specs, kind.adapter(source.config))])
    if source.origin is None or back is None:
        return found
    found.notes.extend(other_rules(source, choices.get("adapter")))
    lost = [n for n in source.origin["weight_map"] if n not in back]
    gone = dropped(choices["adapter"].stages, lost) if isinstance(choices.get("adapter"), Adapter) else {}
    told = [
        Problem(
            f"{some([n for n in gone if gone[n] == why])}: {why}, and nothing brings it back",
            tuple(n for n in gone if gone[n] == why),
        )
        for why in dict.fromkeys(gone.values())
    ]
    lost = [n for n in lost if n not in gone]
    text = f"{some(lost)}: in {NATIVE} as what the directory was made from, and no native tensor gives it back"
    return Gaps([*found.problems, *told, *([Problem(text, tuple(lost))] if lost else [])], found.notes)


def spelling(there: Callable[[], Adapter]) -> Spell:
    """What files call a native tensor, by the way there, made once it is asked for; of what they hold in parts, the
    first.
    """
    made = cache(there)

    def spell(name: str) -> list[str]:
        at = [name]
        for stage in made().stages:
            at = stage.resolve(Names(at), default=True).rename(Names(at)) or at
        return at

    return spell


def narrowed(model_type: str, config: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, range]:
    """The ranges among choices, less those of all experts. Raises AdapterError for one of none: nothing reads that."""
    ranges = {n: v for n, v in choices.items() if isinstance(v, range)}
    if empty := [n for n, v in ranges.items() if not v]:
        told = f"{empty[0]}={ranges[empty[0]]}: expected a range of one or more"
        raise AdapterError(f"{told}, since a directory of none is no checkpoint. Fix: write nothing for it")
    kind = FAMILIES.get(model_type)
    count = kind.values(as_dict(config)).get("n_routed_experts") if kind else None
    return {n: v for n, v in ranges.items() if (n, v) != ("e", range(count or 0))}


def no_part(path: object, ranges: Mapping[str, Any], whose: str = "Hugging Face") -> None:
    """Raises AdapterError where another checkpoint than ours would hold a range: its router and config are for all."""
    if ranges:
        held = ", ".join(f"{n}={v}" for n, v in ranges.items())
        text = f"{path} would be a part of a {whose} checkpoint ({held}), with a router and a config for all experts"
        raise AdapterError(f"{text}. Fix: write a part as 'native', or all experts")


def as_they_are(params: Params, back: Mapping[str, object], quantization: bool | None) -> Plan:
    """The plan of a native directory of parameters. back: what comes back from Hugging Face's layout of it.

    quantization: False leaves scales out. Raises AdapterError where it makes codes of what is plain here.
    """
    if new := tuple(n for n in back if n not in params):
        text = f"quantization={quantization} makes codes and scales of these, and layout='native' holds numbers"
        raise AdapterError([Problem(f"{some(new)}: {text}. Fix: layout='hf', or quantization=None", new)])
    held = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in params.items() if quantization is not False or n in back}
    return Plan((), held)


def whole_saved(
    path: object, config: Mapping[str, Any], adapter: Adapter, hf: Specs, ranges: Mapping[str, range]
) -> tuple[str, ...]:
    """The notes on HF tensors that are about to be written. Raises AdapterError where `fmoe.load` would miss any.

    Of a family that is not known, of names that are not its own, and of an adapter that drops some on purpose, nobody
    knows what is whole.
    """
    check_types(config)
    kind = FAMILIES.get(str(config.get("model_type")))
    if kind is None or any(isinstance(entry, Drop) for entry in _entries(adapter.stages)):
        return ()
    try:
        native = kind.adapter(config).resolve(hf)._plan(hf, ranges, frozenset(ranges)).targets
    except AdapterError:
        return ()
    found = gaps(kind, config, native)
    if found.problems:
        fix = (
            "save all of the model, or experts alone as e=range(..) in layout 'native', or by rules that drop the rest"
        )
        raise AdapterError([*found.problems, f"{path} would not be whole, and fmoe.load would refuse it. Fix: {fix}"])
    return tuple(found.notes)


def read_again(config: Mapping[str, Any], before: Mapping[str, Any], hf: Specs) -> None:
    """Raises AdapterError where fmoe would not read codes that are about to be written.

    config: what says that they are codes; before: the config until now.
    """
    kind = FAMILIES.get(str(config.get("model_type")))
    if kind is None or quantization_of(config) in (None, quantization_of(before)):
        return
    try:
        kind.adapter(config).resolve(hf).plan(hf)
    except AdapterError as error:
        text = f"in codes it could not be read again: {error}. Fix: leave quantize= out"
        raise AdapterError([Problem(text, error.keys)]) from None


def json_of(config: Mapping[str, Any]) -> bytes:
    """A config.json of it, in its order: of patterns for names the first that fits counts."""
    return json.dumps(config, indent=2, default=str).encode() + b"\n"


def _entries(stages: Iterable[Stage]) -> Iterator[Entry]:
    for stage in stages:
        if isinstance(stage, Beside):
            yield from _entries((*stage.left, *stage.right))
        elif isinstance(stage, Table):
            yield from walk(stage.entries)


def warned(notes: Iterable[str]) -> None:
    """What of these may be lost, or was not compared, as one warning: of the line outside of fmoe that loads."""
    if doubts := [note for note in notes if isinstance(note, Doubt)]:
        frame, level = currentframe(), 1
        while frame and frame.f_globals["__name__"].partition(".")[0] == "fmoe":
            frame, level = frame.f_back, level + 1
        warnings.warn("\n".join(doubts), CheckpointWarning, level)


def whole(
    source: Checkpoint, native: Iterable[str], back: Mapping[str, object] | None = None, **choices: Any
) -> tuple[str, ...]:
    """The notes on a directory that is whole. Raises AdapterError with all that is missing."""
    found = gaps_of(source, native, back, **choices)
    if found.problems:
        fix = f"{source.path} is not whole: download what is missing, or mend config.json"
        if all("dropped by your rule" in p.text for p in found.problems):
            fix = f"{source.path} cannot give back what it was made from. Fix: convert the original, or keep it there"
        raise AdapterError([*found.problems, fix])
    return tuple(found.notes)
