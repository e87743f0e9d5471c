"""Megatron's legacy directory: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, each rank's training state, read as data.

Tensor-parallel parts bear their rank in front of their name (`mp_rank_00.decoder.layers.3...`), and rules join them
(`cuts.py`). Pipeline stages and expert ranks only number from zero what the model numbers on: layers and experts get
the model's numbers here. What several ranks hold alike is there once, and `Foreign.agree` compares the others with it.
"""

import os
import re
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.containers import cuts
from fmoe.checkpoint.files.containers.foreign import Foreign
from fmoe.checkpoint.files.containers.pickles import Rebuilt, Record
from fmoe.checkpoint.files.containers.torch_file import Held, Saved, read_saved
from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem, TensorSpec

LATEST = "latest_checkpointed_iteration.txt"
UNTRUSTED = """holds mp_rank_*, a pickle of a whole training state for each rank, which is not read unless you say so: \
then as data, through a list of exact names, and nothing of it runs. Fix: trust_pickle=True, or --trust-pickle"""
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.(?:linear_fc[12]\.(?:weight|bias)|local_experts\.))(\d+)(.*)")
_ENDS = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight")

Place = tuple[int, int, int]  # tensor, pipeline and expert rank


class Part(NamedTuple):
    """A tensor of one rank, by the model's name: what it is, in which file, and where."""

    name: str
    place: Place
    held: Held
    file: str


def home_of(path: Path) -> Path | None:
    """The folder of a path that holds the ranks' folders: itself, or that of the latest iteration."""
    if not os.path.isdir(path):
        return None
    if any(map(_RANK.fullmatch, _folders(path))):
        return path
    try:
        told = disk.content(path / LATEST).decode()[:40].strip()
    except (AdapterError, ValueError):
        return None
    inside = path / (f"iter_{int(told):07d}" if told.isdecimal() else "release")
    return inside if os.path.isdir(inside) and any(map(_RANK.fullmatch, _folders(inside))) else None


