"""Expert layers for tests of kernels: random problems with every oddity, and errors against fp64.

Where there is no GPU this switches Triton's interpreter on, which has to happen before any kernel is imported: kernels
then run on the CPU, in numpy. Its products of bf16 are wrong: `interpreted.bf16_products` mends them.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import interpreted
import interpreted_fast
from fmoe_kernels import reference
from fmoe_kernels.host import configs
from torch import Tensor

if os.environ["TRITON_INTERPRET"] == "1":
    interpreted.bf16_products()
    interpreted_fast.faster()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # for the few tests that tell what all rest on
NAMES = ("y", "x", "weights", "w_up", "w_down", "b_up", "b_down")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer and routing. order: how the weights are stored, [out, in] or [in, out]."""

    activation: str = "swiglu"
    T: int = 13
    D: int = 24
    I: int = 20
    E: int = 5
    K: int = 3
    bias: bool = False
    masked: bool = True
    after: bool = False
    order: str = "out in"
    routing: str = "odd"
    limit: float = 2.0
    seed: int = 0

    @property
    def U(self) -> int:
        return self.I if self.activation == "relu2" else 2 * self.I


def tensors(case: Case, dtype: torch.dtype, wide: torch.dtype) -> tuple[list[Tensor | None], Tensor, Tensor | None]:
    """([x, weights, w_up, w_down, b_up, b_down], indices, mask); rows that must not matter are NaN."""
    g = torch.Generator().manual_seed(case.seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    T, D, I, E, K, U = case.T, case.D, case.I, case.E, case.K, case.U
    x, weights = draw(T, D), torch.rand(T, K, generator=g, dtype=torch.float64)
    matrix = lambda n, m: draw(E, m, n).mT / n**0.5 if case.order == "out in" else draw(E, n, m) / n**0.5
    params = [matrix(D, U), matrix(I, D), *((draw(E, U), draw(E, D)) if case.bias else (None, None))]
    indices = route(case, g)
    mask = torch.rand(T, generator=g) > 0.3 if case.masked else None
    if mask is not None:
        x[~mask] = float("nan")
    weights[(indices < 0) | (indices >= E)] = float("nan")
    parts = [p if p is None else p.to(DEVICE, dtype) for p in (x, *params)]
    mask = mask if mask is None else mask.to(DEVICE)
    return [parts[0], weights.to(DEVICE, wide), *parts[1:]], indices.to(DEVICE), mask


def route(case: Case, g: torch.Generator) -> Tensor:
    """indices [T, K]. odd: ids -1 and far away, one expert twice, one never; skew: all to the last; none: nowhere."""
    T, E, K = case.T, case.E, case.K
    if case.routing == "none":
        return torch.full((T, K), -1)
    if case.routing == "skew":
        return torch.full((T, K), E - 1)
    indices = torch.randint(0, max(E - 1, 1), (T, K), generator=g)
    if case.routing == "odd" and T > 3:
        indices[0, 0], indices[1, -1], indices[2] = -1, E + 100, 1
    return indices


def run(function: Any, case: Case, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """y and all gradients of function, with dy random and NaN where a token is masked."""
    parts, indices, mask = tensors(case, dtype, torch.promote_types(dtype, torch.float32))
    parts = [p if p is None else p.clone(memory_format=torch.preserve_format).requires_grad_() for p in parts]
    x, weights, w_up, w_down, b_up, b_down = parts
    y = function(
        x,
        indices,
        weights,
        mask,
        w_up,
        w_down,
        b_up,
        b_down,
        activation=case.activation,
        limit=case.limit,
        weight_after_down=case.after,
        **options,
    )
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(case.seed + 1), dtype=torch.float64).to(y)
    if mask is not None:
        dy[~mask] = float("nan")
    y.backward(dy)
    grads = {name: p.grad for name, p in zip(NAMES[1:], parts, strict=True) if p is not None}
    assert all(g is not None for g in grads.values()), "a gradient is None"
    return {"y": y.detach(), **grads}


def error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|, 0 where both are zero."""
    assert found.isfinite().all(), "not finite"
    gap = (found.double() - exact).norm()
    return (gap / exact.norm()).item() if exact.norm() else gap.item()


# how far errors that round at random differ: fp16 results have one rounding each, and fewer here than in the twin;
# in fp32 the order in which a product is summed decides, which is ours in one and the BLAS's in the other
LUCK = {torch.bfloat16: 1.2, torch.float16: 1.2, torch.float32: 2.0}


def no_worse(found: dict[str, Tensor], case: Case, dtype: torch.dtype) -> None:
    """Every error against fp64 is at most that of the eager twin in the same dtype, up to luck."""
    exact, twin = run(reference.experts, case, torch.float64), run(reference.experts, case, dtype)
    assert found.keys() == exact.keys()
    for name in exact:
        ours, theirs = error(found[name], exact[name]), error(twin[name], exact[name])
        assert ours <= LUCK[dtype] * theirs + 0.1 * torch.finfo(dtype).eps, f"{name}: {ours:.2e}, the twin {theirs:.2e}"


def table(folder: Path, **config: Any) -> str:
    """A table file that gives every kernel these tiles."""
    tiles = dict(rows=16, columns=32, depth=16, warps=4, stages=1, group=2) | config
    path, arch = folder / "table.json", configs.architecture(torch.device(DEVICE))
    path.write_text(json.dumps({arch: {kernel: {"large": tiles} for kernel in ("up", "gmm", "dact", "dw")}}))
    return str(path)
