"""Who multiplies rows by the matrices of their expert: `RAW` has two functions for each name.

gmm(x [N, K], w [E, K, M], offsets) -> [N, M] in x's dtype and tgmm(x [N, K], y [N, M], offsets) -> [E, K, M], as
`loop.py` defines them. They take any strides, allocate their result, and know nothing of autograd:
`fmoe/backends/products.py` adds that.
"""

from fmoe.backends.raw import loop, torch_mm, triton

RAW = {"loop": loop, "torch_mm": torch_mm, "triton": triton}
