"""What modules are called in published files and in memory: run as a program, this writes fmoe/families/spelt.json.

Every class is built with numbers of its own in each tensor, and Transformers writes it as published: a tensor that is
found again bit for bit is the same under another name.
"""

import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hf
import hf_zoo as zoo
import torch
from known_names import rewrite
from torch import Tensor

import fmoe

FILE = Path(fmoe.families.__file__).with_name("spelt.json")
Pairs = dict[str, list[str]]


def module(name: str, other: str = ".weight") -> str:
    """What a tensor is called in the data: by its module, where it and its other are weights; else in full."""
    return name.removesuffix(".weight") if other.endswith(".weight") else name


def pairs(memory: Mapping[str, Tensor], files: Mapping[str, Tensor]) -> Pairs:
    """A module's name in memory, its layer's number a star -> its names in files, if others; none: no tensor alone.
    A tensor's in full, where it or its other is called otherwise than `weight`.

    Of "": those in files whose tensors are none in memory.
    """
    kind = lambda t: (tuple(t.shape), t.double().sum().item(), t.double().abs().sum().item())
    by = {kind(t): n for n, t in files.items()}
    found: dict[str, set[str]] = {}
    for name, tensor in memory.items():
        other = by.get(kind(tensor))
        if name in files:
            assert kind(files[name]) == kind(tensor), f"{name}: another tensor's name in files"
        elif other is None or not torch.equal(files[other], tensor):
            found.setdefault(starred(module(name), "")[0], set())
        else:
            ours, theirs = starred(module(name, other), module(other, name))
            numbers = [[p for p in n.split(".") if p.isdigit()] for n in (ours, theirs)]
            if numbers[0] == numbers[1] or [] in numbers:  # other layers than these have such, too
                found.setdefault(ours, set()).add(theirs)
    for ours, theirs in found.items():
        for n in (n for n in memory if ours in (starred(module(n), "")[0], starred(n, "")[0])):
            number = re.search(r"(?<=\.)\d+(?=\.)", n)
            there = [t.replace("*", number[0] if number else "") for t in theirs]
            assert sum(t in files or f"{t}.weight" in files for t in there) <= 1, f"{n}: {there}"
    made = {n: sorted(of) for n, of in sorted(found.items()) if n}
    own = {kind(t) for t in memory.values()}
    alone = {starred(module(n), "")[0] for n, t in files.items() if n not in memory and kind(t) not in own}
    return made | ({"": sorted(alone)} if alone else {})


def starred(ours: str, theirs: str) -> tuple[str, str]:
    """Two names, the first number of the one a star, if it is the other's too or that is empty."""
    first = re.compile(r"(?<=\.)\d+(?=\.|$)")
    one, other = first.search(ours), first.search(theirs)
    if one and (not theirs or other and one[0] == other[0]):
        return first.sub("*", ours, count=1), first.sub("*", theirs, count=1)
    return ours, theirs


def spelt(name: str, was: Any) -> Pairs:
    """Of Hugging Face names, and of native ones, beside what another model of this type has."""
    from transformers.core_model_loading import revert_weight_conversion

    model = hf.build(name) if name in hf.MODELS else zoo.build(name)
    drawn = torch.Generator().manual_seed(0)
    tied = model.all_tied_weights_keys or {}
    own = lambda t: torch.randn(t.shape, generator=drawn) if t.is_floating_point() else t
    memory = {n: own(t) for n, t in model.state_dict().items() if n not in tied}
    files, given = revert_weight_conversion(model, dict(memory)), model.config.to_dict()
    adapter = fmoe.adapter(given["model_type"], given)
    wide = lambda n, t: n.endswith(".weight") or t.is_floating_point() and t.ndim > 1  # what LoRA adapts
    alone = lambda d: {n: t for n, t in d.items() if wide(n, t) and ".experts." not in n}
    made = pairs(alone(memory), alone(files)), pairs(*(alone(adapter.from_hf(t)) for t in (memory, files)))
    now, was = merged(name, *made), was or {}  # of another model of this type
    return {n: [*dict.fromkeys([*was.get(n, []), *now.get(n, [])])] for n in (*was, *(n for n in now if n not in was))}


def merged(name: str, theirs: Pairs, native: Pairs) -> Pairs:
    """Hugging Face's names in memory -> all others, native ones in memory last."""
    whose = {t: ours for ours, of in theirs.items() for t in of}
    theirs[""] = [*dict.fromkeys([*theirs.pop("", []), *native.pop("", [])])]
    for ours, of in native.items():
        main = next((whose[t] for t in of if t in whose), ours)
        theirs[main] = [*dict.fromkeys([*theirs.get(main, []), *of, *[ours] * (ours != main)])]
    count = Counter(n for ours, of in theirs.items() for n in (ours, *of))
    assert {*count.values()} <= {1}, f"{name}: one name of two modules: {count.most_common(3)}"
    return {ours: of for ours, of in theirs.items() if ours or of}


def main(names: list[str]) -> None:
    if not names:
        FILE.write_text("{}")
    rewrite(FILE, spelt, names or [n for n in (*hf.MODELS, *zoo.MODELS) if n != "longcat_flash"])


if __name__ == "__main__":
    main(sys.argv[1:])
