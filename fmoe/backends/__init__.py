"""Who multiplies: a backend is a function (params, rows, config) -> rows, and `BACKENDS` has them by name.

`BACKENDS` holds what runs on every machine, so that whatever walks it does too; `triton` is found by name, and where
it runs (a GPU, or TRITON_INTERPRET=1) `BACKENDS["triton"] = find("triton", device)` puts it to every test.
Only files in this folder may import an accelerator library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor, device

from fmoe.backends.loop import loop
from fmoe.backends.torch_mm import torch_mm
from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params

Backend = Callable[[Params, Rows, MoEConfig], Tensor]

BACKENDS: dict[str, Backend] = {"loop": loop, "torch_mm": torch_mm}
NAMES = (*BACKENDS, "triton")
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Fused:
    """A backend that also takes a whole layer, without sorted rows in between.

    layer(params, x, routing, config, recompute=bool) -> y [T, D], neither rounded nor with LoRA: `fmoe.experts` calls
    it where nobody moves tokens (`dispatcher=local`) and no LoRA matrix is present, and otherwise `rows`.
    """

    rows: Backend
    layer: Callable[..., Tensor]

    def __call__(self, params: Params, rows: Rows, config: MoEConfig) -> Tensor:
        """rows(params, rows, config)."""
        return self.rows(params, rows, config)


def find(backend: str | Backend | None, where: device) -> Backend:
    """The backend of a name, a function as it is, and for None: triton on a GPU that has it, otherwise torch_mm.

    Raises ValueError for an unknown name, ImportError for triton where it is not installed.

    >>> find(None, device("cpu")) is BACKENDS["torch_mm"]
    True
    """
    if callable(backend):
        return backend
    name = ("triton" if where.type == "cuda" and HAS_TRITON else "torch_mm") if backend is None else backend
    if name in BACKENDS:
        return BACKENDS[name]
    if name == "triton":
        return _triton()
    raise ValueError(f"backend is {name!r}, expected one of {', '.join(NAMES)}, or a function")


def _triton() -> Backend:
    if not HAS_TRITON:
        others = " or ".join(map(repr, BACKENDS))
        raise ImportError(
            f"backend 'triton' cannot run here: triton is not installed; `pip install triton`, or {others}"
        )
    from fmoe.backends import triton

    return Fused(triton.triton, triton.fused)
