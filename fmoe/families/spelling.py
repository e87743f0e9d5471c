"""One tensor's several names: in files as published, in memory as its class has it, and in a publisher's own words.

Of names that a class has and a checkpoint has not: are they lost, or spelled in another way?
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fmoe.families.known import class_names, known, lacking, nearest
from fmoe.families.numbered import BESIDE, Layers

_SMALL = re.compile(r"scale|zero_point|inv_freq|lora_")  # beside weights, whatever the class
_WORD = r"(?<![a-z])(%s)(?![a-z])"
ROLES = {
    "norm": re.compile(r"norm|" + _WORD % "ln"),
    "router": re.compile(r"router|correction_bias|" + _WORD % "wg|gate(?!_)"),
    "embed": re.compile(r"emb|wte"),
    "qkv": re.compile(_WORD % "w?[qkv]{1,3}|query|key|value|c_attn|w_pack", re.IGNORECASE),
    "out": re.compile(_WORD % r"w?o|out(?=_proj)|dense"),
    "head": re.compile(r"(?<![a-z_])(lm_head|head|output)\."),
    "mlp": re.compile(_WORD % r"(gate|up|gate_up|down|fc\d?)_proj|w[123]|fc\d?"),
}
ROOTS = (
    {*"embed_tokens embed embedding embeddings tok_embeddings word_embeddings token_embedding wte embed_in".split()},
    {*"lm_head head output output_layer embed_out unembed".split()},
    {*"norm norm_f ln_f final_norm final_layernorm final_layer_norm layer_norm embedding_norm norm_final".split()},
)
"""How publishers spell what is outside of layers, when their layers are spelt as everyone's."""
NEVER = ("router", "mlp")  # one name of these is no other's: a router decides everything, and projections are many


def renamed(lost: Iterable[str], config: Mapping[str, Any], stacks: Mapping[str, Layers]) -> set[str]:
    """Those of the lost names that a publisher spells in another way: no gaps. lost: names that the class has.

    A name that any layer of its stack has under the class's spelling is never one of them. Of the others those are, in
    whose own layer names that the class never has can be what they stand for:

    - a module under another name that holds all that is lost of one (`mlp.gate_proj.weight`, `up`, `down`);
    - others of the same role, as many of them; of query, key and value a third (all in one). Of a module that is
      there, in that module; of another, in none that the class has. A router is never found under another name, a
      bias stands for a bias, and what is of MTP or a tower for nothing of the text model;
    - outside of layers, where all layers are as the class spells them, only a name whose last module publishers are
      known to give it (`ROOTS`).
    """
    inside, tails = class_names(nearest(config, stacks))
    stack_of = lambda name: max((s for s in stacks if s and name.startswith(f"{s}.")), key=len, default="")
    places: dict[tuple[str, int], set[str]] = {}
    for name in lost:
        layer, _, part = name.removeprefix(stack := stack_of(name)).removeprefix(".").partition(".")
        places.setdefault((stack, int(layer)) if stack else ("", 0), set()).add(part if stack else name)
    found: set[str] = set()
    for (stack, number), names in places.items():
        here: set[str] = stacks.get(stack, {}).get(number, set())
        own = {n for n in here if not (n in inside if stack else n.endswith(tails) or BESIDE.search(n))}
        spelt = set[str]().union(*stacks.get(stack, {}).values())
        if stack:
            found |= {f"{stack}.{number}.{n}" for n in _spelt(names - spelt, own, here, inside)}
        else:
            found |= _rooted(names - spelt, own) if {*places} == {("", 0)} else _spelt(names - spelt, own, set(), set())
    return found


def role(name: str) -> str:
    """What a parameter is for, as its name says it; of another, its words.

    >>> [role(f"layers.0.{n}.weight") for n in ("attn.q_proj", "input_layernorm", "mlp.gate", "mlp.gate_proj")]
    ['qkv', 'norm', 'router', 'mlp']
    """
    words = re.findall(r"[^\W\d_]+", name)
    return next((what for what, pattern in ROLES.items() if pattern.search(name)), " ".join(sorted({*words})))


def _module(name: str) -> str:
    return name.partition(".")[0]


