"""What adapter_config.json says of LoRA matrices, and what it has to say of some."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from fmoe.layout.adapter import Adapter
from fmoe.lowrank.config import LAYOUTS, LoraConfig
from fmoe.lowrank.targets import Target, table_of, targets_of, wrapped
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


def config_of(
    params: Params,
    adapter: Adapter,
    lora_alpha: float,
    base: str | None,
    adapted: Callable[[str], Mapping[str, int] | None],
) -> LoraConfig:
    """The config of these matrices: their names in full, the rank that most have, and what deviates from it.

    adapted: of a module, the parameters that PEFT adapts in its place, and of how many dimensions; None: nobody knows.
    Raises AdapterError where the base's class does not tell whether they adapt a module or a parameter, or their r.
    """
    targets = [_called(t, adapter, params, adapted) for t in targets_of(adapter, params)]
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


def _called(
    target: Target, adapter: Adapter, params: Params, adapted: Callable[[str], Mapping[str, int] | None]
) -> Target:
    """The target, a parameter where that is what the class has there: A [r, inputs] has the name of its module."""
    if not target.a.endswith(".lora_A.weight") or params[target.a].ndim > 2:  # that of a convolution
        return target
    model, (key,) = adapter.config or {}, target.keys
    module, _, parameter = key.rpartition(".") if target.parameter else (key, "", "")
    held = adapted(module)
    told = {parameter: (held or {}).get(parameter)} if parameter else held
    if told == {}:
        return target
    of = f"{model.get('model_type')!r}: {module}"
    if not told or None in told.values():
        why = f"whether PEFT adapts a module of {of}, or a parameter of it, is known of no class of that type"
    elif len(told) > 1:
        why = f"it can adapt {' or '.join(sorted(told))} of {of}"
    elif {*told.values()} != {2}:
        why = f"it adapts a stack, {min(told)} of {of}, and no name tells of how many matrices: its rank is r for each"
    else:
        return target._replace(parameter=True, keys=(f"{module}.{min(told)}",))
    fix = "Fix: pass config=, as fmoe.lora.load gives it, or a LoraConfig that names what is adapted"
    raise AdapterError([Problem(f"{target.a!r}: {why}. {fix}", (target.a,))])
