"""The backend `te`: Transformer Engine's GroupedLinear multiplies, called as a function of our stacked parameters.

A module without numbers (on `meta`) is made for each shape, and every call hands it this call's weights. Biases, LoRA
and both weightings are those of `mlp`, so GroupedLinear has none of its own. FP8 and FP4 are Transformer Engine's:

    with transformer_engine.pytorch.autocast(recipe=Float8CurrentScaling()):
        y = fmoe.experts(params, x, routing, config, backend="te")

or `backend=functools.partial(fmoe.backends.te.te, recipe=recipe)`. A function has no amax history: no DelayedScaling.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fmoe.backends.mlp import mlp
from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params

INSTALL = "`pip install --no-build-isolation transformer-engine[pytorch]`"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.compiler.disable(reason="Transformer Engine is not traced: compile what is around it")
def te(params: Params, rows: Rows, config: MoEConfig, recipe: Any = None) -> Tensor:
    """`mlp` with both products of weights by Transformer Engine; biases, LoRA and weightings as `torch_mm` has them.

    recipe: of transformer_engine.common.recipe; None: products in x's dtype. With a recipe the rows of each expert are
    padded with zeros, for these products alone, to a multiple of 16, of MXFP8 32, of NVFP4 128. Waits for the counts.
    Weights stored as [out, in] (as Hugging Face has them) are multiplied where they lie, others are copied. First
    derivatives, by backward and by torch.func.grad; no vmap; torch.compile leaves its graph here.

    Raises ImportError, with the reason, without Transformer Engine; ValueError for DelayedScaling and for x other than
    bf16, fp16 and fp32.
    """
    if rows.x.dtype not in DTYPES:
        told = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"backend 'te': x is {rows.x.dtype}, expected {told}")
    if rows.x.is_meta:
        raise ValueError("backend 'te': x is on meta, expected data: Transformer Engine runs on nothing less")
    align, library = alignment(recipe), transformer_engine()
    splits = rows.counts.tolist()
    padded = [-(-n // align) * align for n in splits]
    N = sum(splits)
    if padded == splits and N == len(rows.x):
        return mlp(params, rows, config, by="torch_mm", weigh=_weigh(library, params, splits, recipe, None))
    # where each row lies among the padded; rows after the last expert's, which nobody will read, lie nowhere
    ends = torch.tensor([splits, padded]).cumsum(1)
    shift = ends[1] - ends[0] - torch.tensor(padded) + torch.tensor(splits)
    at = (torch.arange(N) + shift.repeat_interleave(torch.tensor(splits))).to(rows.x.device)
    lay = lambda t: t.new_zeros(sum(padded), *t.shape[1:]).index_copy(0, at, t[:N])
    counts = torch.tensor(padded, device=rows.counts.device)
    # a bias alone could make more of an empty row than scales allow for
    biased = config.apply_router_weight_after_down and config.expert_bias
    real = lay(torch.ones_like(rows.x[:, :1])) if biased else None
    weigh = _weigh(library, params, padded, recipe, real)
    out = mlp(params, Rows(lay(rows.x), lay(rows.weights), counts), config, by="torch_mm", weigh=weigh)
    return torch.cat([out.index_select(0, at), out.new_zeros(len(rows.x) - N, out.shape[1])])


def _weigh(
    library: Any, params: Params, splits: list[int], recipe: Any, real: Tensor | None
) -> Callable[[Tensor, str, Tensor], Tensor]:
    def weigh(h: Tensor, name: str, offsets: Tensor) -> Tensor:
        h = h if real is None or name != "down_projs" else h * real
        w = params[name].to(h.dtype).mT.contiguous()
        if not sum(splits):
            return h @ w[0].mT  # of the right shape, and zeros are its gradients
        product = _Product(library, splits, recipe, *_needs(h, w))
        if torch._C._are_functorch_transforms_active():
            y: Tensor = _Forward.apply(h, w, product)
            return y
        return product(h.contiguous(), w)

    return weigh


def _needs(*tensors: Tensor) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and t.requires_grad for t in tensors)


class _Product:
    """(x [N, K], w [E, M, K]) -> x[n] @ w[e]^T, by a module of this shape; once, since `backward` needs its graph."""

    def __init__(self, library: Any, splits: list[int], recipe: Any, *needs: bool) -> None:
        self.library, self.splits, self.recipe, self.needs = library, splits, recipe, needs
        self.graph: tuple[Tensor, list[Tensor]] | None = None

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        module = _module(self.library.GroupedLinear, *w.shape, w.dtype, self.needs)
        # the gradient of an expert without rows is zero, whatever the library makes of it: it goes nowhere. It must
        # require one all the same, since that of the first weight decides for all
        lone = lambda t: t.detach().requires_grad_(t.requires_grad)
        weights = {f"weight{e}": t if n else lone(t) for e, (n, t) in enumerate(zip(self.splits, w, strict=True))}
        with _autocast(self.library, self.recipe):
            y: Tensor = torch.func.functional_call(module, weights, (x,), {"m_splits": self.splits})
        return y

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """The same for a Function, which autograd does not look into: keeps its own graph."""
        leaves = [t.detach().contiguous().requires_grad_(need) for t, need in zip((x, w), self.needs, strict=True)]
        with torch.set_grad_enabled(any(self.needs)):
            y = self(*leaves)
        self.graph = (y, leaves) if any(self.needs) else None
        return y.detach()

    def backward(self, dy: Tensor) -> list[Tensor]:
        if self.graph is None:
            raise RuntimeError("backend 'te': backward a second time, after Transformer Engine has freed its buffers")
        (y, leaves), self.graph = self.graph, None
        wanted = [t for t in leaves if t.requires_grad]
        return list(torch.autograd.grad(y, wanted, dy.contiguous(), materialize_grads=True))


class _Forward(torch.autograd.Function):
    """Transformer Engine's own Functions fail under torch.func; this pair, around them, does not."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, product: _Product) -> Tensor:
        return product.forward(x, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.product = inputs[2]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        grads = iter(_Backward.apply(dy, ctx.product))
        return *(next(grads) if need else None for need in ctx.product.needs), None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "backend 'te': forward mode, which torch.func.hessian takes, is not implemented by Transformer Engine;"
            " 'torch_mm' has it"
        )


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(dy: Tensor, product: _Product) -> tuple[Tensor, ...]:
        return tuple(product.backward(dy))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("backend 'te': Transformer Engine has no second derivatives; 'torch_mm' has")