def _rooted(gone: set[str], own: set[str]) -> set[str]:
    """Those of the names gone from outside of layers that a known spelling stands for, one each."""
    found, end = set[str](), lambda n: n.removesuffix(".weight").rpartition(".")[2]
    for words in ROOTS:
        lost = {n for n in gone if end(n) in words and n.endswith("weight")}
        if lost and sum(end(n) in words for n in own) >= len(lost):
            found |= lost
    return found


def _spelt(gone: set[str], own: set[str], here: set[str], inside: set[str]) -> set[str]:
    """Those of the names gone from a place that its own names stand for.

    here: all that is there, if in a layer; inside: all that the class has in one.
    """
    held = set(map(_module, here))
    theirs = set(map(_module, inside))
    whole = {n for n in own if not _SMALL.search(n)}
    bias = lambda n: n.endswith("bias")
    place = lambda n: (role(n), bias(n), _module(n) if _module(n) in held else "")
    wanted = Counter(map(place, gone))
    found: set[str] = set()
    for (what, biased, module), count in wanted.items():
        fits = lambda n: _module(n) == module if module else _module(n) not in theirs  # noqa: B023
        alike = lambda n: role(n) == what and bias(n) == biased and fits(n)  # noqa: B023
        rivals = sum(map(alike, whole if what in ROLES else own))
        if what not in NEVER and (3 if what == "qkv" else 1) * rivals >= count:
            found |= {n for n in gone if place(n) == (what, biased, module)}
    for module in sorted(set(map(_module, gone)) - held):
        parts = {n.partition(".")[2] for n in gone if _module(n) == module}
        if all("." in p for p in parts) and any({f"{o}.{p}" for p in parts} <= whole for o in map(_module, whole)):
            found |= {f"{module}.{p}" for p in parts}
    return found


_ADAPTED = re.compile(r"(\.lora_[AB]\.weight|\.lora_embedding_[AB]|\.base_layer\.weight|\.weight)?$")


def alike(config: Mapping[str, Any], name: str) -> list[str]:
    """What the class calls a module, its weight or its LoRA in each form, in memory last; or a name under its stem.

    >>> alike({"model_type": "dots3_note"}, "model.language_model.layers.0.mlp.gate.weight")
    ['model.layers.0.mlp.gate.weight', 'model.language_model.layers.0.mlp.gate.weight']
    >>> alike({"model_type": "aria"}, "vision_tower.encoder.layers.0.mlp.fc1.weight")
    ['vision_tower.encoder.layers.0.mlp.fc1.weight', 'model.vision_tower.encoder.layers.0.mlp.fc1.weight']
    >>> alike({"model_type": "deepseek_v4"}, "model.layers.3.self_attn.q_a_proj")
    ['model.layers.3.attn.wq_a', 'model.layers.3.self_attn.q_a_proj']
    """
    of = str(config.get("model_type"))
    at = _ADAPTED.search(name).start()  # type: ignore[union-attr]
    split = ((name, ""), (name[:at], name[at:]))  # a tensor of another name in files, and its module
    ways = [(star, number, end) for module, end in split for star, number in _starred(module)]
    if made := [n.replace("*", number) + end for s, number, end in ways for n in _modules(of).get(s, ())]:
        return [*dict.fromkeys(n for n in made if n != made[-1]), made[-1]]
    found = [(stem, place) for place in _places(of) for stem in place.stems]
    for stem, place in sorted(found, key=lambda f: -len(f[0])):
        rest = name.removeprefix(stem)
        if name.startswith(stem) and (not place.first or rest.partition(".")[0] in place.first):
            return [s + rest for s in place.stems]
    return [name]


def in_memory(config: Mapping[str, Any], name: str) -> str | None:
    """What a weight of files is called in memory; None: it is no tensor there, but a part of some or several."""
    alone = spelt().get(str(config.get("model_type")), {}).get("", ())
    parts = any(s in alone for n in (name, name.removesuffix(".weight")) for s, _ in _starred(n))
    return None if parts else alike(config, name)[-1]