def _folders(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def open_mp_rank(path: Path, config: dict[str, Any]) -> Foreign:
    """Raises AdapterError naming what is wrong: ranks that are missing, pickles of foreign names, parts cut short."""
    home = home_of(path) or path
    found = {name: read_saved(home / name) for name in _files(home)}
    states = {name: _chunks(saved) for name, saved in found.items()}
    places = _places(home, states)
    parts = list(_parts(found, states, places))
    cut = lambda p: re.fullmatch(cuts.EXPERTS, p.name) and not cuts.replicated(p.name, p.held.spec, config)
    if (lost := _lost(places)) and any(map(cut, parts)):
        raise AdapterError(_missing(home, places, lost))
    return _opened(home, config, found, parts, 1 + max(t for t, _, _ in places.values()))


def _files(home: Path) -> Iterator[str]:
    for folder in filter(_RANK.fullmatch, _folders(home)):
        inside = next((n for n in _FILES if os.path.lexists(home / folder / n)), None)
        if inside is None:
            raise AdapterError(f"{home / folder} holds no {' and no '.join(_FILES)}")
        yield f"{folder}/{inside}"


def _chunks(saved: Saved) -> list[dict[str, Any]]:
    """The model's tensors of a rank: one dict, or one for each virtual stage."""
    state = saved.state
    keys = ["model"] if isinstance(state, dict) and "model" in state else []
    while not keys[:1] == ["model"] and isinstance(state, dict) and f"model{len(keys)}" in state:
        keys.append(f"model{len(keys)}")
    chunks = [state[k] for k in keys]
    if not chunks or not all(isinstance(c, dict) for c in chunks):
        raise AdapterError(f"{saved.path} holds no model of Megatron's")
    if any("language_model" in c for c in chunks):
        raise AdapterError(f"{saved.path} is of Megatron before its Core, whose names are not known")
    args = state.get("args")
    if isinstance(args, Record) and args.get("apply_layernorm_1p"):
        raise AdapterError(f"{saved.path} holds norms less one (apply_layernorm_1p), which are not read")
    return chunks


def _places(home: Path, states: dict[str, list[dict[str, Any]]]) -> dict[str, Place]:
    """The ranks of each file. A second number is the pipeline's, but where every file has the model's both ends.

    Where experts are spread over tensor ranks, there is a file for every tensor and every expert rank, not for pairs.
    """
    numbers = {n: [int(i) for i in found.groups() if i] for n in states if (found := _RANK.match(n))}
    if len({len(n) for n in numbers.values()}) > 1:
        raise AdapterError(f"{home}: {some(list(numbers))}: ranks of one run have as many numbers each")
    whole = all(set(_ENDS) <= {k for c in chunks for k in c} for chunks in states.values())
    made: dict[str, Place] = {}
    for name, (t, *more) in numbers.items():
        p, e = (more if len(more) == 2 else [0, *more] if whole else [*more, 0]) if more else (0, 0)
        made[name] = (t, p, e)
    every = lambda i, j: len({(at[i], at[j]) for at in made.values()}) == prod(_sizes(made)[k] for k in (i, j))
    if prod(_sizes(made)) > 100_000 or not every(0, 1) or not every(1, 2):
        raise AdapterError(_missing(home, made, _lost(made)))
    return made


def _sizes(places: dict[str, Place]) -> Place:
    t, p, e = (1 + max(place[i] for place in places.values()) for i in range(3))
    return t, p, e


def _lost(places: dict[str, Place]) -> list[Place]:
    """The ranks of the whole grid that have no file."""
    sizes, there = _sizes(places), set(places.values())
    return (
        [(t, p, e) for t, p, e in product(*map(range, sizes)) if (t, p, e) not in there]
        if prod(sizes) <= 100_000
        else []
    )


def _missing(home: Path, places: dict[str, Place], lost: list[Place]) -> str:
    pairs = {(at[i], at[j], i) for at in places.values() for i, j in ((0, 1), (1, 2))}
    none = [at for at in lost if (at[0], at[1], 0) not in pairs or (at[1], at[2], 1) not in pairs]  # of no file at all
    told = some([f"mp_rank {at}" for at in none or lost]) if lost else "many"
    return f"{home}: missing {told} of (tensor, pipeline, expert) ranks {_sizes(places)}"


def _parts(
    found: dict[str, Saved], states: dict[str, list[dict[str, Any]]], places: dict[str, Place]
) -> Iterator[Part]:
    """Every tensor by the model's name: layers counted on over virtual and pipeline stages, experts over ranks."""
    layers = {(v, places[n][1]): _count(c, _LAYER) for n in states for v, c in enumerate(states[n])}
    first, at = dict[tuple[int, int], int](), 0
    for stage in sorted(layers):
        first[stage] = at
        at += layers[stage]
    for file, chunks in states.items():
        t, p, e = places[file]
        for v, chunk in enumerate(chunks):
            if (count := _count(chunk, _LAYER)) != layers[v, p]:
                raise AdapterError(f"{found[file].path} has {count} layers, and another rank {layers[v, p]}")
            experts = _count(chunk, _EXPERT)
            for name, value in chunk.items():
                if not isinstance(name, str) or name.endswith("_extra_state") or value is None:
                    continue
                if not isinstance(value, Rebuilt):
                    told = f"{found[file].path}: {name!r} is a {type(value).__name__}, expected a tensor"
                    raise AdapterError([Problem(told, (name,))])
                full = _moved(_moved(name, _LAYER, first[v, p]), _EXPERT, e * experts)
                yield Part(full, (t, p, e), found[file].held(name, value), file)


def _count(names: Any, pattern: re.Pattern[str]) -> int:
    return 1 + max((int(m[2]) for n in names if isinstance(n, str) and (m := pattern.fullmatch(n))), default=-1)


def _moved(name: str, pattern: re.Pattern[str], by: int) -> str:
    found = pattern.fullmatch(name)
    return f"{found[1]}{int(found[2]) + by}{found[3]}" if found else name


def _opened(home: Path, config: dict[str, Any], found: dict[str, Saved], parts: list[Part], ranks: int) -> Foreign:
    """Each name once, of the first rank that has it; of what ranks cut, once for each tensor rank."""
    first: dict[str, Part] = {}
    copies: dict[str, list[tuple[str, int]]] = {}
    for part in sorted(parts, key=lambda part: part.place):
        whole = ranks == 1 or cuts.replicated(part.name, part.held.spec, config)
        tied = part.name == "output_layer.weight" and config.get("tie_word_embeddings")  # on the last stage, a copy
        name = _ENDS[0] if tied else part.name
        name = name if whole else f"mp_rank_{part.place[0]:02}.{name}"
        if name not in first:
            first[name] = part
            continue
        if part.held.spec != first[name].held.spec:
            here, there = first[name].held.spec, part.held.spec
            text = f"{home}: {part.name!r} is {list(here.shape)} {here.dtype} in {first[name].file}, and "
            raise AdapterError([Problem(f"{text}{list(there.shape)} {there.dtype} in {part.file}", (part.name,))])
        copies.setdefault(name, []).append((part.file, part.held.at))
    specs: dict[str, TensorSpec] = {n: part.held.spec for n, part in first.items()}
    left = sorted({str(k) for saved in found.values() for k in saved.state if not str(k).startswith("model")})
    stamps: dict[str, disk.Stamp] = {file: saved.stamp for file, saved in found.items()}
    return Foreign(
        home, config, specs, {n: p.file for n, p in first.items()}, {n: p.held.at for n, p in first.items()}, stamps,
        container="mp_rank", left_out=tuple(left), lead=cuts.joined(specs, ranks),
        copies={n: tuple(places) for n, places in copies.items()},
    )  # fmt: skip
