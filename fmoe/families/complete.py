"""Is a checkpoint whole? Its native names against its config, its class in Transformers, and one another.

A layer that the config gives experts has them; what the class has is there (`known`); what one layer of a kind has,
most of that kind have; a layer for multi-token prediction that is there at all is there whole.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fmoe.families.defaults import layers_with_experts, with_class
from fmoe.families.kind import Family, as_dict
from fmoe.families.known import absent, class_of, entries, lacking, recognised, text_stack
from fmoe.families.numbered import Layers, by_stack, groups
from fmoe.families.refused import not_taken
from fmoe.families.sizes import Spell, counted, keys, odd_sizes, spelt
from fmoe.families.sparse import LISTS, declared_ahead, layer_count
from fmoe.families.spelling import renamed
from fmoe.families.surplus import denied, dropped_by_config, told_of, too_deep
from fmoe.families.towers import class_missed, class_note, lost_of_head, lost_of_towers, towers
from fmoe.families.where import translated
from fmoe.folding import Doubt
from fmoe.layout.claims import some
from fmoe.layout.entries import walk
from fmoe.layout.notation import Rule
from fmoe.layout.table import Table
from fmoe.types import Problem

JOINTS = (("eh_proj", "enorm", "hnorm"), ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden"), ("e_proj", "h_proj"))
"""What joins such a layer to the model, under the names of some families."""
ENDS = ("norm", "final_layernorm", "final_norm")
"""What such a layer's last norm is called."""
LAYERS = ("layers", "blocks", "block", "h", "mtp")
PARTS = ("gate_and_up_projs", "down_projs")
NONE = {"shared_intermediate_size": "shared_mlp.", "n_shared_experts": "shared_expert", "num_shared_experts": "shared_"}
"""Config fields that are 0 where the class's parameters of such a name are not there."""
NONE_UNSAID = {"shared_intermediate_size": 0}  # of which a config that says nothing says 0
ZERO, HALVES = re.compile(r"(.*\bzero_experts)\.\d+\."), ("gate", "up")
COUNTED = re.compile(r"layer|interval|period|step|first|skip|offset|freq|shared")


class Gaps(NamedTuple):
    """problems: what is missing, of another size than the config says, or not taken by its class, with names.

    notes: what is absent as a whole, or there though the config says it is not, and may be meant so.
    """

    problems: list[Problem]
    notes: list[str]


def gaps(kind: Family, config: Mapping[str, Any], names: Iterable[str], spell: Spell = lambda name: (name,)) -> Gaps:
    """What a checkpoint with these native names lacks, and, of names with shapes, whose size its config contradicts.

    config: as config.json has it. spell: what a native name is called in the files, as problems and notes name it; it
    is asked only where there are some.

    >>> from fmoe.families import family
    >>> config = {"num_hidden_layers": 2, "num_experts": 4, "mlp_only_layers": [1]}
    >>> gaps(family("qwen3_moe"), config, ["model.layers.0.mlp.gate.weight"]).problems[0].text
    "layer 'model.layers.0' has no experts: expected 'model.layers.0.mlp.experts.gate_and_up_projs', ..."
    """
    names = names if isinstance(names, Mapping) else list(names)
    found, meant = _gaps(kind, config, names, spell), with_class(config)
    if meant == config:
        return found
    told = {key for problem in found.problems for key in problem.keys}
    lost = lambda spell: [p for p in _gaps(kind, meant, names, spell).problems if not told.issuperset(p.keys)]
    none = denied(meant, by_stack(names)) if found.problems else set[str]()
    none |= {*spelt(none, spell)}
    mine = [problem for problem in found.problems if not none.issuperset(problem.keys)]
    more = {key for problem in lost(lambda name: (name,)) for key in problem.keys}
    few = more and 2 * len(more) < len(names)  # else it is a part of a model
    return Gaps(mine, [*found.notes, *(class_missed(meant, lost(spell)) if few else ())])