def layers_with(config: Mapping[str, Any], tensor: str, names: Iterable[str]) -> set[int]:
    """The layers that have this tensor of the class in memory, its number a star, as the kinds of their names tell.

    >>> gate = "model.layers.*.mlp.gate.weight"
    >>> layers_with({"model_type": "qwen3_moe"}, gate, ["model.layers.1.mlp.experts.down_projs"])
    {1}
    """
    stack, _, rest = tensor.partition(".*.")
    forms = known().get(str(config.get("model_type")), {"forms": ()})["forms"][-1:]
    kinds = [p["stacks"][stack] for f in forms for p in (f, *f["towers"].values()) if stack in p["stacks"]]
    layers: dict[int, set[str]] = {}
    for number, _, inside in (n[len(stack) + 1 :].partition(".") for n in names if n.startswith(f"{stack}.")):
        if number.isdigit():
            layers.setdefault(int(number), set()).add(inside)
    return {n for n, here in layers.items() if any(rest in lacking(groups, here - {rest}) for groups in kinds)}


def _starred(module: str) -> Iterator[tuple[str, str]]:
    """A name, and it with each of its numbers a star, with that number."""
    yield module, ""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            yield ".".join((*parts[:i], "*", *parts[i + 1 :])), part


def stars(name: str) -> str:
    """A name, each number in it a star.

    >>> stars("model.layers.3.mlp.fc.0")
    'model.layers.*.mlp.fc.*'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def adapted(config: Mapping[str, Any], module: str) -> dict[str, int] | None:
    """What PEFT adapts as a parameter of a module in memory, and of how many dimensions; {}: it adapts the module.

    None: nobody knows. Of a class that is not known those are modules whose name says that they are linear.

    >>> adapted({"model_type": "gpt_oss"}, "model.layers.3.mlp.router"), adapted({}, "model.layers.3.self_attn.q_proj")
    ({'weight': 2}, {})
    """
    found = held().get(str(config.get("model_type")), {}).get(stars(module))
    last = module.rpartition(".")[2]
    linear = role(f"{last}.weight") in ("qkv", "out", "head", "mlp") and "conv" not in last
    return {} if found is None and linear else found


@cache
def held() -> dict[str, dict[str, dict[str, int]]]:
    """Model type -> modules in memory, as `stars` has them -> as in `adapted`. `tests/helpers/known/known_adapted.py`
    wrote it.
    """
    return dict(json.loads(Path(__file__).with_name("adapted.json").read_text()))


@cache
def spelt() -> dict[str, dict[str, list[str]]]:
    """Model type -> modules in memory, a layer's number a star -> their names in files; none: no tensor of their own.

    A tensor in full, where it is no `weight` on both sides. And "": those in files, of which memory has no tensor.
    Data that `tests/helpers/known/known_spelt.py` wrote.
    """
    return dict(json.loads(Path(__file__).with_name("spelt.json").read_text()))


@cache
def _modules(model_type: str) -> dict[str, list[str]]:
    """Each of a module's names -> all of them, in memory last."""
    return {n: [*of, ours] for ours, of in spelt().get(model_type, {}).items() if ours for n in (*of, ours)}


class Place(NamedTuple):
    """stems: what stands before the same tensors in each form, as published and last as in memory. first: the words
    that follow it; empty: any.
    """

    stems: tuple[str, ...]
    first: frozenset[str]


@cache
def _places(model_type: str) -> tuple[Place, ...]:
    """Where forms differ in what stands before a name; none of a class that has one form, or one stem."""
    forms = known().get(model_type, {"forms": ()})["forms"]
    under = lambda form: (n for n in (*form["root"], *form["stacks"]) if n.startswith(form["stem"]))
    words = {n.removeprefix(form["stem"]).partition(".")[0] for form in forms for n in under(form)}
    text = Place(tuple(form["stem"] for form in forms), frozenset(words))
    beside = [[f"{stack}." for stack in _with_experts(form)] for form in forms]
    towers = [Place(stems, frozenset()) for stems in zip(*beside, strict=True)] if {*map(len, beside)} == {1} else []
    return tuple(place for place in (text, *towers) if len({*place.stems}) > 1)


def _with_experts(form: Mapping[str, Any]) -> Iterator[str]:
    """The stacks beside the text model that have experts."""
    names = lambda groups: (name for sets in groups for one in sets for name in one)
    for tower in form["towers"].values():
        yield from (s for s, groups in tower["stacks"].items() if any(".experts." in n for n in names(groups)))
