"""What stands beside a text model, and its head: is it there, and whole? Text-only files have no towers."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fmoe.families.known import class_of, entries, known, lacking, with_text
from fmoe.families.numbered import Layers, by_stack, has
from fmoe.families.where import settled
from fmoe.folding import Doubt
from fmoe.types import Problem

HEADS = {
    "ForSequenceClassification": ("score.weight",),
    "ForTokenClassification": ("score.weight", "score.bias"),
    "ForQuestionAnswering": ("qa_outputs.weight", "qa_outputs.bias"),
}
"""The end of a class's name -> what it has in place of a head for tokens."""
OF_LAYERS = re.compile(r"(layers|blocks|block|list)$")
"""How a stack ends whose numbers have no gaps: of a sequence of modules, those without parameters have no name."""
_MADE_OF = re.compile(r"(Text)?(For\w+|Model)$")


def lost_of_towers(config: Mapping[str, Any], stacks: Mapping[str, Layers]) -> list[str]:
    """What the parts beside the text model lack, of sound or of all else, where any of that is there.

    In the form of which most is there.
    """
    found = entries(config)
    if not found or not found[1]:
        return []
    bare, ways = stacks.get("", {}).get(0, set()), []
    for form in found[0]["forms"]:
        missing, held, heard = list[str](), 0, _there(form["towers"], stacks)
        flagged = settled(form["where"].get("", ()), with_text(config), 0, bare)
        for part, tower in form["towers"].items():
            layers = {s: stacks.get(s, {}) for s in tower["stacks"]}
            held += sum(f"{n}.".startswith(part) for n in bare)
            held += sum(len(l) for ls in layers.values() for l in ls.values())
            whole = _sound(part) in heard
            root = [*tower["root"], *(n for n, there in flagged.items() if there and n.startswith(part))]
            missing += [n for n in root if whole and not has(stacks, n)]
            for stack, groups in tower["stacks"].items() if whole else ():
                last = max(layers[stack], default=0)
                for l in range(last + 1) if OF_LAYERS.search(stack) else sorted({*layers[stack], last}):
                    mine = layers[stack].get(l, set())
                    told = settled(form["where"].get(stack, ()), config, l, mine)
                    lost = {n for n in lacking(groups, mine) if told.get(n, True)}
                    lost |= {n for n, there in told.items() if there and n not in mine}
                    missing += [f"{stack}.{l}.{n}" for n in sorted(lost)]
        ways.append((held, -len(missing), missing))
    return max(ways, key=lambda way: way[:2])[2]


def _sound(part: str) -> bool:
    return "audio" in part


def _there(parts: Iterable[str], stacks: Mapping[str, Layers]) -> set[bool]:
    """Whether anything is there of sound, and of all else, of the parts beside a text model."""
    names = [*stacks.get("", {}).get(0, ()), *stacks]
    return {_sound(part) for part in parts if any(f"{n}.".startswith(part) for n in names)}


def towers(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Parts beside the text model of whose kind, sound or all else, nothing is there: a text-only checkpoint."""
    found = entries(config)
    if not found or not found[1]:
        return []
    stacks = by_stack(names)
    ways = [(form["towers"], _there(form["towers"], stacks)) for form in found[0]["forms"]]
    parts, there = max(ways, key=lambda way: len(way[1]))
    none = {what == "audio" for what in ("audio", "vision") if config.get(f"{what}_config", config) is None}
    return [part for part in parts if _sound(part) not in there | none]


def lost_of_head(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """What a model for classes or answers lacks of its head.

    >>> lost_of_head({"model_type": "mixtral", "architectures": ["MixtralForSequenceClassification"]}, ["model.norm"])
    ['score.weight']
    """
    found, arch = entries(config), class_of(config) or ""
    if not found or found[1]:
        return []
    return [n for end, head in HEADS.items() if arch.endswith(end) for n in head if n not in names]


def class_note(config: Mapping[str, Any]) -> list[Doubt]:
    """A note on a class that nobody knows.

    >>> print(*class_note({"model_type": "mixtral", "architectures": ["MyMixtral"]}))
    config.json names MyMixtral in architectures, which is not known: its head and towers are not compared
    """
    found, arch = entries(config), class_of(config)
    if not found or arch is None:
        return []
    kin = _MADE_OF.sub("", str(found[0]["class"])).lower() == _MADE_OF.sub("", arch).lower()
    base = kin and arch.endswith(("Model", *HEADS))
    entry = known().get(str(config.get("model_type"))) or found[0]
    alone = not any(form["towers"] for form in entry["forms"]) and not config.get("is_encoder_decoder")
    if found[1] or base and alone:
        return []
    why = "of which fmoe knows the text model" if base else "which is not known: its head and towers are not compared"
    beside = ": what stands beside that is not compared" * base
    return [Doubt(f"config.json names {arch} in architectures, {why}{beside}")]


def class_missed(meant: Mapping[str, Any], problems: Sequence[Problem]) -> list[Doubt]:
    """A note on what a config that names no class would lack if it named the usual one.

    meant: the config with that class; problems: what it then lacks.

    >>> meant = {"architectures": ["MixtralForCausalLM"]}
    >>> print(*class_missed(meant, [Problem("'lm_head.weight': missing", ("lm_head.weight",))]))
    config.json names no class in architectures; of MixtralForCausalLM 'lm_head.weight': missing. Fix: name its class
    """
    told = "; ".join(problem.text for problem in problems)
    return [Doubt(f"config.json names no class in architectures; of {class_of(meant)} {told}. Fix: name its class")]