def _gaps(kind: Family, config: Mapping[str, Any], names: Collection[str], spell: Spell) -> Gaps:
    written, config = config, translated(config)
    said = as_dict(config)
    odd = [*not_taken(written)]
    if isinstance(names, Mapping):
        odd += [*odd_sizes(config, said, names, spell), *too_deep(config, names, spell)]
    names = list(names)
    stacks, count = by_stack(names), None if said.get("is_encoder_decoder") else layer_count(said)
    main = text_stack(config, stacks)
    count = count if count is not None else max(stacks.get(main, {}), default=-1) + 1
    routed = kind.values(said).get("n_routed_experts")
    sparse = set() if routed == 0 else layers_with_experts(config, said, kind.sparse)
    lost = absent(config, stacks, sparse, count) + lost_of_towers(config, stacks) + lost_of_head(config, names)
    lost = [n for n in lost if not any(said.get(f, NONE_UNSAID.get(f)) == 0 and part in n for f, part in NONE.items())]
    other = renamed(lost, config, stacks)
    known = recognised(config, stacks)
    # others' names than Transformers writes
    strange = len(lost) > known and 2 * (len(names) - known) >= len(lost)
    missing = dict.fromkeys([] if strange else [n for n in lost if n not in other])
    ours = {l: held for l, held in stacks.get(main, {}).items() if l < count}
    known_class, told_by = entries(config) is not None and not strange, told_of(config, stacks)
    for stack, layers in stacks.items():
        if layer_count(said) is not None and stack.rpartition(".")[2] in LAYERS:
            text = stack == main
            few = text and not known_class
            alike = _unlike(stack, ours if text else layers, said if text else {}, few)
            rows = ((l, n, n.removeprefix(f"{stack}.{l}.")) for l, n in alike)
            mine = [n for l, n, rest in rows if rest not in told_by(stack, l) and not counted(config, stack, rest)]
            missing |= dict.fromkeys(mine)
    missing |= dict.fromkeys(_zeros(kind.values(said).get("n_zero_experts") or 0, ours, main))
    none = bool(routed) and not any(n.endswith("down_projs") for n in names)
    none = none and not known_class  # of which it is known which layers have another MLP
    experts = _experts(kind, main, ours, sparse, none, spell) + (_uncounted(main, ours, spell) if routed == 0 else [])
    told = {n for problem in experts for n in problem.keys}
    ahead, notes = _ahead(said, main, count, stacks)
    if strange or other:
        count_lost = len(lost if strange else other)
        why = f"{count_lost} names of {class_of(config)} are not here, others are: its names are not compared"
        notes.append(Doubt(why))
    notes += [] if strange else dropped_by_config(written, stacks, main, count, spell)
    notes += [f"no tensor is {part}*: the text model alone" for part in towers(config, names)]
    notes += class_note(config)
    left = [n for n in missing if n not in told]
    by = {f"{s}.{l}.{n}": why for s in stacks if s and left for l in stacks[s] for n, why in told_by(s, l).items()}
    return Gaps([*experts, *_missing(left, spell, by), *_missing(ahead, spell, {}), *odd], notes)


def _missing(names: list[str], spell: Spell, by: Mapping[str, str]) -> list[Problem]:
    """One sentence for all names that differ in numbers alone. by: the config's numbers that ask for a name."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name in names:
        alike.setdefault((re.sub(r"\d+", "#", name), by.get(name, "")), []).append(name)
    why = lambda numbers: f", and config.json has {numbers}" if numbers else ""
    return [
        Problem(f"{some(spelt(same, spell))}: missing{why(numbers)}", keys(same, spell))
        for (_, numbers), same in alike.items()
    ]


def _experts(
    kind: Family, main: str, layers: Layers, sparse: set[int] | None, none: bool, spell: Spell
) -> list[Problem]:
    """Layers that should have experts and have none, or half of them. none: no tensor at all is of experts."""
    ends = lambda layer: {n.rpartition(".")[2] for n in layer}
    if sparse is None:  # the config does not say which; some must have
        sparse = {*layers} if none and main else set()
    problems = []
    for l in sorted(sparse):
        there = layers.get(l, set())
        if lost := [f"{main}.{l}.{_block(kind)}experts.{part}" for part in PARTS if part not in ends(there)]:
            others = sorted(n for n in there if n.startswith(_block(kind)) and not n.endswith(PARTS))
            beside = [f"{main}.{l}.{n}" for n in others]
            found = f"found {', '.join(spelt(beside, spell)[:6])}" if beside else "found nothing"
            expected = ", ".join(map(repr, spelt(lost, spell)))
            text = f"layer {f'{main}.{l}'!r} has no experts: expected {expected}, {found} beside"
            problems.append(Problem(text, keys([*lost, *beside], spell)))
    return problems


def _uncounted(main: str, layers: Layers, spell: Spell) -> list[Problem]:
    """The experts that are there though the config counts none."""
    found = [f"{main}.{l}.{n}" for l, held in layers.items() for n in sorted(held) if n.endswith(PARTS)]
    text = f"{some(spelt(found, spell))}: experts, and config.json counts 0: expected none"
    return [Problem(text, keys(found, spell))] if found else []


def _zeros(count: int, layers: Layers, main: str) -> list[str]:
    """What a layer lacks of zero experts' weights: no model reads them, but Transformers takes all or none."""
    stacks = {(l, m[1]) for l, held in layers.items() for n in held if (m := ZERO.match(n))}
    names = ((l, f"{at}.{e}.{half}_proj.weight") for l, at in sorted(stacks) for e in range(count) for half in HALVES)
    return [f"{main}.{l}.{n}" for l, n in names if n not in layers[l]]


