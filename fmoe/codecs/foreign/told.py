"""What readers of compressed-tensors, GPTQ and AWQ are told of a checkpoint: how many bits, in which groups."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from fmoe.codecs.foreign.affine import BITS
from fmoe.codecs.format import Format


def calibrated(f: Format, groups: Collection[int], order: str | None, rest: Iterable[str]) -> dict[str, Any]:
    """The fields of quantization_config beside quant_method. rest: the modules that are plain.

    order: the part with the group of each column, if there is one: desc_act says that readers have to look at it.

    >>> from fmoe.codecs.formats import FORMATS
    >>> calibrated(FORMATS["awq int4"], [128, 128], None, ["lm_head"])["group_size"]
    128
    """
    sizes = set(groups)
    told: dict[str, Any] = dict(bits=BITS[f.code], group_size=sizes.pop() if len(sizes) == 1 else -1)
    if f.words == "awq":
        return told | dict(zero_point=True, version="gemm", modules_to_not_convert=list(rest))
    told |= dict(desc_act=order is not None, sym=False, checkpoint_format=f.zeros)
    return told | dict(dynamic={f"-:^{re.escape(name)}$": {} for name in rest})


def weights(f: Format) -> dict[str, Any]:
    """What compressed-tensors' config says of weights in a format."""
    bits = {"e4m3": 8, "int8": 8}.get(f.code, 4)
    made: dict[str, Any] = dict(
        num_bits=bits, type="int" if f.code.startswith("int") else "float", symmetric=not f.zeros
    )
    if f.grouped_by_row:
        made |= dict(strategy="tensor_group" if f.second and not f.zeros else "group", group_size=f.block[1])
    elif all(f.block):
        made |= dict(strategy="block", block_structure=list(f.block))
    else:
        made |= dict(strategy="channel" if f.block[0] else "tensor")
    return made | dict(dynamic=False)
