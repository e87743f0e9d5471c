"""Have a checkpoint's tensors the sizes that its config says? What Transformers makes of a config's numbers, as data.

`sizes.json`, which `tests/helpers/known/known_sizes.py` wrote: model type -> a formula of config fields (`formula.py`)
-> the dimensions that are that: a native name, `#` for the layer, and which; -1: how many layers a stack has, or a
stack in each layer of another; -2: how many tensors a list. A name that starts with `#` is of the text model's layers;
with `#layer_types=word`, of those of which that list says the word.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fmoe.families.defaults import with_taken
from fmoe.families.formula import fields, value, words
from fmoe.families.kind import COUNTS
from fmoe.families.known import entries, nearest, text_stack, with_text
from fmoe.families.numbered import NUMBERED, Layers, by_stack
from fmoe.families.sparse import layer_count
from fmoe.layout.claims import some
from fmoe.types import EXPERT_TENSORS, Problem

Spell = Callable[[str], Sequence[str]]
"""What a native name is called in the files: one name, or some of what is stacked."""


def spelt(names: Iterable[str], spell: Spell) -> list[str]:
    return list(dict.fromkeys(n for name in names for n in spell(name)))


def keys(names: Iterable[str], spell: Spell) -> tuple[str, ...]:
    """What a problem of native names is about: what files call them, and they."""
    return tuple(dict.fromkeys([*spelt(names, spell), *names]))


class Expected(NamedTuple):
    """A size, and the config's fields that say it, with what they are."""

    size: int
    told: str


class Odd(NamedTuple):
    """A dimension k of a tensor that is of another size than expected, or not there."""

    name: str
    k: int
    found: int | None
    expected: Expected


LAYERS, LIST = -1, -2
BY_LAYER = re.compile(r"\[l|\bl in |\bif l\b")
PARTS = ("vision_config", "audio_config", "attn_config", "ffn_config")


@cache
def known_sizes() -> dict[str, dict[str, list[list[Any]]]]:
    return dict(json.loads(Path(__file__).with_name("sizes.json").read_text()))


def counted(config: Mapping[str, Any], stack: str, name: str) -> bool:
    """Whether the config says how many there are of that stack within a layer of which a name is."""
    hit = NUMBERED.match(name)
    ways = [[f"{stem}{stack}.#.{hit[1]}.#", LAYERS] for stem in ("", "model.")] if hit else []
    return any(at in dims for dims in known_sizes().get(str(config.get("model_type")), {}).values() for at in ways)


def stem_of(native: Iterable[str]) -> str:
    """What a base that is saved on its own has not before its names."""
    return "" if any(n.startswith("model.") for n in native) else "model."


def odd_sizes(
    config: Mapping[str, Any], said: Mapping[str, Any], native: Mapping[str, Any], spell: Spell = lambda name: (name,)
) -> Iterator[Problem]:
    """A problem for each size that the config says and tensors have not, where its class in Transformers is known.

    config: as config.json has it; said: it and its text model's fields. native: names -> what has a shape and a dtype.
    spell: as in `complete.gaps`.

    >>> import torch
    >>> config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 9}
    >>> [problem] = odd_sizes(config, config, {"lm_head.weight": torch.ones(8, 4)})
    >>> problem.text
    "'lm_head.weight': 8 in dimension 0, and config.json has vocab_size 9: expected 9"
    """
    entry = entries(config)
    if entry is None:
        return
    own, written = ({**with_text(c), **{p: c[p] for p in PARTS if p in c}} for c in (with_taken(config), config))
    stacks, count = by_stack(native), layer_count(said)
    main = text_stack(config, stacks)
    here = {**stacks, main: {l: n for l, n in stacks.get(main, {}).items() if count is None or l < count}}
    stem, of_main = stem_of(native), stacks.get(main, {})
    two = entry[1] and said.get("is_encoder_decoder")  # of which neither is ever left out
    needed = {stack for form in nearest(config, stacks) for stack in form["stacks"]} if two else set[str]()
    counts = {(main, l): _experts(native, f"{main}.{l}", names) for l, names in of_main.items()}
    apart = {f"{path}{f}" for path, part in _parts(own) for each in _each(part).values() for f in each}
    for formula, dims in known_sizes().get(str(config.get("model_type")), {}).items():
        exact = bool(BY_LAYER.search(formula)) or not apart.isdisjoint(fields(formula))
        odd, doubtful = list[Odd](), list[tuple[Odd, tuple[str, int], bool]]()
        agreed = {**counts} if {*COUNTS} & {*fields(formula)} else {}
        for template, k in dims:
            template = template.removeprefix(stem)
            at, numbered, rest = template.partition("#")
            stack = at[:-1] or main
            says = lambda l: _expected(formula, own, written, l, stack == main)  # noqa: B023
            if k == LIST:
                yield from _list(stack, says(-1), native, stacks, spell)
                continue
            if k == LAYERS:
                inner = rest.strip(".#")
                for l, mine in stacks.get(stack, {}).items() if inner else ():
                    yield from _layers(f"{stack}.{l}.{inner}", says(l), by_stack(mine).get(inner, {}))
                yield from () if inner else _layers(stack, says(-1), stacks.get(stack, {}), stack in needed)
                continue
            kind, _, rest = rest.partition(".") if numbered else ("", "", "")
            places = {f"{stack}.{l}.{rest}": l for l in here.get(stack, ()) if _of(kind, own, l)}
            held = {n: l for n, l in (places if numbered else {template: -1}).items() if plain(native.get(n))}
            each = exact or bool(kind)
            alike = None if each else says(-1)
            wanted = {n: size for n, l in held.items() if (size := says(l) if each else alike)}
            sizes = {n: native[n].shape[k] if len(native[n].shape) > k else None for n in wanted}
            if numbered and rest in ("weight", "bias"):  # modules in a row, of any kinds
                wanted = {n: size for n, size in wanted.items() if sizes[n] is not None}
            right = {n for n in wanted if sizes[n] == wanted[n].size}
            wrong = [Odd(n, k, sizes[n], wanted[n]) for n in wanted if n not in right]
            if each or not numbered or not right and len({*sizes.values()}) == 1:
                odd += wrong  # of all layers, or where each has its own: without that, they may be of several kinds
            else:
                module = rest.partition(".")[0]
                beside = {n: {m for m in here[stack][l] if m.partition(".")[0] == module} for n, l in held.items()}
                alike_ones = [beside[n] for n in right]
                doubtful += [(o, (stack, held[o.name]), beside[o.name] in alike_ones) for o in wrong]
            agreed |= {(stack, held[n]): wanted[n].size for n in right} if numbered else {}
        # of some layers: where one that is alike has it right, or another tensor, or the experts, of the same layer
        odd += [o for o, layer, by_one in doubtful if by_one or agreed.get(layer) == o.expected.size]
        grouped = dict[tuple[int, int | None, Expected], list[str]]()
        for o in odd:
            grouped.setdefault((o.k, o.found, o.expected), []).append(o.name)
        for (k, n, (expected, told)), names in grouped.items():
            dim = f"dimension {k}" + " of the native tensor" * (spelt(names, spell) != names)
            found = f"{n} in {dim}" if n is not None else f"no {dim}"
            text = f"{some(spelt(names, spell))}: {found}, and config.json has {told}: expected {expected}"
            yield Problem(text, keys(names, spell))


