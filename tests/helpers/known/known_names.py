"""Which tensors a model has, as Transformers says: run as a program, this writes fmoe/families/known.json.

`known_names.py [--also] [NAME ...]`; also: the forms of another release of Transformers, beside those that are there.

Every class of the zoo is built without memory, once as its tiny config has it and once for each field of that config
with another value (a flag turned, a size gone). What all of them have is required: by name outside of layers; in a
layer, module by module, one of the smallest sets of tensors that a layer was ever seen with.
"""

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import hf
import hf_zoo as zoo
import known_where as where
import transformers
from known_saved import NUMBERED, TOWER, base_of, base_root, originals, saved, towers, unfilled

import fmoe
from fmoe.families import family
from fmoe.families.numbered import by_stack, decoder, groups
from fmoe.families.towers import OF_LAYERS
from fmoe.types import TensorSpec

FILE = Path(fmoe.families.__file__).with_name("known.json")
SIZES = re.compile(
    r"layers|depth|vocab_size|hidden_size|head|_dim$|intermediate|sub_config|num_local_experts|position|token"
)


def base(name: str) -> tuple[Any, Any]:
    """A class of the zoo, and its tiny config."""
    arch, own = copy.deepcopy(hf.MODELS[name] if name in hf.MODELS else zoo.MODELS[name])
    cls = getattr(transformers, arch)
    return cls, cls.config_class(**own) if name in hf.MODELS else zoo.config(cls, own)


def natives(cls: Any, config: Any, name: str, original: bool) -> set[str]:
    """Native names of what a model of this config saves, as published or as in memory; what is tied is not saved."""
    return set(sized(cls, config, name, original))


def sized(cls: Any, config: Any, name: str, original: bool) -> dict[str, TensorSpec]:
    """The same with shapes."""
    given, specs = in_files(cls, config, name, original)
    return fmoe.adapter(given["model_type"], given).from_hf(specs)


def in_files(cls: Any, config: Any, name: str, original: bool) -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    """The config as it is written, and names and shapes of what a model of it saves."""
    return saved(unfilled(cls, config), name, original)


def text_of(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "text_config") else config


def parts_of(config: Any) -> list[Callable[[Any], Any]]:
    """How to get a config's text model, what stands beside it and what that is made of, and the whole."""
    subs = [attrgetter(path[:-1]) for path in where.beside(config.to_dict())]
    whole: list[Callable[[Any], Any]] = [] if text_of(config) is config else [lambda c: c]
    return [text_of, *(part for part in subs if hasattr(part(config), "to_dict")), *whole]


def varied(config: Any, part: Callable[[Any], Any] = text_of) -> Iterator[Any]:
    """The config, with one field after the other of a part of it set to something else; and with one expert."""
    text = part(config)
    fixed = {
        n for f in ("n_routed_experts", "n_activated_experts") for n in family(config.model_type).fields[f].split()
    }
    alone = copy.deepcopy(config)
    for field in fixed & {*text.to_dict()} if text is text_of(config) else ():
        setattr(part(alone), field, 1)
    yield alone
    for field, value in text.to_dict().items():
        if field in fixed or field == "tie_word_embeddings" or field.startswith("_"):
            continue
        plain = "dense" in field or value == 0 and "layers" not in field
        if isinstance(value, bool):
            others: list[Any] = [not value]
        elif value is None:
            others = [True, 8]
        elif isinstance(value, int) and (plain or not SIZES.search(field)):
            others = [0, None, 1, 2]
        elif isinstance(value, list) and value and isinstance(value[0], str):
            kinds = where.kinds(type(config), field, value)
            others = [[kind] * len(value) for kind in kinds] + [[kind, *value[1:]] for kind in kinds]
        elif value == [] and "mlp" in field:  # of layers, by their numbers
            others = [[0], [1]]
        elif isinstance(value, list) and value and isinstance(value[0], int) and "depth" not in field:  # a count
            others = [*([kind] * len(value) for kind in (0, 1)), [1]]
        else:
            continue
        for other in others:
            changed = copy.deepcopy(config)
            target = part(changed)
            try:
                setattr(target, field, other)
                if field == "mlp_only_layers":
                    target.mlp_only_layers = list(range(9))
                yield where.remade(changed) if where.STEPS.search(field) else changed
            except Exception:  # the config's own checks
                continue


