"""A GPU that is not there: launches on `meta` tensors go through Triton's own dispatch and are compiled, not run.

    with fake_gpu("sm_90") as seen:
        route.make_route(indices, None, E)
    seen  # [(kernel's name, its hash, the compiled kernel), ..], one for each launch

Kernels are specialised, hashed and cached as on the device: filled on a CPU, a cache (TRITON_CACHE_DIR) serves a GPU
of that architecture, with the same triton and at the same path. Sizes of tables are those of the architecture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from fmoe_kernels.host import configs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

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
def fake_gpu(arch: str = "sm_90") -> Iterator[list[tuple[str, str, Any]]]:
    """Launches inside are compiled for arch and noted."""
    seen: list[tuple[str, str, Any]] = []
    real, architecture = triton.JITFunction.run, configs.architecture

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = real(self, *args, grid=grid, warmup=True, **options)
        seen.append((self.__name__, kernel.hash, kernel))
        return kernel

    before = driver._active  # asked for, it would be made, which fails without a GPU
    driver.set_active(Driver(arch))
    triton.JITFunction.run, configs.architecture = run, lambda device: arch
    try:
        yield seen
    finally:
        triton.JITFunction.run, configs.architecture = real, architecture
        driver._active = before