@lru_cache(maxsize=256)
def _module(kind: Any, E: int, M: int, K: int, dtype: torch.dtype, needs: tuple[bool, ...]) -> torch.nn.Module:
    """By needs too: a module's quantizers remember what the last call's backward would need."""
    made: torch.nn.Module = kind(
        num_gemms=E, in_features=K, out_features=M, bias=False, params_dtype=dtype, device="meta"
    )
    return made


def alignment(recipe: Any) -> int:
    """Of how many rows an expert must have a multiple: 1 without a recipe. Raises ValueError for DelayedScaling.

    Source: Transformer Engine 2.20, pytorch/quantization.py, get_align_size_for_quantization.
    """
    if recipe is None:
        return 1
    is_a = lambda kind: bool(getattr(recipe, kind, lambda: False)())  # older ones lack the younger kinds
    if is_a("delayed"):
        told = "expected Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling or NVFP4BlockScaling"
        raise ValueError(f"backend 'te': recipe {type(recipe).__name__} keeps amax histories between calls, {told}")
    if is_a("custom"):
        return int(getattr(recipe, "quantization_alignment", 128))
    return 32 if is_a("mxfp8") else 128 if is_a("nvfp4") else 16


def transformer_engine() -> Any:
    """transformer_engine.pytorch. Raises ImportError, with the reason, whatever it was."""
    try:
        library = import_module("transformer_engine.pytorch")
        library.GroupedLinear  # noqa: B018
        return library
    except Exception as error:  # RuntimeError, OSError, AssertionError: what is half installed fails in every way
        raise ImportError(
            f"backend 'te' cannot run here: {type(error).__name__}: {error}; {INSTALL}, or 'triton' or 'torch_mm'"
        ) from error


def _state(library: Any) -> Any:
    """Where Transformer Engine keeps which recipe is on: `fp8` in old versions, where `quantization` is not yet."""
    try:
        return import_module(f"{library.__name__}.quantization").FP8GlobalStateManager
    except ImportError:
        return import_module(f"{library.__name__}.fp8").FP8GlobalStateManager


def active_recipe() -> Any:
    """The recipe of the `transformer_engine.pytorch.autocast` around, or None."""
    state = _state(transformer_engine())
    return state.get_fp8_recipe() if state.is_fp8_enabled() else None


def _autocast(library: Any, recipe: Any) -> Any:
    """Always entered: a recomputation runs in backward, where the user's own autocast has long ended."""
    if hasattr(library, "autocast"):
        return library.autocast(enabled=recipe is not None, recipe=recipe)
    return library.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe)
