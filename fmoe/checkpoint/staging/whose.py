"""Whose a directory is that parameters are saved into: what the config that is there says, against their own."""

import re
from collections.abc import Collection, Iterator, Mapping
from os.path import isfile
from pathlib import Path
from typing import Any

from fmoe.checkpoint.files.directory import CONFIG
from fmoe.checkpoint.files.strict import read
from fmoe.checkpoint.remote.address import Address, Where
from fmoe.families import FAMILIES
from fmoe.families.kind import as_dict
from fmoe.types import AdapterError, brief

OF_A_FILE = re.compile(
    r"_.*|architectures|auto_map|.*dtype|.*version|.*_token_id|use_cache|(output|return)_.*|.*2(id|label)"
    r"|text_config|ffn_config|(decoded_)?(quantization|compression)_config"
)
"""Fields that say nothing of how a model computes, or are compared elsewhere or part by part."""
WHOLE = ("architectures", "transformers_version")
"""Fields of which any says that a config is a model's, and not some sizes."""
ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
INFINITE = ("Infinity", "-Infinity", "NaN")
SIZES = ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim")


def one_model(path: Path, there: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises AdapterError where the config that stays is another model's than the parameters'."""
    here, mine = (FAMILIES.get(str(c.get("model_type"))) for c in (there, ours))
    if here is None or mine is None or there is ours:
        return
    sizes = [("model_type", there["model_type"], ours["model_type"])] if here.rules != mine.rules else []
    if not sizes:
        theirs, own = here.values(as_dict(there)), mine.values(as_dict(ours))
        sizes = [(n, theirs[n], own[n]) for n in SIZES if n in theirs and n in own and theirs[n] != own[n]]
    if sizes:
        found = ", ".join(f"{n} {a!r}, expected {b!r}" for n, a, b in sizes)
        fix = "Fix: name another directory, or remove that config.json, and the adapter's is written"
        raise AdapterError(f"{path} stays, and is not of these parameters: {found}. {fix}")


def unknown(path: Path, there: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """A note where the config that stays names a model that no family is known of, as a dense one or one's own."""
    found, mine = there.get("model_type"), ours.get("model_type")
    if not found or not mine or found in FAMILIES or found == mine:
        return []
    fix = f"Fix: remove it, unless {found!r} is a model type of your own, and the adapter's is written"
    return [f"{path} stays, and has model_type {found!r}, expected {mine!r}, as these parameters are. {fix}"]


def otherwise(path: Path, there: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> list[str]:
    """A note where the config that stays says otherwise than the parameters' own, as a sibling's of the same sizes.

    >>> otherwise(Path("config.json"), {"rope_theta": 5, "dtype": "float16"}, {"rope_theta": 7, "dtype": "bfloat16"})
    ["config.json stays, and is not as the adapter's: rope_theta 5, expected 7. Fix: ..."]
    """
    odd = _unlike(there, ours)
    if there is not None and unknown(path, there, ours or {}):
        odd.pop("model_type", None)
    fix = "Fix: remove it before, and the adapter's is written"
    return [f"{path} stays, and is not as the adapter's: {'; '.join(odd.values())}. {fix}"] if odd else []


def given_instead(path: Where, given: Mapping[str, Any]) -> list[str]:
    """A note where a config that is given says otherwise than the one that lies with the tensors, which it replaces."""
    own = path / CONFIG
    if not (own.exists() if isinstance(own, Address) else isfile(own)):
        return []
    try:
        odd = _unlike(given, read(own, infinite=True)[0])
    except AdapterError as error:
        return [f"the config that is given is taken, for {error}"]
    text = f"the config that is given is not as {own}: {'; '.join(odd.values())}: it is taken"
    return [f"{text}. Fix: leave it out, unless that file is wrong"] if odd else []


def alike(there: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> bool:
    """Whether a config that is there may be that of these parameters: it says the same of a model."""
    return there is not None and ours is not None and not _unlike(there, ours)


def _unlike(there: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> dict[str, str]:
    """Fields, in parts of both configs too, of which they say other things, or one of them nothing: what each says."""
    one, two = _roped(_plain(as_dict(there)), _plain(as_dict(ours)))
    kinds = [FAMILIES.get(str(c.get("model_type"))) for c in (one, two)]
    read = {n for kind in kinds if kind for names in kind.fields.values() for n in names.split()}
    return dict(_pairs(one, two, read if all(any(f in c for f in WHOLE) for c in (one, two)) else None))


def _pairs(
    one: Mapping[str, Any], two: Mapping[str, Any], read: Collection[str] | None, at: str = ""
) -> Iterator[tuple[str, str]]:
    """read: fields of which 0 and false say something, too, where one config has them alone. None: no such is told."""
    for field in dict.fromkeys(f for f in (*one, *two) if not OF_A_FILE.fullmatch(f)):
        a, b, name = one.get(field), two.get(field), at + field
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _pairs(a, b, read, f"{name}.")
        elif field in one and field in two:
            yield from [(name, f"{name} {brief(a)}, expected {brief(b)}")] * (a != b)
        elif read is not None and (a or b or field in read and (a is not None or b is not None)):
            yield name, f"{name} {brief(a)}, expected none" if field in one else f"no {name}, expected {brief(b)}"


def _roped(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Both configs with what they say of positions in one form, where they are of two releases of Transformers."""
    if ("rope_parameters" in one) == ("rope_parameters" in two):
        return one, two
    made = [_of_positions(c) for c in (one, two)]
    kept = [{f: v for f, v in c.items() if f not in ROPE} for c in (one, two)]
    if any(isinstance(v, dict) for c in made for v in c.values()):  # by kinds of layers, as one of them alone can say
        return kept[0], kept[1]
    return kept[0] | {"rope_parameters": made[0]}, kept[1] | {"rope_parameters": made[1]}


def _of_positions(config: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get("rope_parameters") or config.get("rope_scaling")
    held = given if isinstance(given, dict) else {"rope_scaling": given}
    beside = {f: config[f] for f in ROPE[2:] if config.get(f) is not None}
    held = {"rope_type": held.get("type", "default"), **held}
    return {f: v for f, v in (beside | held).items() if f != "type" and v is not None}


def _plain(value: Any) -> Any:
    """As JSON has it, in which Transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        marked = value.get("__float__")
        return float(marked) if marked in INFINITE else {str(k): _plain(v) for k, v in value.items()}
    return [*map(_plain, value)] if isinstance(value, list | tuple) else value
