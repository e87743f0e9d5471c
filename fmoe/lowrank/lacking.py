"""What adapter_config.json says of LoRA matrices and they are not, by what is known of the base's class."""

from collections.abc import Iterable
from functools import partial

from fmoe.families import known
from fmoe.families.spelling import alike, in_memory, layers_with, spelt
from fmoe.layout.adapter import Adapter
from fmoe.lowrank.complete import Known, missing
from fmoe.lowrank.config import LoraConfig
from fmoe.lowrank.layers import deep, less, nowhere, sparse
from fmoe.lowrank.matrices import tied
from fmoe.lowrank.said import odd_ranks
from fmoe.types import Params, Problem


def lacking(params: Params, said: LoraConfig, adapter: Adapter, names: Iterable[str] | None = None) -> list[Problem]:
    """A problem for each target without matrices, and for each matrix that is otherwise than said, or of two weights.

    names: the base's, as its files have them; without them, what its class and other layers tell.
    """
    model = adapter.config or {}
    about = Known(
        partial(known.everywhere, model),
        lambda name: alike(model, name)[-1],
        partial(in_memory, model),
        partial(layers_with, model),
        str(model.get("model_type")) in spelt(),
        partial(nowhere, adapter),
        sparse(model),
    )
    odd = [*odd_ranks(params, said, adapter, partial(deep, adapter)), *(tied(params) if known.ties(model) else ())]
    problems = [*odd, *missing(params, said, adapter, names, about)]
    told = {key for p in problems for key in p.keys}
    return problems + ([] if names is not None else [p for p in less(params, said, adapter) if told.isdisjoint(p.keys)])
