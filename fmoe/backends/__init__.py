"""Who multiplies: a backend is a function (params, rows, config) -> rows, and `BACKENDS` has them by name.

`BACKENDS` holds what runs on every machine, so that whatever walks it does too; `triton` is found by name, and where
it runs (a GPU, or TRITON_INTERPRET=1) `BACKENDS["triton"] = find("triton", device)` puts it to every test.
Only files in this folder may import an accelerator library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

from torch import Tensor, device

from fmoe.backends.loop import loop
from fmoe.backends.torch_mm import torch_mm
from fmoe.dispatch import Rows
from fmoe.folding import meant
from fmoe.types import MoEConfig, Params

Backend = Callable[[Params, Rows, MoEConfig], Tensor]

BACKENDS: dict[str, Backend] = {"loop": loop, "torch_mm": torch_mm}
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Fused:
    """A backend that also takes a whole layer, without sorted rows in between.

    layer(params, x, routing, config, recompute=, wide=, batch_invariant=) -> y [T, D], without LoRA, in fp32 if wide
    and otherwise in x's dtype: `fmoe.experts` calls it where nobody moves tokens (`dispatcher=local`), no LoRA matrix
    is present, nothing is fp64 and no weight is codes, and otherwise `rows`, which takes all of these.
    """

    rows: Backend
    layer: Callable[..., Tensor]

    def __call__(self, params: Params, rows: Rows, config: MoEConfig) -> Tensor:
        """rows(params, rows, config)."""
        return self.rows(params, rows, config)


class Coded(NamedTuple):
    """A backend that multiplies codes as they are, with their scales beside them.

    takes(params): whether it does so with all of these that are codes; otherwise they are decoded for it.
    """

    rows: Backend
    takes: Callable[[Params], bool]

    def __call__(self, params: Params, rows: Rows, config: MoEConfig) -> Tensor:
        """rows(params, rows, config)."""
        return self.rows(params, rows, config)


def find(backend: str | Backend | None, where: device) -> Backend:
    """The backend of a name, a function as it is, and for None: triton on a GPU that has it, otherwise torch_mm.

    Raises ValueError for an unknown name, ImportError, with the reason, for one whose library cannot be imported.

    >>> find(None, device("cpu")) is BACKENDS["torch_mm"]
    True
    """
    if callable(backend):
        return backend
    name = ("triton" if where.type == "cuda" and HAS_TRITON else "torch_mm") if backend is None else backend
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(NAMES)}, or a function{meant(name, NAMES)}")
    return BACKENDS[name] if name in BACKENDS else ON_DEMAND[name](name)


def takes_codes(backend: Backend, params: Params) -> bool:
    """Whether a backend takes these parameters, of which some are codes, as they are.

    >>> takes_codes(loop, {}), takes_codes(lambda params, rows, config: rows.x, {})
    (True, False)
    """
    if isinstance(backend, Coded):
        return backend.takes(params)
    return backend in (loop, torch_mm) or isinstance(backend, Fused)


def _triton(name: str) -> Backend:
    if not HAS_TRITON:
        others = " or ".join(map(repr, BACKENDS))
        raise ImportError(
            f"backend {name!r} cannot run here: triton is not installed; `pip install triton`, or {others}"
        )
    if name == "triton_fp8":
        from fmoe.backends import fp8

        made: Any = Coded(fp8.triton_fp8, fp8.takes)  # mypy does not see that such a tuple can be called
        return made
    from fmoe.backends import triton

    return Fused(triton.triton, triton.fused)


def _mxfp8(name: str) -> Backend:
    from fmoe.backends.mxfp8 import torch_mm_mxfp8

    return torch_mm_mxfp8


def _te(name: str) -> Backend:
    from fmoe.backends import te

    # the recipe that is on where the layer begins: a recomputation of it has the same
    return partial(te.te, recipe=te.active_recipe())


ON_DEMAND: dict[str, Callable[[str], Backend]] = {
    "triton": _triton,
    "triton_fp8": _triton,
    "torch_mm_mxfp8": _mxfp8,
    "te": _te,
}
NAMES = (*BACKENDS, *ON_DEMAND)
