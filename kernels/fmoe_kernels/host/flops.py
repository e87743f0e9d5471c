"""FLOP formulas for `torch.utils.flop_counter`, also for a counter that began before the operator was imported."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

Formula = Callable[..., int]


def formula(op: Any) -> Callable[[Formula], Formula]:
    """Registers f(shapes of the arguments) as the cost of an operator; counters that are at work hear of it too."""

    def register(f: Formula) -> Formula:
        register_flop_formula(op)(f)
        for mode in _get_current_dispatch_mode_stack():
            counter = getattr(mode, "counter", None)
            if isinstance(counter, FlopCounterMode):
                counter.flop_registry[op] = flop_registry[op]
        return f

    return register
