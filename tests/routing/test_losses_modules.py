"""Losses of a module's router: attached while it trains, counted once, over a group."""

import copy
from typing import Any

import pytest
import threads
import torch
import torch.distributed as dist
from torch import Tensor

from fmoe import MoEConfig
from fmoe.losses import attach, load_balancing
from fmoe.nn import MoE

E, K, D, B, S = 6, 2, 5, 3, 4


def layer(**asked: Any) -> MoE:
    torch.manual_seed(0)
    made = MoE(MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=4, dtype="float32", **asked))
    for p in made.parameters():
        torch.nn.init.normal_(p)
    return made


def test_the_module_attaches_its_loss_while_it_trains() -> None:
    x = torch.randn(2, 7, D)
    mask = torch.rand(2, 7) < 0.7
    plain, asked = layer(), layer(aux_loss_coeff=0.3)
    y, found = plain(x, mask, return_routed=True)
    (y.sum() + 0.3 * load_balancing(found, plain.config)).backward()
    out = asked(x, mask)
    assert torch.equal(out, y)
    out.sum().backward()
    torch.testing.assert_close(asked.gate.weight.grad, plain.gate.weight.grad)
    asked.zero_grad()
    asked.eval()(x, mask).sum().backward()
    other = layer()
    other(x, mask).sum().backward()
    torch.testing.assert_close(asked.gate.weight.grad, other.gate.weight.grad)
    frozen = layer(train_gate=False, aux_loss_coeff=0.3)
    frozen(x).sum().backward()
    assert frozen.gate.weight.grad is None


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_module_counts_once_whatever_is_computed_again(reentrant: bool | None) -> None:
    m = layer(score_func="sigmoid", gate_bias_update_factor=0.1)
    x = torch.randn(9, D, requires_grad=True)
    y = m(x) if reentrant is None else torch.utils.checkpoint.checkpoint(m, x, use_reentrant=reentrant)
    y.sum().backward()
    want = m(x, return_routed=True, count=False)[1].counts
    assert torch.equal(m.expert_counts, want)
    with torch.no_grad():
        m(x)
        assert torch.equal(m.expert_counts, want)
        m(x, count=True)
    m.eval()(x)
    assert torch.equal(m.expert_counts, 2 * want) and "expert_counts" not in m.state_dict()
    m.update_gate_bias()
    torch.testing.assert_close(m.gate.e_score_correction_bias, 0.1 * (want.double().mean() - want).sign().float())
    assert not m.expert_counts.any()
    layer().update_gate_bias()  # a rate of 0: nothing happens


def test_the_module_counts_over_a_group_and_replays() -> None:
    x, whole = torch.randn(8, D), layer(score_func="sigmoid", gate_bias_update_factor=0.1)
    each = [copy.deepcopy(whole) for _ in range(2)]  # threads share one generator

    def law() -> Tensor:
        m = each[dist.get_rank()]
        m(x[4 * dist.get_rank() :][:4])
        m.update_gate_bias(dist.group.WORLD)
        return m.gate.e_score_correction_bias.clone()

    y, found = whole(x, return_routed=True)
    torch.testing.assert_close(whole(x, indices=found.routing.indices), y)
    torch.testing.assert_close(whole(x, routing=found.routing), y)
    whole.expert_counts.copy_(found.counts)
    whole.update_gate_bias()
    assert all(torch.equal(bias, whole.gate.e_score_correction_bias) for bias in threads.run(law, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_in_forward_mode_what_is_attached_passes_the_tangent_on() -> None:
    """Of the value, which is y; and over a gradient, in which the loss has its share: so of a Hessian, by its rows."""
    asked = layer(aux_loss_coeff=0.3).double().requires_grad_(False)
    plain = layer().double().requires_grad_(False)
    x = torch.randn(3, D, dtype=torch.float64)
    y, tangent = torch.func.jvp(asked, (x,), (2 * x,))
    torch.testing.assert_close((y, tangent), torch.func.jvp(plain, (x,), (2 * x,)))

    def whole(x: Tensor) -> Tensor:
        y, found = plain(x, return_routed=True)
        return y.square().sum() + 0.3 * load_balancing(found, plain.config)

    task = lambda x: asked(x).square().sum()
    gradient, along = torch.func.jvp(torch.func.grad(task), (x,), (x,))
    hessian = torch.func.hessian(whole)(x)
    torch.testing.assert_close(gradient, torch.func.grad(whole)(x))
    torch.testing.assert_close(along, torch.einsum("abcd,cd->ab", hessian, x))
    torch.testing.assert_close(torch.func.hessian(task)(x), hessian)
    loss = torch.tensor(2.0)
    y, tangent = torch.func.jvp(lambda loss: attach(x, loss), (loss,), (loss,))
    assert torch.equal(y, x) and not tangent.any()
