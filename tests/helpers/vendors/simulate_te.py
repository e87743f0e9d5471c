"""A stand-in for Transformer Engine on a CPU that holds us to its contract: strict, and unkind where it may be.

What it insists on was read in the source of the versions in `VERSIONS`; every call must bind to the signature recorded
from that version. What the contract leaves open (the weight gradient of an expert without rows) is NaN. It shows that
our side of the contract is right; it has no idea whether Transformer Engine's kernels are.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import published
import torch
from torch import Tensor

VERSIONS = ("2.4.0", "2.16.1", "2.17.1", "2.20.2")
KINDS = ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling", "CustomRecipe")
ALIGN = {"MXFP8BlockScaling": 32, "NVFP4BlockScaling": 128, "CustomRecipe": 64}
METHODS = {"MXFP8BlockScaling": "mxfp8", "NVFP4BlockScaling": "nvfp4", "CustomRecipe": "custom"}


class World:
    """What was called, in order, with what; and the recipe that is on."""

    def __init__(self, version: str) -> None:
        self.version, self.signatures = version, published.recorded()[f"transformer_engine-{version}"]
        self.old = tuple(map(int, version.split(".")[:2])) < (2, 17)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.recipe: Any = None

    def bind(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = self.signatures[name].bind(*args, **kwargs).arguments
        self.calls.append((name, dict(found)))
        return found

    def named(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]


def recipe(world: World, name: str) -> Any:
    methods = ("delayed", "mxfp8", *(() if world.version == "2.4.0" else ("nvfp4", "custom")))
    is_a = {m: (lambda value: lambda self: value)(METHODS.get(name) == m) for m in methods}
    is_a["delayed"] = lambda self: name == "DelayedScaling"
    return type(name, (), {**is_a, "quantization_alignment": 64})()


def _rounded(t: Tensor) -> Tensor:
    """e4m3 with one scale."""
    if not t.numel():
        return t
    scale = t.abs().amax().clamp(min=1e-30) / 448
    return (t / scale).to(torch.float8_e4m3fn).to(t.dtype) * scale


class _Products(torch.autograd.Function):
    """In the form of Transformer Engine's own, which torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, splits: list[int], low: bool, bias: bool, *given: Tensor) -> Tensor:
        weights, biases = given[: len(splits)], given[len(splits) :]
        as_is = _rounded if low else lambda t: t
        parts = [as_is(part) for part in x.split(splits)]
        weights = tuple(as_is(w) for w in weights)
        ctx.save_for_backward(*parts, *weights)
        # the first weight decides for all of them
        ctx.splits, ctx.as_is, ctx.spent, ctx.first, ctx.bias = splits, as_is, [], given[0].requires_grad, bias
        out = [p @ w.mT + (biases[i] if bias else 0) for i, (p, w) in enumerate(zip(parts, weights, strict=True))]
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        assert not ctx.spent, "buffers are freed after the first backward"
        ctx.spent.append(True)
        n, saved = len(ctx.splits), ctx.saved_tensors
        parts, weights = saved[:n], saved[n:]
        grads = dy.contiguous().split(ctx.splits)
        low = [ctx.as_is(g) for g in grads]
        dx = torch.cat([g @ w for g, w in zip(low, weights, strict=True)])
        dw = [
            g.mT @ p if len(p) else torch.full_like(w, torch.nan) for g, p, w in zip(low, parts, weights, strict=True)
        ]
        db = [g.sum(0) for g in grads] if ctx.bias else []
        return dx, None, None, None, *(dw if ctx.first else [None] * n), *db


def _library(world: World) -> tuple[ModuleType, ModuleType]:
    class GroupedLinear(torch.nn.Module):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            self.made = SimpleNamespace(**world.bind("GroupedLinear.__init__", *args, **kwargs))
            assert self.made.device == "meta", "a module with numbers of its own"
            self.use_bias = getattr(self.made, "bias", True)
            for i in range(self.made.num_gemms):
                shape = self.made.out_features, self.made.in_features
                new = lambda *s: torch.nn.Parameter(torch.empty(*s, device="meta", dtype=self.made.params_dtype))
                setattr(self, f"weight{i}", new(*shape))
                if self.use_bias:
                    setattr(self, f"bias{i}", new(shape[0]))

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            given = world.bind("GroupedLinear.forward", *args, **kwargs)
            x, splits, n = given["inp"], given["m_splits"], self.made.num_gemms
            weights = [getattr(self, f"weight{i}") for i in range(n)]
            biases = [getattr(self, f"bias{i}") for i in range(n)] if self.use_bias else []
            assert isinstance(splits, list) or (isinstance(splits, Tensor) and not world.old), type(splits)
            assert all(type(m) is int for m in splits) if isinstance(splits, list) else splits.dtype == torch.int64
            splits = list(map(int, splits))
            assert len(splits) == n and sum(splits) == len(x) > 0, "Automodel and Megatron never call it without rows"
            assert x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.is_contiguous() and x.ndim == 2
            assert type(x) is Tensor and x.shape[1] == self.made.in_features
            for w in weights:
                assert not w.is_meta, "a weight was not handed over"
                assert w.is_contiguous() and w.shape == (self.made.out_features, self.made.in_features), w.stride()
                assert w.dtype == x.dtype == self.made.params_dtype
            if world.recipe is not None:
                align = ALIGN.get(type(world.recipe).__name__, 16)
                assert not any(m % align for m in splits), f"rows {splits}, expected multiples of {align}"
                assert not any(m % 16 for m in weights[0].shape), "features, expected multiples of 16"
            world.calls[-1][1]["recipe"], world.calls[-1][1]["weights"] = world.recipe, weights
            y: Tensor = _Products.apply(x, splits, world.recipe is not None, self.use_bias, *weights, *biases)
            return y

    name = "fp8_autocast" if world.version == "2.4.0" else "autocast.__init__"

    @contextmanager
    def autocast(*args: Any, **kwargs: Any) -> Iterator[None]:
        given = world.bind(name, *args, **kwargs)
        before, told = world.recipe, given.get("recipe", given.get("fp8_recipe"))
        world.recipe = (told or recipe(world, "DelayedScaling")) if given.get("enabled", True) else None
        try:
            yield
        finally:
            world.recipe = before

    class FP8GlobalStateManager:
        @classmethod
        def is_fp8_enabled(cls) -> bool:
            world.bind("FP8GlobalStateManager.is_fp8_enabled")
            return world.recipe is not None

        @classmethod
        def get_fp8_recipe(cls) -> Any:
            world.bind("FP8GlobalStateManager.get_fp8_recipe")
            return world.recipe

    library, state = ModuleType("transformer_engine.pytorch"), ModuleType("state")
    library.__path__ = []
    library.GroupedLinear, state.FP8GlobalStateManager = GroupedLinear, FP8GlobalStateManager  # type: ignore
    setattr(library, name.removesuffix(".__init__"), autocast)
    return library, state


@contextmanager
def installed(version: str = VERSIONS[-1]) -> Iterator[World]:
    """Transformer Engine of this version can be imported, until the end."""
    from fmoe.backends import te

    world = World(version)
    library, state = _library(world)
    package = ModuleType("transformer_engine")
    package.__path__ = []
    where = "fp8" if version == "2.4.0" else "quantization"
    added = {"": package, ".pytorch": library, f".pytorch.{where}": state}
    for name, module in added.items():
        sys.modules[f"transformer_engine{name}"] = module
    try:
        yield world
    finally:
        te._module.cache_clear()
        for name in added:
            del sys.modules[f"transformer_engine{name}"]
