"""Kernels in Gluon: who takes them, who refuses. That they compile is in test_kernels_aot; nothing here runs them."""

import os
import subprocess
import sys
from pathlib import Path

import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
from fmoe_kernels.host import configs
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Act, Tiling
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import sorted_route
from fmoe_kernels.programs.up import up

ROOT = Path(__file__).parents[2]
TILES = Config(16, 16, 16, 4, 1, tma=True, specialised=True)


@pytest.mark.skipif(kernel_cases.DEVICE != "cpu", reason="on sm_90 it is not refused")
def test_a_device_that_is_no_hopper_refuses_them() -> None:
    x, w = torch.randn(8, 16), torch.randn(2, 16, 32)
    r = sorted_route(x, torch.tensor([4, 8]))
    for kernel, call in {
        "gmm": lambda: gmm(x, w, None, None, r, Tiling(only=TILES)),
        "up": lambda: up(x, w, None, None, r, Act("swiglu", 1.0, 0.0), Tiling(only=TILES), False),
    }.items():
        with pytest.raises(
            ValueError, match=f"^{kernel}: tiles are 16x16x16 w4 s1 p1 tma specialised, which only sm_90"
        ):
            call()


def test_no_table_ships_what_has_never_run() -> None:
    assert not any(c.specialised for arch in configs.load().values() for t in arch.values() for c in t.values())


LAUNCHES = """
import sys; sys.path.insert(0, "bench")
import torch
from fake_gpu import caught
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Act, Tiling
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import Route
from fmoe_kernels.programs.up import up
new = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
r = Route(*(new(n, dtype=torch.int32) for n in (512, 512, 512, 5)), 2)
only = Tiling(only=Config(128, 256, 64, 8, 4, 2, tma=True, specialised=True))
act, swiglu, quick = [Act(n, 1.0, 0.0) for n in ("relu2", "swiglu", "quick_geglu")]
x, w, b, p = new(512, 512), new(4, 512, 768), new(4, 768), new(512, dtype=torch.float32)
calls = dict(
    taken=lambda: gmm(x, w, None, None, r, only),
    turned=lambda: gmm(x, new(4, 768, 512).mT, None, None, r, only),
    bias=lambda: gmm(x, w, b, p, r, only),
    wide=lambda: gmm(x.float(), w.float(), None, None, r, only),
    odd=lambda: gmm(new(512, 500), new(4, 500, 767), None, None, r, only),
    taken_up=lambda: up(x, w, None, p, r, swiglu, only, True),
    not_saved=lambda: up(x, w, None, None, r, swiglu, only, False),
    not_gated=lambda: up(x, w, None, p, r, act, only, True),
    interleaved=lambda: up(x, w, None, p, r, quick, only, True),
    not_even=lambda: up(new(512, 520), new(4, 520, 768), None, p, r, swiglu, only, True),
    unaligned=lambda: up(new(512, 516)[:, :512], w, None, p, r, swiglu, only, True),
    biased=lambda: up(x, w, b, p, r, swiglu, only, True),
)
for name, call in calls.items():
    with caught("sm_90") as found:
        call()
    print(name, "gluon" if found[-1][0].is_gluon() else "triton", end=";")
"""


def test_what_they_cannot_multiply_goes_to_their_twins() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAUNCHES]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    found = dict(pair.split() for pair in run.stdout.strip(";\n").split(";"))
    taken = {name for name, who in found.items() if who == "gluon"}
    assert taken == {"taken", "turned", "taken_up", "not_saved"} and len(found) == 12, (found, run.stderr[-2000:])
