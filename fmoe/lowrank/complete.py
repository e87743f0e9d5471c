"""What an adapter_config.json targets in its base model, and a file of LoRA matrices lacks."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from fmoe.layout.adapter import Adapter
from fmoe.layout.claims import some
from fmoe.layout.names import Names
from fmoe.lowrank.config import LoraConfig
from fmoe.lowrank.derive import NATIVE
from fmoe.lowrank.sorting import WRAPPED
from fmoe.lowrank.targets import parameter, table_of, targets_of
from fmoe.types import AdapterError, Params, Problem

_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")
PERIODS = (
    "encoder_sparse_step",
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "moe_layer_freq",
    "expert_layer_period",
)
MIXED = ("hybrid_override_pattern", "layers_block_type", "layer_types", "mlp_layer_types", "mlp_only_layers")
_BESIDE = re.compile(r"vision|visual|audio")
SINGLE = re.compile(r"\.experts?\.\w*?\d+\.")
STACKED = re.compile(r"\.experts\.(?!router\.)")  # JetMoE's router of attention's experts is a module
_SKIPPED = re.compile(rf"(^|\.)(mtp\.|visual\.|vision)|\.experts?\.\d+\.|{STACKED.pattern}")


class Known(NamedTuple):
    """What is known of the base's class.

    everywhere: whether all layers have a module of this name, its number a star; None: not known. same: one name of all
    that a tensor has, in memory and in files. inside: the one in memory, if any. layers: those that have a tensor, its
    number a star, as the names that are there tell. whole: whether other names than files have are all known. nowhere:
    whether no layer can have a module that hits. sparse: the layers with experts, where the config says it.
    """

    everywhere: Callable[[str], bool | None] = lambda form: None
    same: Callable[[str], str] = lambda name: name
    inside: Callable[[str], str | None] = lambda name: name
    layers: Callable[[str, Iterable[str]], set[int]] = lambda tensor, names: set()
    whole: bool = False
    nowhere: Callable[[Callable[[str], bool]], bool] = lambda hits: False
    sparse: set[int] | None = None


def missing(
    params: Params, config: LoraConfig, adapter: Adapter, names: Iterable[str] | None, known: Known
) -> Iterator[Problem]:
    """A problem for each target of which the matrices are not there. names: the base's Hugging Face names, if known.

    With them, every module and every parameter that a target names has matrices, under its name in memory where it has
    another, also where it is no tensor of its own in files. Without, every target has some, and the layers of each have
    no gap.
    """
    if not params:
        yield Problem("the adapter's file holds no matrices, expected some for each target of adapter_config.json")
        return
    made, same = targets_of(adapter, params), known.same
    keys = {key.removeprefix(WRAPPED) for t in made for key in t.keys}
    modules = {key.removeprefix(WRAPPED) for t in made if not t.parameter for key in t.keys}
    there = set(map(same, keys))
    files = None if names is None else list(names)
    memory = [] if files is None else files
    if files is not None and all(same(key) == key for key in keys):  # spelt as in memory
        memory = [n for n in map(known.inside, files) if n]
    natives = _natives(adapter, files or [])
    by_one = any(map(SINGLE.search, keys))  # as the model that was trained has its experts
    memory = [*memory, *(n for n in files or () if by_one and SINGLE.search(n) and n not in memory)]
    towers = {_tower(m) for m in modules} - {""}
    targets = [*config.target_parameters, *([config.target_modules] if _regex(config) else config.target_modules)]
    for target in targets:
        fits = [key for key in keys if _fits(target, key, config)]
        parametric = target in config.target_parameters
        wanted = None if files is None else _wanted(target, config, adapter, memory, natives, towers, by_one)
        lost = sorted((n for n in wanted if same(n) not in there), key=_numbers) if wanted else []
        lost = [n for n in lost if by_one and SINGLE.search(n) or not _stacked(adapter, n)]
        others = {same(key) for key in fits if parametric or key in modules} - {*map(same, wanted or ())}
        if known.whole and wanted is not None:
            like = others | ({target} if _LAYER.search(target) and not _regex(config) else set())
            beyond = _beyond(like, parametric, config, adapter, {*memory, *map(same, natives)}, known)
            lost += [n for n in beyond if n not in there and n not in lost and _fits(target, n, config)]
        else:  # which of its names are one tensor's is not known: of each layer
            lost = [n for n in lost if _place(n) not in {*map(_place, others)}]
        if not fits and parametric and "." not in target:
            fix = f"Fix: write it with its module, as in '<module>.{target}'"
            yield Problem(f"adapter_config.json targets {target!r}, and no matrix is for it. {fix}", (target,))
        elif lost and (fits or not _expert_like(target)):
            at = (*(f"{WRAPPED}{n}" for n in lost),)
            yield Problem(f"{some(lost)}: no matrices, and adapter_config.json targets {target!r}", at)
        elif not fits and (holders := _holders(target, config, keys)):
            text = f"LoRA of {target.rpartition('.')[2]!r}, one of several parameters of a module that are wrapped"
            yield Problem(f"{some(holders)}: {text}. Fix: merge it with PEFT (merge_and_unload)", (*holders,))
        elif not fits and (lost or files is None and target != "all-linear" or SINGLE.search(f".{target}.")):
            end = ".weight" * (parametric and target.endswith(".weight"))  # of a module, as a router's is
            hits = lambda key, t=target, end=end: _fits(t, key + end, config) and (bool(end) or config.wraps(key))
            excluded = not parametric and not _regex(config) and not config.wraps(target)  # a whole name, as PEFT lists
            sure = parametric and not end or _expert_like(target)
            if lost or not excluded and (sure or not known.nowhere(hits)):
                yield Problem(f"adapter_config.json targets {target!r}, and no matrix is for it", (target,))
        elif files is None and not _LAYER.search(f".{target}."):
            yield from _gaps(target, fits, adapter, config, known)


def _tower(name: str) -> str:
    return next((part for part in name.split(".") if _BESIDE.search(part)), "")


def _place(name: str) -> list[str]:
    """A name's layer, and its last word."""
    return [*_LAYER.findall(f".{name}.")[:1], name.rpartition(".")[2]]


