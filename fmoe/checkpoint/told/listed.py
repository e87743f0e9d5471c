"""A written config.json names what stayed plain as files do and as Transformers does, which hits modules in memory."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from fmoe.codecs.agree import agreeing
from fmoe.codecs.config import quantization_of, with_told
from fmoe.codecs.foreign.lists import IGNORED, lists
from fmoe.codecs.foreign.undecoded import narrow
from fmoe.families.known import known, ties
from fmoe.families.spelling import alike, in_memory, spelt
from fmoe.families.surplus import known_ranks
from fmoe.layout.adapter import Adapter
from fmoe.layout.grouping import Specs

_PART = re.compile(r"\.weight(_\w+)?$")


def listing(
    config: Mapping[str, Any], adapter: Adapter, specs: Specs, dtype: "torch.dtype | str | None" = None
) -> dict[str, Any]:
    """The config of a Hugging Face directory that holds these tensors, as an adapter wrote them.

    A list of what is plain that is new, or longer, has the names in memory too. dtype: what floats have become.
    """
    made = agreeing(config, adapter, specs, dtype)
    told = quantization_of(made) or {}
    field = next((n for n in IGNORED if told.get(n)), None)
    if field is None or told == quantization_of(config):
        return made
    said = lists(told)
    plain = [n for n, s in specs.items() if not narrow(s.dtype) and said.ignore.first(n) is not None]
    coded = [_PART.sub(".weight", n) for n, s in specs.items() if narrow(s.dtype)]
    more = [n for n in in_classes(made, plain, coded) if n not in told[field]]
    return with_told(made, told | {field: [*told[field], *more]}) if more else made


def in_classes(config: Mapping[str, Any], plain: Collection[str], coded: Collection[str]) -> Iterator[str]:
    """What the class calls in memory the modules of plain tensors, each once, and the tied head, of which none is.

    plain, coded: names of tensors in files. A module that is made of several of them, or of a part of one, is plain
    where all that the class has beside it is.
    """
    of = str(config.get("model_type"))
    ours = {n: alike(config, n)[-1] for n in (*plain, *coded)}
    found = dict.fromkeys(ours[n] for n in plain if n.endswith(".weight") and in_memory(config, n))
    found |= dict.fromkeys(f"{m}.weight" for m in _of_parts(of, {ours[n] for n in plain}, {ours[n] for n in coded}))
    found |= dict.fromkeys(_experts(of, {ours[n] for n in plain}, {ours[n] for n in coded}))
    heads = {n for form in known().get(of, {"forms": ()})["forms"][-1:] for n in form["tied"] if "head" in n}
    if ties(config):
        found |= dict.fromkeys(sorted(heads - {*ours.values()}))
    yield from dict.fromkeys(n.removesuffix(".weight") for n in found)


def _of_parts(of: str, plain: Collection[str], coded: Collection[str]) -> Iterator[str]:
    """The matrices of the class that no tensor of files is alone, and beside which all is plain."""
    ranks = known_ranks(of)
    for module in sorted(m for m, files in spelt().get(of, {}).items() if m and not files):
        stack, star, rest = module.partition("*")
        if module.endswith("bias") or ranks.get(f"#{rest}.weight", 2) not in (2, None):
            continue
        numbers = {n.removeprefix(stack).partition(".")[0] for n in plain if n.startswith(stack)} if star else {""}
        for number in sorted((n for n in numbers if n.isdigit() or not star), key=lambda n: int(n or 0)):
            made = module.replace("*", number)
            if not any(n.startswith(_beside(made, (*plain, *coded))) for n in coded):
                yield made


def _beside(module: str, names: Collection[str]) -> str:
    """The innermost module around one that has any of these names, with its dot."""
    parent = module.rpartition(".")[0]
    while parent and not any(n.startswith(f"{parent}.") for n in names):
        parent = parent.rpartition(".")[0]
    return f"{parent}." if parent else f"{module}."


def _experts(of: str, plain: Collection[str], coded: Collection[str]) -> Iterator[str]:
    """The modules of all experts of a layer, in layers of which some are plain and none are codes."""
    for form in known().get(of, {"forms": ()})["forms"][-1:]:
        for part in (form, *form["towers"].values()):
            for stack, groups in part["stacks"].items():
                modules = {n.partition(".experts.")[0] for g in groups for s in g for n in s if ".experts." in n}
                for number in sorted(_with_experts(plain, stack) - _with_experts(coded, stack), key=int):
                    yield from (f"{stack}.{number}.{m}.experts" for m in sorted(modules))


def _with_experts(names: Collection[str], stack: str) -> set[str]:
    """The layers of a stack that have experts among these names."""
    inside = (n.removeprefix(f"{stack}.") for n in names if n.startswith(f"{stack}."))
    return {n.partition(".")[0] for n in inside if ".experts." in n}
