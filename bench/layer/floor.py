"""What no expert layer that calls torch.mm can be faster than: its products alone, nothing around them.

Rows are gathered, outputs are at hand, and nothing is activated, weighted or added up. A gradient of a weight is
written in whichever of the two orders of storage is the faster, as a layer may choose.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Calls = dict[str, Callable[[], None]]


def products(rows: list[Tensor], up: Tensor, down: Tensor, native: bool) -> dict[str, Calls]:
    """The products of each phase: forward, and both; x [rows, D] of each expert, up and down as they are stored."""
    used = [(x, up[e], down[e]) if native else (x, up[e].mT, down[e].mT) for e, x in enumerate(rows) if len(x)]
    dtype = up.dtype
    cells = []
    for x, w1, w2 in used:
        n, (D, U), I = len(x), w1.shape, w2.shape[0]
        z, h, y = (torch.randn(n, size).to(dtype) for size in (U, I, D))
        cells.append((x, w1, w2, z, h, y, torch.empty(n, D, dtype=dtype), torch.empty(n, I, dtype=dtype)))
    grads = [(torch.empty(up.shape[1:], dtype=dtype), torch.empty(down.shape[1:], dtype=dtype)) for _ in used]

    def forward() -> None:
        for x, w1, w2, z, h, y, _, _ in cells:
            torch.mm(x, w1, out=z)
            torch.mm(h, w2, out=y)

    def backward(stored: bool) -> None:
        forward()
        for (x, w1, w2, z, h, y, dx, dh), (g1, g2) in zip(cells, grads, strict=True):
            torch.mm(y, w2.mT, out=dh)
            torch.mm(z, w1.mT, out=dx)
            if stored == native:
                torch.mm(x.mT, z, out=g1.view(x.shape[1], z.shape[1]))
                torch.mm(h.mT, y, out=g2.view(h.shape[1], y.shape[1]))
            else:
                torch.mm(z.mT, x, out=g1.view(z.shape[1], x.shape[1]))
                torch.mm(y.mT, h, out=g2.view(y.shape[1], h.shape[1]))

    stored, turned = (lambda: backward(True)), (lambda: backward(False))
    return {"forward": {"products": forward}, "both": {"products": stored, "products turned": turned}}
