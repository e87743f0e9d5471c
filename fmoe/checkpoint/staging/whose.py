"""Whose a directory is that parameters are saved into: what the config that is there says, against their own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmoe.families import FAMILIES
from fmoe.families.kind import as_dict
from fmoe.types import AdapterError

OF_A_MODEL = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
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


def alike(there: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> bool:
    """Whether a config that is there may be that of these parameters: what both say of a model is the same."""
    if there is None or ours is None:
        return False
    one, two = as_dict(there), as_dict(ours)
    return all(one.get(field) == two.get(field) for field in OF_A_MODEL if field in one and field in two)
