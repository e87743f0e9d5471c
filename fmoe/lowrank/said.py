"""What adapter_config.json says of LoRA matrices, and what it has to say of some."""

import re
from collections import Counter
from collections.abc import Callable, Iterator

from fmoe.layout.adapter import Adapter
from fmoe.lowrank.config import LAYOUTS, LoraConfig
from fmoe.lowrank.targets import table_of, targets_of, wrapped
from fmoe.types import AdapterError, Params, Problem


def odd_ranks(
    params: Params, config: LoraConfig, adapter: Adapter, deep: Callable[[str], int | None] = lambda name: None
) -> Iterator[Problem]:
    """A problem for each matrix A of another rank than the config says; of a stack it is as many times that.

    deep: how many dimensions a parameter has in the model, where that is known: a stack has three.
    """
    for target in targets_of(adapter, params):
        said = {config.rank(key) for key in wrapped(target, config)}
        stack = target.plain and target.rank % min(said) == 0 and deep(target.keys[0]) != 2
        if not stack and said != {target.rank}:
            text = (
                f"{target.a!r} has rank {target.rank}, and adapter_config.json says {sorted(said)} of {target.keys[0]}"
            )
            yield Problem(text, (target.a,))


def config_of(params: Params, adapter: Adapter, lora_alpha: float, base: str | None) -> LoraConfig:
    """The config of these matrices: their names in full, the rank that most have, and what deviates from it."""
    targets = targets_of(adapter, params)
    if not targets:
        raise AdapterError("no matrix A among these parameters: expected native LoRA matrices")
    table = table_of(adapter)
    r = Counter(t.rank for t in targets).most_common(1)[0][0]
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        rank_pattern={re.escape(k): t.rank for t in targets if t.rank != r for k in t.keys},
        target_parameters=tuple(sorted(k for t in targets if t.parameter for k in t.keys)),
        target_modules=tuple(sorted(k for t in targets if not t.parameter for k in t.keys)),
        peft_version=table.version,
        base=base,
        other={"lora_B_layout": LAYOUTS[1]} if table.forms.grouped else {},
    )
