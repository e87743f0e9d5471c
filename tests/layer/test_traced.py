"""torch.jit.trace writes a routing down as constants: whatever reads one refuses it; torch.export works."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import fmoe_kernels  # noqa: F401  (before a tracer is about)
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformed import CONFIG, PARAMS, ROUTING, X

import fmoe
from fmoe.backends import BACKENDS
from fmoe.dispatch import Rows, local

# the tracer's own: nothing of what it says there is an error
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
LAYER = fmoe.MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32")
IDS = torch.tensor([[0, 1], [2, 3], [3, 0]])
WEIGHTS = torch.ones(3, 2)


class Wrapped(nn.Module):
    """A model of somebody's: the exporter of ONNX passes no arguments by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = fmoe.nn.MoE(LAYER)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)


def block() -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    return {n: p.detach() for n, p in fmoe.nn.MoE(LAYER).state_dict().items()}, torch.randn(3, 8)


def calls() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    params, x = block()
    config, parts = LAYER, fmoe.subtree(params, "experts")
    rows = torch.randn(6, 8), torch.ones(6), torch.tensor([1, 2, 3, 0])
    return {
        "MoE": (fmoe.nn.MoE(config), (x,)),
        "in a model": (Wrapped(), (x,)),
        "moe": (lambda x: fmoe.moe(params, x, config), (x,)),
        "of a routing": (lambda x, i: fmoe.experts(parts, x, fmoe.Routing(i, WEIGHTS), config), (x, IDS)),
        "masked": (lambda x, m: fmoe.moe(params, x, config, mask=m), (x, torch.tensor([True, False, True]))),
        "lora": (
            lambda x: fmoe.experts(PARAMS, x, ROUTING._replace(weights=ROUTING.weights.float()), CONFIG),
            (X.float(),),
        ),
        "GroupedExperts": (fmoe.nn.GroupedExperts(config), (x, torch.ones(3).bool(), WEIGHTS, IDS)),
        "plan": (lambda i: local.plan(fmoe.Routing(i, WEIGHTS), config).slot_ids, (IDS,)),
        **{by: (lambda x, w, n, run=run: run(parts, Rows(x, w, n), config), rows) for by, run in BACKENDS.items()},
    }


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("call", calls())
def test_a_tracer_that_records_one_routing_is_refused(call: str, grad: bool) -> None:
    f, args = calls()[call]
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"under torch\.jit\.trace.* Fix: torch\.export"):
        torch.jit.trace(f, args, check_trace=False)
    f(*args)  # and nothing of the tracer is left behind


def test_the_exporter_of_onnx_that_traces_is_refused(tmp_path: Any) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=r"torch\.onnx\.export with dynamo=False"):
        torch.onnx.export(Wrapped(), (torch.randn(3, 8),), tmp_path / "a.onnx", dynamo=False)


def test_what_exports_a_block_whole_is_right_of_other_inputs() -> None:
    model, x, other = Wrapped(), torch.randn(3, 8), torch.randn(3, 8)
    state = dict(model.state_dict())
    with torch.no_grad():
        exported = [
            torch.export.export(model, (x,)).module(),
            torch.export.export(model, (x,), strict=True).module(),
            torch.compile(model, fullgraph=True, backend="eager"),
            partial(make_fx(partial(torch.func.functional_call, model), tracing_mode="fake")(state, x), state),
        ]
        for run in exported:
            torch.testing.assert_close(run(other), model(other))


AUXILIARY = replace(LAYER, aux_loss_coeff=0.1)
OF_MANY: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "y": lambda moe, x: moe(x),
    "y of one batch": lambda moe, x: moe(x[None]),
    "the loss that training attaches": lambda moe, x: moe(x),
    "switch": lambda moe, x: fmoe.losses.load_balancing(moe(x, return_routed=True)[1], AUXILIARY, kind="switch"),
    "sequence": lambda moe, x: fmoe.losses.load_balancing(moe(x, return_routed=True)[1], AUXILIARY, kind="sequence"),
    "drop": lambda moe, x: fmoe.routing.drop(moe(x, return_routed=True)[1].routing, 2).weights,
    "drop by position": lambda moe, x: fmoe.routing.drop(moe(x, return_routed=True)[1].routing, 2, by="position")[1],
}


class OfMany(nn.Module):
    """What is asked of the tokens that a mask takes: how many, no tracer knows."""

    def __init__(self, asked: str) -> None:
        super().__init__()
        self.moe, self.asked = fmoe.nn.MoE(AUXILIARY).train("training" in asked), OF_MANY[asked]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.asked(self.moe, x[mask])


@pytest.mark.parametrize("asked", OF_MANY)
def test_a_number_of_tokens_that_no_tracer_knows(asked: str) -> None:
    model, x = OfMany(asked), torch.randn(9, 8)
    args, other = (x, torch.arange(9) % 2 == 0), (x, torch.arange(9) % 4 != 0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        runs = [torch.export.export(model, args, strict=strict).module() for strict in (False, True)]
        for run in (*runs, torch.compile(model, fullgraph=True, backend="aot_eager")):
            torch.testing.assert_close(run(*other), model(*other), rtol=1e-4, atol=1e-5)
