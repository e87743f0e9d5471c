"""Who multiplies: a backend is a function (params, rows, config) -> rows, and `BACKENDS` has them by name.

Only files in this folder may import an accelerator library.
"""

from collections.abc import Callable

from torch import Tensor

from fmoe.backends.loop import loop
from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params

Backend = Callable[[Params, Rows, MoEConfig], Tensor]

BACKENDS: dict[str, Backend] = {"loop": loop}