def _beyond(
    like: set[str], parametric: bool, config: LoraConfig, adapter: Adapter, there: set[str], known: Known
) -> list[str]:
    """Like these, which files have not under such names, all that their layers have as the class has it in memory."""
    layers, found = _layers(adapter), list[str]()
    for form in sorted({_LAYER.sub("*", f"{n}.", count=1).rstrip(".") for n in like}):
        tensor = form if parametric else f"{form}.weight"
        for number in sorted(known.layers(tensor, there)):
            name = form.replace("*", str(number), 1)
            beyond = layers is not None and number >= layers and not _BESIDE.search(form)
            found += [name] if not beyond and (parametric or config.wraps(name)) else []
    return found


def _natives(adapter: Adapter, names: list[str]) -> list[str]:
    for stage in adapter.stages:
        names = stage.resolve(Names(names), default=True).rename(Names(names)) if names else []
    return names


def _holders(target: str, config: LoraConfig, keys: set[str]) -> list[str]:
    """The modules with matrices that a target's parameter is one of, where it is no weight."""
    module, _, last = target.rpartition(".")
    held = target in config.target_parameters and module and last != "weight"
    return [f"{WRAPPED}{k}" for k in sorted(keys, key=_numbers) if held and (k == module or k.endswith(f".{module}"))]


def _stacked(adapter: Adapter, module: str) -> bool:
    """Whether this is no module's weight, but one of all experts."""
    names = [f"{module}.weight"]
    for stage in adapter.stages:
        names = stage.resolve(Names(names), default=True).rename(Names(names))
    return any(n.rpartition(".")[2] in NATIVE for n in names)


def _regex(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str)


def _expert_like(target: str) -> bool:
    return "experts" in target or "router" in target


def _numbers(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else -1 for part in name.split(".")]


def _fits(target: str, key: str, config: LoraConfig) -> bool:
    """Whether a module or parameter is one that a target names: by its end, or as a regular expression."""
    if _regex(config) and target == config.target_modules:
        return target == "all-linear" or re.fullmatch(target, key) is not None
    return key == target or key.endswith(f".{target}")


