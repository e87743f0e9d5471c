"""What a module holds that is no number where x is: refused by name when it is set, and when it is loaded."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_nn_surroundings import NORMED, WHOLE, tokens
from torch import nn

import fmoe
from fmoe.nn import GroupedExperts, GroupedExpertsMXFP4, MoE

LATENT = replace(WHOLE, latent_norm="before", gate_bias_update_factor=1e-3, n_shared_experts=2)
CONFIGS = {"whole": WHOLE, "normed": NORMED, "latent": LATENT}
CODES = (torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64)
ROWS = [(c, n) for c in CONFIGS for n, _ in (*MoE(CONFIGS[c]).named_parameters(), *MoE(CONFIGS[c]).named_buffers())]


def holding(config: fmoe.MoEConfig, name: str, what: Any) -> MoE:
    """The module with what(tensor) under a name."""
    module = MoE(config)
    part, _, leaf = name.rpartition(".")
    for held in (module.get_submodule(part)._parameters, module.get_submodule(part)._buffers):
        if held.get(leaf) is not None:
            t = what(held[leaf].detach())  # type: ignore[union-attr]
            held[leaf] = nn.Parameter(t, requires_grad=False) if isinstance(held[leaf], nn.Parameter) else t
    return module


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("config", "name"), ROWS)
def test_on_meta_it_is_refused_by_name(config: str, name: str, trains: bool) -> None:
    module = holding(CONFIGS[config], name, lambda t: t.to("meta")).train(trains)
    with pytest.raises(ValueError, match=name.removeprefix("experts.")) as error:
        module(tokens())
    assert "is on meta" in str(error.value) and "expected cpu" in str(error.value) and "Fix: " in str(error.value)
    assert module.to("meta")(tokens().to("meta")).is_meta


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize(("config", "name"), ROWS)
def test_codes_are_refused_by_name_where_they_are_set_and_where_they_are_loaded(
    config: str, name: str, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=f"'{name.removeprefix('experts.')}' is {dtype}, expected"):
        holding(CONFIGS[config], name, lambda t: torch.ones_like(t).to(dtype))(tokens())
    for module, prefix in ((MoE(CONFIGS[config]), ""), (nn.Sequential(MoE(CONFIGS[config])), "0.")):
        state = module.state_dict()
        before = {n: t.clone() for n, t in state.items()}
        for assign in (False, True):
            with pytest.raises(ValueError, match=f"load_state_dict: '{prefix + name}' is {dtype}, expected"):
                state_of = state | {prefix + name: torch.ones_like(state[prefix + name]).to(dtype)}
                module.load_state_dict(state_of, strict=False, assign=assign)
        assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


@pytest.mark.parametrize("name", ["gate.bias", "gate.e_score_correction_bias", "gate.tid2eid", "fc1_latent_proj.bias"])
def test_what_no_config_promises_is_looked_at_before_it_is_made(name: str) -> None:
    module = MoE(replace(CONFIG, moe_latent_size=5))
    wrong = torch.ones(4, 2) if name.endswith("tid2eid") else torch.ones(5, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"load_state_dict: '{name}' is {wrong.dtype}, expected"):
        module.load_state_dict(module.state_dict() | {name: wrong})
    assert name not in module.state_dict()


CONFIG = fmoe.MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=32, moe_inter_dim=32, dtype="bfloat16")


@pytest.mark.parametrize("made", [GroupedExperts, MoE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_floats_of_another_width_are_loaded_as_torch_does(made: Any, dtype: torch.dtype) -> None:
    module, other = made(CONFIG), made(CONFIG)
    state = {n: t.to(dtype) for n, t in module.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(t, state[n].bfloat16()) for n, t in other.state_dict().items())
    with pytest.raises(ValueError, match=r"GroupedExperts.load_state_dict: 'down_projs' is torch.int8, expected"):
        GroupedExperts(CONFIG).load_state_dict({"down_projs": torch.ones(4, 32, 32).to(torch.int8)}, strict=False)


def test_codes_are_loaded_as_the_bytes_that_they_are() -> None:
    """A scale of 127, as a byte, is 2^0: cast to e8m0 it would be 2^7."""
    module, other = GroupedExpertsMXFP4(CONFIG), GroupedExpertsMXFP4(CONFIG)
    state = module.state_dict()
    other.load_state_dict({n: t.view(torch.uint8) for n, t in state.items()})
    bits = lambda t: t.view(torch.uint8)
    assert all(torch.equal(bits(t), bits(other.state_dict()[n])) for n, t in state.items())
    for name, t in state.items():
        with pytest.raises(ValueError, match=f"load_state_dict: '{name}' is torch.bfloat16, expected torch"):
            other.load_state_dict(state | {name: t.view(torch.uint8).bfloat16()})


def test_a_quantised_class_that_answers_for_its_numbers_is_called() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    config = replace(CONFIG, n_shared_experts=1, shared_expert_gate=True)
    module, x = MoE(config), torch.randn(5, 32).bfloat16()
    nn.init.normal_(module.shared_experts.down_proj.weight)
    right = copy.deepcopy(module)(x)
    with torch.no_grad():
        torchao.quantize_(module.shared_experts, torchao.Int8WeightOnlyConfig())
        assert type(module.shared_experts.down_proj.weight) is not nn.Parameter
        assert float((module(x) - right).norm()) < 0.05 * float(right.norm())
