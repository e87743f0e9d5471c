"""What another system is: for each family that it knows, a table from Hugging Face's names and axes to its own."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fmoe.codecs.quantised import Quantised
from fmoe.families import family
from fmoe.families.kind import KEPT, as_dict
from fmoe.families.known import class_of
from fmoe.folding import meant
from fmoe.layout.adapter import Adapter
from fmoe.layout.entries import walk
from fmoe.layout.notation import Rule
from fmoe.layout.planning import asked_as, check_choices
from fmoe.layout.table import Table
from fmoe.systems.wording.complete import Complete
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.known_names import KnownNames
from fmoe.systems.wording.published import published
from fmoe.systems.wording.shapes import shapes
from fmoe.types import AdapterError, brief

FAMILY = {"qwen3_5_moe_text": "qwen3_5_moe"}
ALWAYS = ("lossy", "quantized", "dtype")


@dataclass(frozen=True, kw_only=True)
class System:
    """A trainer, an engine or a file format, with names and axes of its own for the whole model.

    tables: Hugging Face's model type -> the adapter from its published layout. choices: the system's own, with their
    options, the first by default; an empty tuple takes a whole number. native: the tables go on from our native layout,
    and a family without one has no other names. mark: a pattern that a name in its
    checkpoints fits, and none in others'; unlike: one that tells another's, whose names fit the mark too.
    container: how it stores a checkpoint: "dcp", "safetensors", "gguf", "orbax", or "memory". kept: the
    families of which it can hold quantised tensors as they are.
    verified: what the tables were compared with. source: versions.
    """

    name: str
    tables: Mapping[str, Callable[[Facts], Adapter]]
    container: str
    verified: str
    source: str
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    native: bool = False
    mark: str = ""
    unlike: str = ""

    def knows(self, model_type: str | None) -> bool:
        """Whether it has this family's names."""
        return self.native or FAMILY.get(model_type or "", model_type) in self.tables

    def keeps(self, model_type: str | None) -> bool:
        """Whether it can hold this family's quantised tensors as they are."""
        return self.native or FAMILY.get(model_type or "", model_type) in self.kept

    def marks(self, names: Iterable[str], model_type: str | None) -> bool:
        """Whether a checkpoint's names show that it is this system's: of a family that it knows."""
        return self.knows(model_type) and self.seen(names)

    def seen(self, names: Iterable[str]) -> bool:
        """Whether names show that they are this system's, of whatever family."""
        return bool(self.mark) and _any(self.mark, names) and not (self.unlike and _any(self.unlike, names))

    def marked(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names that show it."""
        return tuple(n for n in names if self.mark and _any(self.mark, (n,)))

    def adapter(self, model_type: str, config: Any = None, **choices: Any) -> Adapter:
        """Hugging Face <-> this system, every tensor claimed.

        lossy=True leaves out what has no place in the system. quantized="keep" moves codes and scales as they are.
        Raises AdapterError for a family or a choice that the system does not know, and for a model without experts.
        """
        kind, name = family(model_type), FAMILY.get(model_type, model_type)
        if self.native:
            return self._from_native(model_type, config, choices)
        if kind.values(said := as_dict(config)).get("n_routed_experts") == 0:
            counts = " or ".join(f for f in kind.fields["n_routed_experts"].split() if said.get(f) == 0)
            found = f"{model_type} with {counts} 0 has no experts, and {self.name}'s tables are of models with some"
            raise AdapterError(f"{found}. Fix: to 'hf' or 'native', or what {self.name} has for dense models")
        if name not in self.tables:
            told = f"{', '.join(self.tables)}{meant(model_type, self.tables)}"
            raise AdapterError(f"system={self.name!r} does not know {model_type!r}: expected one of {told}")
        facts = Facts(self.name, kind, said, self._chosen(choices))
        if facts.keep and not self.keeps(name):
            told = ", ".join(self.kept) or "none"
            raise AdapterError(
                f"system={self.name!r} has no quantized='keep' for {model_type!r}: expected one of {told}"
            )
        plain = kind.adapter(config, **({"dtype": choices["dtype"]} if choices.get("dtype") else {}))
        codec = () if facts.keep else tuple(s for s in plain.stages if isinstance(s, Quantised))
        layouts = {n: v for n, v in choices.items() if n not in self.choices and n not in ALWAYS}
        made = Adapter((*codec, *published(facts).stages, Complete(), shapes(facts))) >> self.tables[name](facts)
        axes = frozenset[str]().union(*(stage.axes() for stage in made.stages))
        known = {n for stage in made.stages for n in stage.choices()}
        for unknown in (n for n in layouts if n not in known):
            if part := asked_as(unknown, layouts[unknown], axes):
                raise AdapterError(f"{unknown}={brief(layouts[unknown])}: {part}")
            if near := meant(unknown, (*self.choices, *ALWAYS)):
                raise AdapterError(f"system={self.name!r} has no choice {unknown}{near}")
        return replace(_whole(made), moe=plain.moe, config=plain.config).choose(**layouts)

    def _from_native(self, model_type: str, config: Any, choices: Mapping[str, Any]) -> Adapter:
        kind = family(model_type)
        made = kind.adapter(config, **{n: v for n, v in choices.items() if n != "lossy"})
        facts = Facts(self.name, kind, as_dict(config), choices)
        table = _whole(self.tables[model_type](facts)) if model_type in self.tables else Adapter()
        entries = (e for s in table.stages if isinstance(s, Table) for e in walk(s.entries))
        rules = tuple(e for e in entries if isinstance(e, Rule) and e.source != e.target)  # x <-> x knows no name
        return made >> Adapter((KnownNames(model_type, class_of(facts.config), rules),)) >> table

    def _chosen(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        check_choices(choices)
        made = {n: options[0] if options else None for n, options in self.choices.items()}
        for name, value in choices.items():
            options = self.choices.get(name)
            if options and value not in options:
                told = " | ".join(map(repr, options))
                raise AdapterError(
                    f"system={self.name!r}: {name}={value!r}, expected {told}{meant(value, map(str, options))}"
                )
            if options == () and (type(value) is not int or value < 1):
                raise AdapterError(f"system={self.name!r}: {name}={value!r}, expected a whole number from 1 on")
            if name == "quantized" and value not in KEPT:
                raise AdapterError(f"quantized={value!r}: expected 'decode' or 'keep'{meant(value, KEPT)}")
            made[name] = value
        return made


def _any(pattern: str, names: Iterable[str]) -> bool:
    plain = pattern.replace("\\.", ".")
    return plain in names if re.escape(plain) == pattern else any(map(re.compile(pattern).fullmatch, names))


def _whole(adapter: Adapter) -> Adapter:
    """The adapter, its tables those of every model of a family: a rule that matches nothing in one is no news."""
    quiet = lambda stage: replace(stage, heard=False) if isinstance(stage, Table) else stage
    return replace(adapter, stages=tuple(map(quiet, adapter.stages)))
