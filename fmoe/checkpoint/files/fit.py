"""Do config and tensors speak of one model? Sizes and experts are the plan's to check, layers are counted here."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from fmoe.checkpoint.remote.address import Where
from fmoe.families.kind import as_dict
from fmoe.families.numbered import BESIDE
from fmoe.types import AdapterError

_EXPERTS = re.compile(r"expert|moe")
_LAYER = re.compile(r"(.*?\.|)layers\.(\d{1,9})\.", re.ASCII)
BEYOND = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
"""The config's names for layers that some families number on after the last one."""


def layers_fit(path: Where, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises AdapterError where a layer of the config has no tensor, or a tensor a layer beyond them.

    A config that does not say num_hidden_layers, and names that number no layers, are left alone; so are the layers
    of `mtp`, and of what stands beside a text model: all that is named so, or has no experts where others have.
    """
    said = as_dict(config)
    count, beyond = said.get("num_hidden_layers"), [said.get(n) for n in BEYOND]
    found: dict[str, set[int]] = defaultdict(set)
    sparse = set[str]()
    for name in names:
        if (hit := _LAYER.match(name)) and "mtp" not in hit[1].split("."):
            found[hit[1]].add(int(hit[2]))
            sparse |= {hit[1]} if _EXPERTS.search(name, hit.end()) else set()
    if type(count) is not int or not found or said.get("is_encoder_decoder"):  # and each has a count of its own
        return
    rank = lambda prefix: (not BESIDE.search(prefix), prefix in sparse, len(found[prefix]), prefix)
    prefix = max(found, key=rank)
    numbers = found[prefix]
    most = count + sum(n for n in beyond if type(n) is int and n > 0)
    missing = next((l for l in range(count) if l not in numbers), None)
    if missing is not None or max(numbers) >= most:
        what = f"{prefix}layers.{missing}." if missing is not None else f"{prefix}layers.{max(numbers)}."
        why = f"no tensor is {what}*" if missing is not None else f"there is {what}*"
        raise AdapterError(f"{path} says num_hidden_layers {count}, and {why}: config and tensors are of two models")
