"""Which tensors a model has, as Transformers' classes say it: data that `tests/helpers/known/known_names.py` wrote.

An entry is a class: `forms`, as published and as in memory. Of a form, `stem` stands before the layers; `root`: names
outside of layers; `base`: those that its base class has, saved on its own, where that is not what is under the stem;
`tied`: those that are not saved where embeddings are tied; `stacks`: for each stack of layers its modules, each the
smallest sets of names, one of which a layer has; `needs`: what a flag of the config adds to layers with some name;
`where`: which layers have what others have not (`where.py`); `towers`: what stands beside the text model, with a root
and stacks of its own; `others`: what it has besides with some configs. `whole_base` is the same of the base class of
one that has towers or an encoder.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fmoe.families.numbered import BESIDE, Groups, Layers, decoder
from fmoe.families.where import Rules, settled

EMBEDDED = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight")
"""How the input embedding ends, one of the two names of embeddings that are tied."""


@cache
def known() -> dict[str, dict[str, Any]]:
    """Model type -> its entry."""
    return dict(json.loads(Path(__file__).with_name("known.json").read_text()))


def lacking(groups: Groups, layer: set[str], sparse: bool | None = None) -> list[str]:
    """What a layer lacks of the set that is nearest to it, module by module. sparse: if it has experts, where known."""
    missing: list[str] = []
    for sets in groups:
        experts = [s for s in sets if any(".experts." in n for n in s)]
        if sparse is False and len(experts) == len(sets):
            continue
        fit = (experts if sparse else [s for s in sets if s not in experts]) if sparse is not None and experts else sets
        best = min(fit or sets, key=lambda s: (len({*s} - layer) - len({*s} & layer), s))
        missing += [n for n in best if n not in layer]
    return missing


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class that a config names first."""
    found = config.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else None


def with_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says, and what its text model's says before that.

    >>> with_text({"hidden_size": 1, "text_config": {"hidden_size": 2}})["hidden_size"]
    2
    """
    return {**config, **_text(config)}


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("text_config")
    return found if isinstance(found, Mapping) else {}


def entries(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool] | None:
    """The entry of the class that a config names, and whether it is that class's: else only its text model is known.

    Its case is no matter: Phi-3.5-MoE has PhiMoEForCausalLM, and Transformers PhimoeForCausalLM.
    """
    arch = class_of(config)
    entry = known().get(str(config.get("model_type")))
    text = known().get(str(_text(config).get("model_type")))
    if arch is None or not (entry or text):
        return None
    if entry and entry["class"].lower() == arch.lower():
        return entry, True
    if entry and (base := entry.get("whole_base")) and base["class"].lower() == arch.lower():
        return base | {"forms": base["forms"] + [*map(_headless, entry["forms"])]}, True  # it reads the whole's, too
    return text or entry or {}, False


def _either(config: Mapping[str, Any]) -> dict[str, Any] | None:
    return known().get(str(config.get("model_type"))) or known().get(str(_text(config).get("model_type")))


def _headless(form: dict[str, Any]) -> dict[str, Any]:
    return form | {"root": [n for n in form["root"] if "lm_head" not in n and "unembed" not in n]}


def absent(config: Mapping[str, Any], stacks: dict[str, Layers], sparse: set[int] | None, count: int) -> list[str]:
    """Names that the config's class has and that are not there. config: whole, as config.json has it."""
    found = entries(config)
    if not found:
        return []
    entry, whole = found
    said = with_text(config)
    ways = [_absent(f, root, stacks, sparse, count, said) for f in entry["forms"] for root in _roots(f, whole)]
    tied, head = ties(config, entry), any("lm_head" in n for n in stacks.get("", {}).get(0, ()))
    there = lambda name, ends: tied and (name in ends or head and name.endswith(EMBEDDED))  # one of both is enough
    return min(([n for n in missing if not there(n, ends)] for missing, ends in ways), key=len)


