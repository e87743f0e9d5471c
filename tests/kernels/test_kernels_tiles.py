"""Tiles: what a table may hold, that none of it changes a result, and how a sweep measures them."""

import importlib.util
import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fmoe_kernels
import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
import triton
import triton.language as tl
from fmoe_kernels.host import configs
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Act, Tiling
from fmoe_kernels.programs.dact import dact
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import make_route, sorted_route
from fmoe_kernels.programs.scalars import GATED
from fmoe_kernels.tools import tuning
from fmoe_kernels.tools.tuning import candidates
from triton.tools.tensor_descriptor import TensorDescriptor

DEVICE = kernel_cases.DEVICE
TWICE = {"up": Config(128, 64, 64, 4, 3, 2, ctas=2, tma=True), "dact": Config(128, 128, 64, 4, 3, 4, ctas=2, tma=True)}
FLAT = Config(128, 128, 64, 4, 3, 2, ctas=2, tma=True, flatten=True)


@pytest.mark.parametrize("kernel, tiles", [*TWICE.items(), ("gmm", FLAT), ("gmm", FLAT._replace(flatten=False))])
def test_tiles_of_which_two_fit_are_swept(kernel: str, tiles: Config) -> None:
    assert tiles in candidates(kernel, tma=True)
    assert not any(c.flatten for c in candidates(kernel, tma=False))


def test_a_table_names_its_tiles_apart() -> None:
    for kernel in ("up", "gmm", "dact", "dw"):
        tried = candidates(kernel, tma=True)
        assert len({str(c) for c in tried}) == len(tried)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("name", ["swiglu", "geglu", "quick_geglu", "relu2"])
def test_parts_of_a_tile_change_no_bit(name: str, tma: bool) -> None:
    torch.manual_seed(0)
    (T, K, E, D, I), U = (9, 2, 3, 16, 64), 64 * (1 + GATED[name])
    r = make_route(torch.randint(0, E, (T, K), device=DEVICE), None, E)
    new = lambda *shape: torch.randn(shape, dtype=torch.float16, device=DEVICE)
    args = new(T, D), new(E, I, D), new(T * K, U), torch.rand(T * K, device=DEVICE), r, Act(name, 1.5, 2.0)
    tiles = [Config(16, 64, 16, 4, 1, parts, tma=tma) for parts in (1, 2, 4, 8)]
    first, *others = (dact(*args, Tiling(only=c)) for c in tiles)
    for found in others:
        assert torch.equal(found[0], first[0]) and torch.equal(found[1], first[1])
        torch.testing.assert_close(found[2], first[2])  # summed part by part


def test_a_flattened_product_is_the_same() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(40, 24, device=DEVICE), torch.randn(3, 24, 20, device=DEVICE)
    r = sorted_route(x, torch.tensor([17, 17, 40], device=DEVICE))
    plain, flat = (gmm(x, w, None, None, r, Tiling(only=Config(16, 16, 16, 4, 1, flatten=f))) for f in (False, True))
    assert torch.equal(plain, flat)


@triton.jit
def columns(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1.0)


def test_no_axis_of_a_tile_is_other_than_a_power_of_two() -> None:
    """By neither way to memory, so tables hold none: the compiler refuses 192 columns before it looks at a device."""
    with pytest.raises(Exception, match="power of 2"):
        columns[(1,)](torch.zeros(192, device=DEVICE), N=192)
    with pytest.raises(ValueError, match="power of 2"):
        TensorDescriptor.from_tensor(torch.zeros(4, 192, device=DEVICE), [4, 192])


class Clock:
    """A device whose events tell what a call took there, in ms, and that is asked only when all is queued."""

    def __init__(self, took: list[float]) -> None:
        self.took, self.said = iter(took), list[str]()

    def Event(self, enable_timing: bool) -> Any:
        clock = self

        class Event:
            def record(self) -> None:
                clock.said.append("event")

            def elapsed_time(self, end: Any) -> float:
                assert clock.said[-1] == "wait"
                return next(clock.took)

        assert enable_timing
        return Event()


def common() -> Any:
    """bench/gpu/common.py as on a GPU, its tensors nowhere."""
    path = Path(__file__).parents[2] / "bench" / "gpu" / "common.py"
    spec = importlib.util.spec_from_file_location("gpu_common", path)
    assert spec and spec.loader
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    module.DEVICE, module.DRY = "meta", False
    return module


TIMERS: dict[str, Callable[[Callable[[], object]], float]] = {
    "the sweep": lambda call: tuning._seconds(call, torch.device("cuda")),
    "bench": lambda call: common().seconds(call, budget=60),
}


@pytest.mark.parametrize("timer", TIMERS)
def test_launches_are_timed_by_events_not_by_the_hosts_clock(timer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([7.0, 5.0, 900.0] * 10)
    for name, said in {"_sleep": "sleep", "synchronize": "wait"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, said=said: clock.said.append(said))
    monkeypatch.setattr(torch.cuda, "Event", clock.Event)
    slow = lambda: (time.sleep(0.002), clock.said.append("call"))
    assert TIMERS[timer](slow) == 0.007
    assert clock.said == ["sleep", "event", "call", "event", "wait"] * (len(clock.said) // 5) and len(clock.said) > 30


SMALL = dict(n_tokens=8, dim=16, width=16, n_experts=2, top_k=1, dtype=torch.float32, device=DEVICE)
TRIED = [Config(16, 16, 16, 4, 1), Config(16, 32, 16, 4, 1)]


def test_a_sweep_takes_the_fastest_on_the_device_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, took = list[Any](), iter([2.0, 1.0, 1.0, 2.0] * 2)

    @contextmanager
    def guard(index: int | None) -> Any:
        inside.append(index)
        yield
        inside.pop()

    def seconds(call: Any, device: torch.device) -> float:
        assert len(inside) == 1 and device.type == torch.device(DEVICE).type
        return next(took)

    monkeypatch.setattr(torch.accelerator, "device_index", guard)
    monkeypatch.setattr(tuning, "_seconds", seconds)
    path = tmp_path / "tiles.json"
    fmoe_kernels.tune(path, **SMALL, among=TRIED)
    table = json.loads(path.read_text())[configs.architecture(torch.device(DEVICE))]
    assert [table[kernel]["fp32"]["columns"] for kernel in ("up", "gmm", "dact", "dw")] == [32, 16, 32, 16]


def test_a_sweep_that_is_out_of_time_or_killed_leaves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiles.json"
    found = fmoe_kernels.tune(path, **SMALL, among=TRIED, limit=0)
    assert [len(timings) for timings in found.values()] == [1] * 4  # no time for two, but one is always known
    took = iter([2.0, 1.0])
    monkeypatch.setattr(tuning, "_seconds", lambda *_: next(took))
    path.unlink()
    with pytest.raises(StopIteration):
        fmoe_kernels.tune(path, **SMALL, among=TRIED)
    table = json.loads(path.read_text())[configs.architecture(torch.device(DEVICE))]
    assert table["up"]["fp32"]["columns"] == 32
