"""Weights from a trainer's tensors to an engine's names, a unit at a time, each rank its own experts: no gather.

    trainer, engine = fmoe.adapter(kind, config), fmoe.adapter(kind, config, system="vllm")
    for name, tensor in fmoe.sync.stream(trainer, engine, params, held=range(16, 32)):
        load(name, tensor)

A unit is what depends on each other and on nothing else: usually one tensor of the trainer's.
"""

from collections.abc import Iterator

from torch import Tensor

from fmoe.entrance import held
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import as_adapter
from fmoe.types import Params


def bridge(trainer: Adapter, engine: Adapter) -> Adapter:
    """The trainer's side -> the engine's side, both given as adapters from Hugging Face's.

    >>> import fmoe
    >>> print(bridge(fmoe.rule("w.{e}", "mine.{e}"), fmoe.rule("w.{e}", "theirs.{e}")))
    mine.{e}  <->  w.{e}
    >>
    w.{e}  <->  theirs.{e}
    """
    return as_adapter(trainer, "trainer").inverse >> as_adapter(engine, "engine")


def stream(
    trainer: Adapter, engine: Adapter, params: Params, *, held: range | None = None, **window: range
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the engine's tensors, lazily, in the order of the trainer's tensors that they are made of.

    held: the experts that params hold, where that is not all: the engine's tensors are then of these experts alone.
    window: a range of any axis to take of params, as e=range(0, 8), or i=range(0, 64): a tensor-parallel cut of the
    experts. Peak memory is that of the largest unit, and what is held of the one before. engine=Adapter() gives Hugging
    Face's names, which many an engine's loader takes: of native experts they are views, and no memory is taken.
    Raises AdapterError before anything is yielded.

    >>> import fmoe, torch
    >>> trainer, engine = fmoe.rule("w.{e} [i]", "w [e i]"), fmoe.rule("w.{e} [i]", "fused [e i]")
    >>> [(n, t.tolist()) for n, t in stream(trainer, engine, {"w": torch.tensor([[1, 2], [3, 4]])}, i=range(0, 1))]
    [('fused', [[1], [3]])]
    """
    asked = window if held is None else window | {"e": held}
    local = frozenset() if held is None else frozenset({"e"})
    plan = bridge(trainer, engine)._plan(params, asked, local)
    units = [(sources, targets) for sources, targets in plan.units() if targets]
    return (item for sources, targets in units for item in plan.run({n: params[n] for n in sources}, targets).items())


held(globals(), "bridge stream")