def everywhere(config: Mapping[str, Any], form: str) -> bool | None:
    """Whether all layers of a stack have a module of this name, its number a star. None: the class is not known.

    >>> everywhere({"model_type": "jamba"}, "model.layers.*.input_layernorm")
    True
    >>> everywhere({"model_type": "jamba"}, "model.layers.*.self_attn.q_proj")
    False
    """
    entry = _either(config)
    if entry is None:
        return None
    name = form.partition(".*.")[2] + ".weight"
    parts = [part for f in entry["forms"] for part in (f, *f["towers"].values())]
    sets = [s for part in parts for groups in part["stacks"].values() for s in groups if any(name in one for one in s)]
    return bool(sets) and all(name in one for s in sets for one in s)


def ties(config: Mapping[str, Any], entry: Mapping[str, Any] | None = None) -> bool:
    """Whether the output embedding is the input's: the whole model's word on it goes before its text model's.

    But where the text model has a head of its own, as Llama 4's, its word counts.

    >>> ties({"model_type": "qwen3_moe"}), ties({"model_type": "qwen3_moe", "tie_word_embeddings": True})
    (False, True)
    """
    entry = entry or _either(config)
    own = entry and any("language_model.lm_head" in n for n in entry["forms"][-1]["root"])
    said = [c.get("tie_word_embeddings") for c in (config, _text(config))][:: -1 if own else 1]
    return bool(next((v for v in said if v is not None), entry and entry["tied"]))


def _roots(form: Mapping[str, Any], whole: bool) -> Iterator[list[str]]:
    """What a class of this form may have outside of layers: of another class, what the text model has, or its base."""
    inner = [n for n in form["root"] if n.startswith(form["stem"]) and "lm_head" not in n]
    yield form["root"] if whole else inner
    if "base" in form and (not whole or len(form["base"]) == len(inner)):  # as many under other names
        yield [*(n for n in form["root"] if whole and n not in inner), *(form["stem"] + n for n in form["base"])]


def _absent(
    form: Mapping[str, Any],
    root: list[str],
    stacks: dict[str, Layers],
    sparse: set[int] | None,
    count: int,
    said: Mapping[str, Any],
) -> tuple[list[str], set[str]]:
    """What is missing of a form, and those of its names that may be tied, under the stem that is there."""
    main = _main(form)
    here = main if main in stacks or said.get("is_encoder_decoder") else decoder(stacks, form["towers"]) or main
    stem = here.rpartition(".")[0] + "." if "." in here else ""
    moved = lambda name: stem + name.removeprefix(form["stem"]) if name.startswith(form["stem"]) else name
    bare = stacks.get("", {}).get(0, set())
    tail = lambda name: name[name.find("lm_head") :] if "lm_head" in name and not BESIDE.search(name) else None
    held = lambda name: name in bare or tail(name) in map(tail, bare) and tail(name) is not None
    missing = [n for n in map(moved, in_step(root, count)) if not held(n)]
    for stack, groups in form["stacks"].items():
        name, text = moved(stack), stack == main and not said.get("is_encoder_decoder")
        layers = {l: s for l, s in stacks.get(name, {}).items() if not text or l < count}
        for l in sorted({*layers, *(range(count) if text else ())}):
            known_sparse = None if sparse is None or not text else l in sparse
            found = layers.get(l, set())
            told = settled(form["where"].get(stack, ()), said, l, found)
            lost = {*lacking(groups, found, known_sparse), *_unflagged(form["needs"].get(stack, []), found, said)}
            lost = {n for n in lost if told.get(n, True)} | {n for n, there in told.items() if there and n not in found}
            missing += [f"{name}.{l}.{n}" for n in sorted(lost)]
    told = settled(form["where"].get("", ()), said, 0, [*bare, *root])
    mine = [n for n, there in told.items() if there and not n.startswith(tuple(form["towers"]))]  # theirs: `towers`
    missing += [n for n in map(moved, mine) if not held(n)]
    return missing, {moved(n) for n in form["tied"]}


