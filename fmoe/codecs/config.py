"""quantization_config: what it says of blocks, and what it has to say of the tensors that are written."""

from collections.abc import Mapping
from typing import Any

from fmoe.types import AdapterError

FIELDS = ("quantization_config", "compression_config")


def quantization_of(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The quantization_config of a config, at its top or in its text_config; None where it has none.

    Raises AdapterError where it is no JSON object.
    """
    config = config or {}
    for field in FIELDS:
        if (found := config.get(field)) is not None and found != {}:
            found = found.to_dict() if hasattr(found, "to_dict") else found
            if not isinstance(found, Mapping):
                raise AdapterError(f"{field} is {found!r}, expected an object with its quant_method")
            return dict(found)
    inner = config.get("text_config")
    return quantization_of(inner) if isinstance(inner, Mapping) else None


def weight_block(config: Mapping[str, Any] | None) -> tuple[int, int]:
    """The rows and columns of FP8's blocks as weight_block_size says them; 128 by 128 where it says none.

    >>> weight_block({"quantization_config": {"weight_block_size": [1, 32]}})
    (1, 32)
    """
    sides = (quantization_of(config) or {}).get("weight_block_size")
    if sides is None:
        return 128, 128
    plain = lambda n: isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(map(plain, sides)):
        raise AdapterError(f"quantization_config.weight_block_size is {sides!r}, expected rows and columns, as [128, 128]")
    return int(sides[0]), int(sides[1])
