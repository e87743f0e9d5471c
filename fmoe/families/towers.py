"""What stands beside a text model, as its class has it: is it there, and whole? Text-only files have none of it."""

from collections.abc import Iterable, Mapping
from typing import Any

from fmoe.families.known import entries, lacking
from fmoe.families.numbered import Layers
from fmoe.families.where import settled


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
    return [part for part in found[0]["forms"][0]["towers"] if not any(n.startswith(part) for n in names)]
