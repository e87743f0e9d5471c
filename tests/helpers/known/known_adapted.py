"""How PEFT adapts what a model holds, as Transformers has it: run as a program, this writes fmoe/families/adapted.json.

`known_adapted.py [NAME ...]`. Every class is built without memory, as `known_names.py` builds it: as its tiny config
has it, and once for each field of that config with another value.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf
import hf_zoo as zoo
import known_names
import known_where as where
import torch
from known_saved import unfilled
from peft_cases import adapter_of, build, parameters
from torch import nn

import fmoe
from fmoe.families.spelling import stars

FILE = Path(fmoe.families.__file__).with_name("adapted.json")
LINEAR = (nn.Linear, nn.Embedding)
Held = dict[str, dict[str, int]]


def held(model: Any, experts: tuple[str, ...]) -> Held:
    """A module in memory, each number in its name a star -> what it has that PEFT wraps as a parameter alone, and of
    how many dimensions it is; nothing: PEFT wraps the module.

    experts: the ends of those that a family's rules name, which are left out, as what else is below `experts` is. A
    convolution's weight is one that PEFT wraps in both ways.
    """
    made: Held = {}
    for module, part in model.named_modules():
        for name, p in part.named_parameters(recurse=False):
            linear, full = isinstance(part, LINEAR), f"{module}.{name}"
            ours = full.endswith(experts) or ".experts." in full and name != "weight"
            if linear or p.ndim in (2, 3) and not ours:
                made.setdefault(stars(module), {}).update({} if linear else {name: p.ndim})
    return made


def models(name: str) -> Iterator[Any]:
    """The models of a class without memory: its own, and one of each config with another value."""
    cls, config = known_names.base(name)
    yield unfilled(cls, config)
    for part in known_names.parts_of(config):
        more = (*where.longer(config, part), *where.stepped(config, part)) if part is known_names.text_of else ()
        for other in (*known_names.varied(config, part), *more):
            try:
                yield unfilled(cls, other)
            except Exception:  # Transformers builds no such model
                continue


def adapted(name: str) -> Held:
    """Of all models of a type."""
    alike = known_names.family_type(name)
    made: Held = {}
    for n in (n for n in (*hf.MODELS, *zoo.MODELS) if known_names.family_type(n) == alike):
        experts = tuple(parameters(adapter_of(build(n))))
        for model in models(n):
            for module, found in held(model, experts).items():
                was = made.setdefault(module, found)
                assert was == found, f"{name}: {module} holds {found}, and {was} elsewhere"
    return dict(sorted(made.items()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    known_names.rewrite(FILE, lambda name, was: adapted(name), sys.argv[1:])
