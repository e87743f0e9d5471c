"""Errors of the kernels against fp64 at real widths, beside those of the eager twin; twice, for the same bits.

Relative norms, forward and every gradient. `ratio` is ours over the twin's; unwritten memory is NaN, as are masked
tokens. bf16 and swiglu first: what a run is about.
"""

from typing import Any

import fmoe_kernels
import torch
from common import DEVICE, DRY, Record, tried
from fmoe_kernels import reference
from fmoe_kernels.programs.scalars import GATED, SCALARS

NAMES = ("y", "x", "weights", "w_up", "w_down", "b_up", "b_down")
WIDTHS = {"qwen3": (2048, 768, 16, 4, 1500), "gpt-oss": (2880, 2880, 4, 2, 600), "decode": (2048, 768, 32, 8, 4)}
WIDTHS |= {"odd": (1001, 503, 8, 2, 300)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
if DRY:
    WIDTHS, DTYPES = {"tiny": (16, 16, 2, 1, 4)}, DTYPES[2:]


def run(f: Any, dtype: torch.dtype, act: str, sizes: tuple[int, ...], after: bool) -> list[torch.Tensor]:
    D, I, E, K, T = sizes
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(shape, device=DEVICE, dtype=torch.float64)
    U = 2 * I if GATED[act] else I
    parts = [new(T, D), torch.rand(T, K, device=DEVICE).double(), new(E, U, D).mT / D**0.5, new(E, D, I).mT / I**0.5]
    parts += [new(E, U), new(E, D)]
    indices = torch.randint(-1, E, (T, K), device=DEVICE)  # the last expert may be without tokens
    mask = torch.rand(T, device=DEVICE) > 0.1
    dy = new(T, D)
    parts[0], dy = (t.masked_fill(~mask[:, None], float("nan")) for t in (parts[0], dy))
    wide = torch.promote_types(dtype, torch.float32)
    parts = [p.to(wide if i == 1 else dtype).requires_grad_() for i, p in enumerate(parts)]
    x, w, up, down, b_up, b_down = parts
    y = f(x, indices, w, mask, up, down, b_up, b_down, activation=act, weight_after_down=after)
    return [y, *torch.autograd.grad(y, parts, dy.to(y.dtype))]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def compared(act: str, sizes: tuple[int, ...], after: bool, dtype: torch.dtype) -> dict[str, Any]:
    exact = run(reference.experts, torch.float64, act, sizes, after)
    ours, again = (run(fmoe_kernels.experts, dtype, act, sizes, after) for _ in range(2))
    twin = run(reference.experts, dtype, act, sizes, after)
    errors = {n: error(a, b) for n, a, b in zip(NAMES, ours, exact, strict=True)}
    ratio = max(errors[n] / max(error(a, b), 1e-30) for n, a, b in zip(NAMES, twin, exact, strict=True))
    return dict(ratio=ratio, repeats=all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), **errors)


def main(record: Record) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.matmul.allow_tf32 = False
    order = [("swiglu", False), ("quick_geglu", True)] + [(act, False) for act in SCALARS if act != "swiglu"]
    for dtype in DTYPES:
        for act, after in order[:1] if DRY else order:
            for name, sizes in WIDTHS.items():
                what = dict(shape=name, activation=act, after_down=after, dtype=str(dtype).split(".")[1])
                tried(record, lambda a=act, s=sizes, f=after, d=dtype: compared(a, s, f, d), **what)