def _block(kind: Family) -> str:
    """What stands between a layer's number and `experts.`, natively."""
    tables = [stage for stage in kind.rules.stages if isinstance(stage, Table)]
    rules = [entry.target for t in tables for entry in walk(t.entries) if isinstance(entry, Rule)]
    name = next(side.name for side in rules if side.name.endswith("gate_and_up_projs"))
    return name.rpartition("}.")[2].removesuffix("experts.gate_and_up_projs")


def _modules(sets: Iterable[Iterable[str]]) -> set[str]:
    return {n.partition(".")[0] for names in sets for n in names}


def _unlike(stack: str, layers: Layers, said: Mapping[str, Any], few: bool) -> Iterator[tuple[int, str]]:
    """Layers, and what each lacks that most others of its kind have. few: that half of them have."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for l in layers:
        kinds.setdefault(_kind(said, l, len(layers)), []).append(l)
    for alike in kinds.values():
        have = Counter(n for l in alike for n in layers[l])
        most = {n for n, times in have.items() if 2 * times > len(alike) or few and 2 * times == len(alike)}
        for l in alike:
            if any(layers[l] < layers[other] for other in alike):
                yield from ((l, f"{stack}.{l}.{n}") for n in sorted(most - layers[l]))


def _kind(said: Mapping[str, Any], l: int, count: int) -> tuple[Any, ...]:
    """All that a config says of one layer: its entry in every list, its side of every number that counts layers."""
    found: list[Any] = []
    for field, value in said.items():
        lists = value.values() if isinstance(value, dict) else [value]
        for each in lists:
            if isinstance(each, list) and l < len(each) >= count > 1 or field in LISTS and isinstance(each, str):
                found.append(str(each[l : l + 1]))
            elif isinstance(each, list):
                found.append((l in each, l + 1 in each))
        if type(value) is int and 1 < value < count and COUNTED.search(field):
            found.append((l < value, l >= count - value, l % value))
    return tuple(found)


def _ahead(said: Mapping[str, Any], main: str, count: int, stacks: Mapping[str, Layers]) -> tuple[list[str], list[str]]:
    """What layers for multi-token prediction lack; a note where the config declares some and there is none."""
    field, declared = declared_ahead(said)
    held = {f"{main}.{l}": s for l, s in stacks.get(main, {}).items() if main and l >= count}
    beside = [s for s in stacks if "mtp" in s.split(".")]
    held |= {f"{s}.{l}": layer for s in beside for l, layer in stacks[s].items() if s.rpartition(".")[2] in LAYERS}
    bare = {n for n in stacks.get("", {}).get(0, set()) if n.startswith("mtp.")}
    if not held and not bare and not declared:
        return [], []
    if not held and not bare:
        where = f"{main}.{count} or mtp"
        return [], [f"config.json has {field} {declared}, and no tensor is of such a layer ({where}): MTP is absent"]
    first, at = (main, count) if held else ("mtp.layers", 0)  # beside what joins it, no layer at all
    missing = [f"{first}.{l}" for l in range(at, at + max(declared, 1))] if len(held) < max(declared, 1) else []
    missing = [n for n in missing if n not in held][: max(declared, 1) - len(held)]
    modules = groups(s for l, s in stacks.get(main, {}).items() if l < count)
    for name, layer in held.items():
        mine, joints = _modules([layer]), {n for names in JOINTS for n in names} | {"final_layernorm"}
        other = mine - _modules(n for sets in modules for n in sets) - joints  # as many modules under other names
        gone = [sets for sets in modules if not _modules(sets) & mine]
        alike = name.startswith(main + ".") or len(other) < len(gone)
        own = [sets for sets in modules if alike or sets not in gone]
        missing += [f"{name}.{n}" for n in lacking(own, layer)]
    last = lambda names: {n.removesuffix(".weight").rpartition(".")[2] for n in names}
    alone = [l for l, s in held.items() if "eh_proj" in last(s) and not last({*s, *bare}) & {*ENDS}]
    missing += [f"{l}.{'shared_head.norm' if l.startswith(main) else ENDS[1]}.weight" for l in alone]
    missing += ["mtp.norm.weight"] * ("fc" in last(bare) and not last(bare) & {*ENDS})
    ends = last((*bare, *(n for s in held.values() for n in s)))
    joint = max(JOINTS, key=lambda names: len(ends & {*names}))
    if ends & {*joint} or any(n.startswith(main + ".") for n in held):
        where = "mtp" if last(bare) & {*joint} else next(iter(held), "mtp")
        missing += [f"{where}.{n}.weight" for n in joint if n not in ends]
    return missing, []