def form(name: str, original: bool, variants: bool = True, of: Any = None) -> dict[str, Any]:
    """What a class requires, under native names: see `fmoe.families.known`. of: another class of the same config."""
    cls, config = base(name)
    cls = of or cls
    text_of(config).tie_word_embeddings = config.tie_word_embeddings = False
    seen = [(text_of(config).to_dict(), natives(cls, config, name, original))]
    beside: list[set[str]] = []
    told_by = [(where.flat(config.to_dict(), seen[0][0]), seen[0][1])]
    for part in parts_of(config) if variants else ():
        more = (*where.longer(config, text_of), *where.stepped(config, text_of)) if part is text_of else ()
        for other in (*varied(config, part), *more):
            try:
                names = natives(cls, other, name, original)
            except Exception:  # Transformers builds no such model, or it has other experts than the family's
                continue
            told_by += [(where.flat(other.to_dict(), text_of(other).to_dict()), names)]
            seen += [(text_of(other).to_dict(), names)] if part is text_of else []
            beside += [names] if part is not text_of else []
    found = [names for _, names in seen]
    tied = copy.deepcopy(config)
    text_of(tied).tie_word_embeddings = tied.tie_word_embeddings = True
    root = set.intersection(*map(set, ({n for n in names if not NUMBERED.match(n)} for names in found + beside)))
    main = decoder(by_stack(found[0]))
    stem = main.rpartition(".")[0] + "." if "." in main else ""
    ours = lambda stack: not hasattr(config, "text_config") or stack.startswith(stem) and not TOWER.search(stack)
    always = {n for n in root if ours(n) or "lm_head" in n}
    stacks = sorted({hit[1] for n in found[0] if (hit := NUMBERED.match(n)) and ours(hit[1])})
    least = lambda stack, all_of: groups(s for names in all_of for s in by_stack(names).get(stack, {}).values())
    required = {stack: least(stack, found) for stack in stacks}
    ever = {
        n for names in found + beside for layers in by_stack(names).values() for layer in layers.values() for n in layer
    }
    told = {n for sets in required.values() for least in sets for s in least for n in s}
    parts = towers(config, stem, found[0])
    others = {hit[1] for n in found[0] if (hit := NUMBERED.match(n)) and hit[1].startswith(tuple(parts))}
    always_there = set.intersection(*found, *beside)
    steady = others - {hit[1] for n in found[0] - always_there if (hit := NUMBERED.match(n))}
    in_row = {s for s in steady if not OF_LAYERS.search(s)}
    rows = {n for n in always_there if (hit := NUMBERED.match(n)) and hit[1] in in_row}
    inner = {n.removeprefix(stem) for n in always if n.startswith(stem) and "lm_head" not in n}
    model = unfilled(cls, config)
    own = set[str]() if base_of(model) is model else base_root(model, name, original)
    own -= {n.removeprefix(stem) for n in found[0] - always}  # of some configs alone
    defaults = where.flat(cls.config_class().to_dict(), text_of(cls.config_class()).to_dict())
    told_where = {s: where.placed(told_by, s) for s in ("", *stacks, *sorted(others))} if variants else {}
    return {
        "where": {s: rules for s, mine in told_where.items() if (rules := where.rules(mine, defaults))},
        "stem": stem,
        "root": sorted(always),
        **({"base": sorted(own)} if own and own != inner else {}),
        "tied": sorted(found[0] - natives(cls, tied, name, original)),
        "towers": {
            part: {
                "root": sorted(n for n in root | rows if f"{n}.".startswith(part)),
                "stacks": {s: least(s, found + beside) for s in sorted(others - in_row) if s.startswith(part)},
            }
            for part in parts
        },
        "stacks": required,
        "needs": {stack: found_needs for stack in stacks if (found_needs := needs(cls, seen, stack, told))},
        "others": sorted(ever - told - always),
    }


def needs(cls: Any, seen: list[tuple[dict[str, Any], set[str]]], stack: str, told: set[str]) -> list[list[Any]]:
    """[field, whether it is on where a config does not say, a name, the names that a layer with that name then has]."""
    rows = [(given, layer) for given, names in seen for layer in by_stack(names).get(stack, {}).values()]
    defaults = text_of(cls.config_class()).to_dict()
    fields = [n for n, v in seen[0][0].items() if v is None or isinstance(v, int)]
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted({n for _, layer in rows for n in layer} - told):
        near = set.intersection(*(layer for _, layer in rows if name in layer)) - {name}
        near = {n for n in near if n.partition(".")[0] == name.partition(".")[0]}
        twin = re.sub(r"bias$", "weight", name)
        anchors = sorted(near, key=lambda n: (n != twin, not n.endswith("down_projs"), n))
        for anchor, field in ((a, f) for a in anchors for f in fields):
            mine = [(bool(given.get(field)), name in layer) for given, layer in rows if anchor in layer]
            if {*mine} == {(True, True), (False, False)}:
                found.setdefault((field, anchor), []).append(name)
                break
    return [[field, defaults.get(field) is True, anchor, names] for (field, anchor), names in sorted(found.items())]


def data(name: str) -> dict[str, Any]:
    """A class's entry: its forms on disk, as published and as in memory where they differ."""
    cls, config = base(name)
    base_class = two_parts(name)
    return made_of(name, cls) | ({"whole_base": made_of(name, base_class)} if base_class else {})


def made_of(name: str, cls: Any) -> dict[str, Any]:
    """The entry of one class, of a name's config."""
    forms = [form(name, original, of=cls) for original in originals(name)]
    return {
        "class": cls.__name__,
        "tied": bool(getattr(cls.config_class(), "tie_word_embeddings", False)),
        "forms": forms[: 1 + (forms[0] != forms[-1])],
    }


def two_parts(name: str) -> Any:
    """The base class of a class that has a tower or an encoder beside its text model; None of another."""
    cls, config = base(name)
    if not (hasattr(config, "text_config") or config.is_encoder_decoder):
        return None
    named = getattr(transformers, re.sub(r"For\w+$", "Model", cls.__name__), None)
    found = named or type(base_of(unfilled(cls, config)))
    return None if found is cls else found


def main(names: list[str]) -> None:
    also = names[:1] == ["--also"]

    def forms(name: str, was: dict[str, Any] | None) -> dict[str, Any]:
        there, found = (was or {"forms": []})["forms"], data(name)
        more = [*there, *(f for f in found["forms"] if f not in there)]
        return found | {"forms": more if also else found["forms"]}

    rewrite(FILE, forms, names[also:])


def rewrite(file: Path, of: Callable[[str, Any], Any], names: list[str]) -> None:
    """Data by model type, made again for these models, or for all: of(name, what was there), kept one by one."""
    transformers.logging.set_verbosity_error()
    made = json.loads(file.read_text()) if file.exists() else {}
    for name in names or [*hf.MODELS, *zoo.MODELS]:
        made[family_type(name)] = of(name, made.get(family_type(name)))
        file.write_text(json.dumps(made, sort_keys=True, separators=(",", ":")) + "\n")
        print(name, flush=True)


def family_type(name: str) -> str:
    return str(base(name)[1].model_type)


if __name__ == "__main__":
    main(sys.argv[1:])
