"""What stands beside a text model, and its head: is it there, and whole? Text-only files have no towers."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fmoe.families.known import class_of, entries, known, lacking
from fmoe.families.numbered import Layers
from fmoe.families.where import settled
from fmoe.types import Problem

HEADS = {
    "ForSequenceClassification": ("score.weight",),
    "ForTokenClassification": ("score.weight", "score.bias"),
    "ForQuestionAnswering": ("qa_outputs.weight", "qa_outputs.bias"),
}
"""The end of a class's name -> what it has in place of a head for tokens."""
_MADE_OF = re.compile(r"For\w+$|(Text)?Model$")


def lost_of_towers(config: Mapping[str, Any], stacks: Mapping[str, Layers]) -> list[str]:
    """What those parts beside the text model lack of which anything is there, in the form that fits best."""
    found = entries(config)
    if not found or not found[1]:
        return []
    bare, ways = stacks.get("", {}).get(0, set()), []
    for form in found[0]["forms"]:
        missing, held = list[str](), 0
        for part, tower in form["towers"].items():
            layers = {s: stacks.get(s, {}) for s in tower["stacks"]}
            names = [
                *(n for n in bare if n.startswith(part)),
                *(n for ls in layers.values() for l in ls.values() for n in l),
            ]
            held += len(names)
            missing += [n for n in tower["root"] if names and n not in bare]
            for stack, groups in tower["stacks"].items() if names else ():
                each = layers[stack] or {0: set()}
                for l in sorted(each):
                    told = settled(form["where"].get(stack, ()), config, l, each[l])
                    lost = {n for n in lacking(groups, each[l]) if told.get(n, True)}
                    lost |= {n for n, there in told.items() if there and n not in each[l]}
                    missing += [f"{stack}.{l}.{n}" for n in sorted(lost)]
        ways.append((held - len(missing), missing))
    return max(ways, key=lambda way: way[0])[1]


def towers(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Parts beside the text model that the class has and of which nothing is there: a text-only checkpoint."""
    found = entries(config)
    if not found or not found[1]:
        return []
    names = list(names)
    absent = lambda form: [part for part in form["towers"] if not any(n.startswith(part) for n in names)]
    return min(map(absent, found[0]["forms"]), key=len)


def lost_of_head(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """What a model for classes or answers lacks of its head.

    >>> lost_of_head({"model_type": "mixtral", "architectures": ["MixtralForSequenceClassification"]}, ["model.norm"])
    ['score.weight']
    """
    found, arch = entries(config), class_of(config) or ""
    if not found or found[1]:
        return []
    return [n for end, head in HEADS.items() if arch.endswith(end) for n in head if n not in names]


def class_note(config: Mapping[str, Any]) -> list[str]:
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
    return [f"config.json names {arch} in architectures, {why}" + ": what stands beside that is not compared" * base]


def class_missed(meant: Mapping[str, Any], problems: Sequence[Problem], names: Collection[str]) -> list[str]:
    """A note on what a config that names no class would lack if it named the usual one; none on parts of a model.

    meant: the config with that class; problems: what it then lacks.

    >>> meant = {"architectures": ["MixtralForCausalLM"]}
    >>> print(*class_missed(meant, [Problem("'lm_head.weight': missing", ("lm_head.weight",))], "abc"))
    config.json names no class in architectures; of MixtralForCausalLM 'lm_head.weight': missing. Fix: name its class
    """
    if not problems or 2 * len({key for p in problems for key in p.keys}) >= len(names):
        return []
    told = "; ".join(problem.text for problem in problems)
    return [f"config.json names no class in architectures; of {class_of(meant)} {told}. Fix: name its class"]
