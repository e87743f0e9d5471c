"""A GPU that is not there: launches on `meta` tensors go through Triton's own dispatch and are compiled, not run.

    with fake_gpu("sm_90") as seen:
        route.make_route(indices, None, E)
    seen  # [(kernel's name, its hash, the compiled kernel), ..], one for each launch

Kernels are specialised, hashed and cached as on the device: filled on a CPU, a cache (TRITON_CACHE_DIR) serves a GPU
of that architecture, with the same triton and at the same path. Sizes of tables are those of the architecture.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from fmoe_kernels.host import configs
from fmoe_kernels.ops import custom, products
from fmoe_kernels.programs import activations, fp8, route
from torch._library.custom_ops import CustomOpDef
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as LaidOut
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Driver:
    """What `JITFunction.run` asks a driver for, before it would launch."""

    def __init__(self, arch: str) -> None:
        self.target = TARGETS[arch]

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def set_current_device(self, device: int) -> None:
        pass


@contextmanager
def driven(arch: str) -> Iterator[None]:
    before = driver._active  # asked for, it would be made, which fails without a GPU
    driver.set_active(Driver(arch))
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def on_meta(arch: str, run: Any) -> Iterator[None]:
    """Kernels and operators take tensors without data, as if on a device of arch; `run` is what a launch does."""
    changed = [(module, "check_runs", lambda **_: None) for module in (custom, products, activations, fp8, route)]
    changed += [(triton.JITFunction, "run", run), (configs, "architecture", lambda device: arch)]
    changed += [(CustomOpDef, "__call__", lambda op, *args, **more: op._init_fn(*args, **more))]
    changed += [(torch, "autocast", lambda *_, **__: nullcontext())]  # it knows no meta
    before = [getattr(where, name) for where, name, _ in changed]
    for where, name, now in changed:
        setattr(where, name, now)
    try:
        yield
    finally:
        for (where, name, _), then in zip(changed, before, strict=True):
            setattr(where, name, then)


@contextmanager
def fake_gpu(arch: str = "sm_90") -> Iterator[list[tuple[str, str, Any]]]:
    """Launches inside are compiled for arch and noted."""
    seen: list[tuple[str, str, Any]] = []
    real = triton.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = real(self, *args, grid=grid, warmup=True, **options)
        seen.append((self.__name__, kernel.hash, kernel))
        return kernel

    with driven(arch), on_meta(arch, run):
        yield seen


@contextmanager
def binaries(arch: str = "sm_90") -> Iterator[set[tuple[str, str]]]:
    """(kernel, key) of each binary that launches inside need, in a process that has compiled none. None is compiled."""
    found: set[tuple[str, str]] = set()
    real = triton.JITFunction._do_compile
    triton.JITFunction._do_compile = lambda self, key, *rest: found.add((self.__name__, str(key)))
    try:
        with driven(arch), on_meta(arch, triton.JITFunction.run):
            yield found
    finally:
        triton.JITFunction._do_compile = real


@contextmanager
def caught(arch: str) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Launches inside are noted, not made, as if on a device of arch."""
    found: list[Any] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((self, args, options))

    with on_meta(arch, note):
        yield found


def compiled(fn: Any, args: tuple[Any, ...], options: dict[str, Any], arch: str) -> Any:
    """The kernel as it would be compiled for these arguments."""
    values = dict(zip(fn.arg_names, args, strict=False)) | {n: options[n] for n in fn.arg_names if n in options}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        value = values[name]
        signature[name] = kind = "constexpr" if fn.params[i].is_constexpr else type_of(value)
        if kind == "constexpr":
            constants[(i,)] = value
        elif kind.startswith("*") or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    flags = {k: v for k, v in options.items() if k not in values}
    source = GluonASTSource if fn.is_gluon() else ASTSource
    return triton.compile(source(fn, signature, constants, attributes), target=TARGETS[arch], options=flags)


def type_of(value: Any) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    names |= {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv"}
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return "*" + names[value.dtype]
    if isinstance(value, TensorDescriptor | LaidOut):
        layout = f",{value.layout!r}" if isinstance(value, LaidOut) else ""
        return f"tensordesc<{names[value.base.dtype]}{list(value.block_shape)}{layout}>".replace(" ", "")
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