def _wanted(
    target: str,
    config: LoraConfig,
    adapter: Adapter,
    names: list[str],
    natives: list[str],
    towers: set[str],
    by_one: bool,
) -> set[str]:
    """What of the base a target names: parameters where it is one, else the modules that have a weight.

    Of a tower, all where any has matrices. towers: those that have some; by_one: experts are modules, too.
    """
    if target in config.target_parameters:
        found = {k for k in _parameters(adapter, natives) if _fits(target, k, config)}
        return found | {n for n in names if not _SKIPPED.search(n) and _fits(target, n, config)}
    if target == "all-linear":
        return set()
    layers = _layers(adapter)
    all_of = {n.removesuffix(".weight") for n in names if n.endswith(".weight")}
    beside = {m for m in all_of if _tower(m) in towers}
    skipped = lambda m: _SKIPPED.search(SINGLE.sub(".", m, count=1) if by_one else m)
    found = {m for m in all_of if m in beside or not skipped(m)}
    found = {m for m in found if _fits(target, m, config) and config.wraps(m)}
    return {
        m for m in found if m in beside or layers is None or not (n := _LAYER.findall(f"{m}.")) or int(n[0]) < layers
    }


def _parameters(adapter: Adapter, natives: list[str]) -> set[str]:
    """The expert parameters of the base, as PEFT names them."""
    table, layers, found = table_of(adapter), _layers(adapter), set[str]()
    for name in (n for n in natives if n.rpartition(".")[2] in NATIVE):
        numbers = _LAYER.findall(f"{name}.")
        if name.startswith("mtp.") or layers is not None and numbers and int(numbers[0]) >= layers:
            continue
        prefix, _, bare = name.rpartition(".")
        try:
            found.add(parameter(table, f"{prefix}.{NATIVE[bare]}_A").removeprefix(WRAPPED))
        except AdapterError:  # PEFT wraps none here
            continue
    return found


def _layers(adapter: Adapter) -> int | None:
    config: Any = adapter.config or {}
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    found = (inner or {}).get("num_hidden_layers") or config.get("num_hidden_layers")
    return found if isinstance(found, int) else None


def _gaps(target: str, keys: list[str], adapter: Adapter, said: LoraConfig, known: Known) -> Iterator[Problem]:
    """Layers between others, or behind them, that lack what these have, where layers are all of one kind."""
    config: Any = adapter.config or {}
    if not config:  # nothing says that layers are alike: those between may be of another kind
        return
    mixed = any(c.get(field) for c in (config, config.get("text_config") or {}) for field in MIXED)
    forms: dict[str, set[int]] = {}
    for key in keys:
        if numbers := _LAYER.findall(f"{key}."):
            forms.setdefault(_LAYER.sub("*", f"{key}.", count=1), set()).add(int(numbers[0]))
    for form, found in forms.items():
        module, experts = form.rstrip("."), _expert_like(form) and "shared_expert" not in form
        alike = experts or known.everywhere(module.removesuffix(".weight" * (target in said.target_parameters)))
        if not alike if alike is not None else mixed:
            continue
        beside = bool(_BESIDE.search(form))
        if mixed and experts and (beside or known.sparse is None):
            continue
        count = None if beside else _layers(adapter)
        name = lambda n, form=form: form.replace("*", str(n), 1).rstrip(".")
        if experts and not beside and known.sparse is not None:
            wanted = sorted(known.sparse)
        else:
            every = 1 if not experts else next((n for f in PERIODS if isinstance(n := config.get(f), int)), 1)
            wanted = [*range(min(found) if experts else 0, count or max(found), max(1, every))]
        lost = [n for n in wanted if n not in found]
        lost = [n for n in lost if target in said.target_parameters or said.wraps(name(n))]
        if lost:
            text = f"{name(lost[0])!r}: no matrices, and adapter_config.json targets {target!r}"
            yield Problem(text, (f"{WRAPPED}{name(lost[0])}",))