def in_step(root: Iterable[str], count: int) -> list[str]:
    """Names outside of layers, those with a number for so many layers. root: of a class of two.

    >>> in_step(["norm.weight", "queries.0"], 4)
    ['norm.weight', 'queries.0', 'queries.1', 'queries.2']
    """
    made, last = [n for n in root if not n.rpartition(".")[2].isdigit()], dict[str, int]()
    for stem, _, number in (n.rpartition(".") for n in root if n not in made):
        last[stem] = max(int(number), last.get(stem, 0))
    return made + [f"{stem}.{i}" for stem, n in last.items() for i in range(n + count - 1)]


def rules_of(form: Mapping[str, Any], stack: str) -> Rules:
    """Which layers of a stack have what, by a form: of the text model's under any stem.

    >>> form = {"where": {"model.layers": [1]}, "stem": "model.", "towers": {}}
    >>> [rules_of(form, stack) for stack in ("llm.layers", "mtp.layers")]
    [[1], ()]
    """
    own, beside = form["where"], any(f".{part}" in f".{stack}" for part in form["towers"])
    ends = lambda s: s and f".{stack}".endswith(f".{s.removeprefix(form['stem'])}")
    alone = not stack or BESIDE.search(stack) or beside
    return own[stack] if stack in own else () if alone else next((own[s] for s in own if ends(s)), ())


def _unflagged(needs: list[list[Any]], layer: set[str], said: Mapping[str, Any]) -> list[str]:
    """What a layer lacks of that which the config's flags add to what it has."""
    on = [names for field, default, beside, names in needs if beside in layer and said.get(field, default)]
    return [n for names in on for n in names if n not in layer]


def _main(form: Mapping[str, Any]) -> str:
    """The stack of a form's text model."""
    experts = lambda stack: any(".experts." in n for sets in form["stacks"][stack] for s in sets for n in s)
    stem = lambda stack: stack.rpartition(".")[0] + "." if "." in stack else ""
    return next((s for s in form["stacks"] if stem(s) == form["stem"] and experts(s)), form["stem"] + "layers")


def text_stack(config: Mapping[str, Any], stacks: Mapping[str, Layers]) -> str:
    """The stack of the text model's layers: its class's, where that is there or no other is.

    >>> text_stack({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, {"": {0: {"norm.weight"}}})
    'model.layers'
    """
    mains, parts = [_main(form) for form in forms_of(config)], [t for form in forms_of(config) for t in form["towers"]]
    there = next((m for m in mains if m in stacks), "")
    if not there and mains and with_text(config).get("is_encoder_decoder"):  # whose decoder is not in its place
        return _main(nearest(config, stacks)[0])
    return there or decoder(stacks, parts) or next(iter(mains), "")


def recognised(config: Mapping[str, Any], stacks: Mapping[str, Layers]) -> int:
    """How many of the names that are there are the class's, of any form and layer."""
    return _count(class_names(forms_of(config)), stacks)


def nearest(config: Mapping[str, Any], stacks: Mapping[str, Layers]) -> list[dict[str, Any]]:
    """The form whose names are there most, if the class is known."""
    return sorted(forms_of(config), key=lambda form: -_count(class_names([form]), stacks))[:1]


def forms_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list((entries(config) or ({"forms": []}, True))[0]["forms"])


def _count(names: tuple[set[str], tuple[str, ...]], stacks: Mapping[str, Layers]) -> int:
    inside, tails = names
    layers = sum(len(layer & inside) for name, found in stacks.items() if name for layer in found.values())
    return layers + sum(n.endswith(tails) for n in stacks.get("", {}).get(0, ()))


def class_names(forms: list[dict[str, Any]]) -> tuple[set[str], tuple[str, ...]]:
    """All names that a class has in a layer, in these forms, and the ends of those outside of layers."""
    inside = {n for form in forms for groups in form["stacks"].values() for sets in groups for s in sets for n in s}
    others = {n for form in forms for n in form["others"]}
    outside = lambda form: (*form["root"], *form["others"], *form.get("base", ()))
    return inside | others, tuple({n.removeprefix(f["stem"]) for f in forms for n in outside(f)})