def _experts(native: Mapping[str, Any], layer: str, names: Iterable[str]) -> int:
    """How many experts a layer has; 0 for none, or where its tensors are not of one mind."""
    specs = (native[f"{layer}.{n}"] for n in names if n.rpartition(".")[2] in EXPERT_TENSORS)
    found = {tuple(spec.shape[:1]) for spec in specs if spec is not None}
    return int(*found.pop()) if len(found) == 1 else 0


def _expected(
    formula: str, own: Mapping[str, Any], plain: Mapping[str, Any], layer: int, text: bool
) -> Expected | None:
    """A size, if the config says it; of a layer, by what `per_layer_config` says of that before all else.

    plain: the same without what only the class says. layer: -1 for none. text: whether it is one of the text model's.
    """
    said, written = (_said_of(each, layer, text) for each in (own, plain))
    size, told = value(formula, said, layer), words(formula, said, layer).split(", ")
    known = words(formula, written, layer).split(", ")
    left = lambda w: "no {}, which its class takes as {}".format(*w.split(" ", 1))
    return None if size is None else Expected(size, ", ".join(w if w in known else left(w) for w in told))


def _said_of(own: Mapping[str, Any], layer: int, text: bool) -> Mapping[str, Any]:
    said = own if layer < 0 or text else {p: _of_layer(part, layer) for p, part in own.items()}
    return _of_layer(said, layer) if text else said


def _parts(own: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [("", own), *((f"{p}.", as_part(own, p)) for p in PARTS)]


def _each(part: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Layer -> what `per_layer_config` says of it."""
    found = as_part(part, "per_layer_config")
    return {int(l): v for l, v in found.items() if str(l).isdigit() and isinstance(v, Mapping)}


def _of_layer(part: Any, layer: int) -> Any:
    return {**part, **_each(part).get(layer, {})} if isinstance(part, Mapping) else part


def _layers(stack: str, says: Expected | None, layers: Layers, needed: bool = False) -> Iterator[Problem]:
    """A stack that has not the layers that the config says. needed: having none is a loss, too."""
    if not says or not (layers or needed) or {*layers} == {*range(says.size)}:
        return
    missing = next((l for l in range(says.size) if l not in layers), None)
    found = f"{len(layers)} layers" + f", none is {missing}" * (missing is not None)
    yield Problem(f"{stack}.*: {found}, and config.json has {says.told}: expected {says.size}", (stack,))


def _list(
    stack: str, says: Expected | None, native: Mapping[str, Any], stacks: Mapping[str, Layers], spell: Spell
) -> Iterator[Problem]:
    """A list of tensors that are fewer or more than the config says."""
    held = {n for n in native if n.rpartition(".")[0] == stack and n.rpartition(".")[2].isdigit()}
    if (
        not says
        or len(held) == max(says.size, 0)
        or not any(n.startswith(stack.rpartition(".")[0] + ".") for n in native)
    ):
        return
    names = sorted({f"{stack}.{k}" for k in range(says.size)} ^ held)
    text = f"{len(held)} tensors of {stack}.*, and config.json has {says.told}: expected {says.size}"
    yield Problem(f"{some(spelt(names, spell))}: {text}", keys(names, spell))


def _of(kind: str, said: Mapping[str, Any], layer: int) -> bool:
    """Whether a list says of a layer what "layer_types=full_attention" says; "": any layer."""
    field, _, word = kind.partition("=")
    listed = said.get(field)
    return not kind or isinstance(listed, list) and layer < len(listed) and str(listed[layer]) == word


def as_part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def plain(spec: Any) -> bool:
    """Whether it is there, and no codes."""
    if spec is None or spec.dtype == torch.bool:
        return spec is not None
    return bool(spec.dtype.itemsize > 1 if spec.dtype.is_floating_point else spec.dtype.itemsize == 8)
