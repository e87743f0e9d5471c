"""config.json and tensors say the same."""

from collections.abc import Mapping
from typing import Any

import torch

from fmoe.codecs.config import stated, with_dtype
from fmoe.codecs.parts import in_file
from fmoe.codecs.quantised import Quantised
from fmoe.layout.adapter import Adapter
from fmoe.layout.grouping import Specs
from fmoe.layout.names import Names
from fmoe.types import as_dtype


def agreeing(
    config: Mapping[str, Any], adapter: Adapter, specs: Specs, dtype: "torch.dtype | str | None" = None
) -> dict[str, Any]:
    """The config of a Hugging Face directory that holds these tensors, as an adapter wrote them.

    Its quantization_config is there where some are quantised, and says how; dtype: what floats have become.
    """
    made = dict(config) if dtype is None else with_dtype(config, as_dtype(dtype))
    codec = next((s for s in (*reversed(adapter.stages),) if isinstance(s, Quantised)), None)
    return made if codec is None else stated(made, specs, in_file(specs, Names(specs), codec.readable, codec.fresh)[0])
