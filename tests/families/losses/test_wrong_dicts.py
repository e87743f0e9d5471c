"""Whatever is wrong with one expert tensor of a dict, the error names it, what was expected, and what to do."""

import re

import hf
import hf_zoo as zoo
import known_names
import pytest
import torch

import fmoe
from fmoe import TensorSpec
from fmoe.families import FAMILIES
from fmoe.systems import SYSTEMS
from fmoe.types import EXPERT_TENSORS

ROWS = [(name, original) for name in (*hf.MODELS, *zoo.MODELS) for original in (True, False)]
ROWS.remove(("longcat_flash", False))  # is refused as it is: `test_zero_experts_of_a_live_dict_are_told`
WRONG = {
    "missing": lambda spec: None,
    "transposed": lambda spec: TensorSpec((*spec.shape[:-2], spec.shape[-1], spec.shape[-2]), spec.dtype),
    "float64": lambda spec: TensorSpec(spec.shape, torch.float64),
    "complex64": lambda spec: TensorSpec(spec.shape, torch.complex64),
    "bool": lambda spec: TensorSpec(spec.shape, torch.bool),
}


def made(name, original):
    cls, config = known_names.base(name)
    config.architectures = [cls.__name__]
    said, specs = known_names.in_files(cls, config, name, original)
    return fmoe.adapter(said["model_type"], said), dict(specs)


@pytest.mark.parametrize(("name", "original"), ROWS)
def test_an_expert_tensor_that_is_wrong_is_named_with_what_was_expected(name, original):
    adapter, specs = made(name, original)
    units = [s for s, targets in adapter.plan(specs).units() if targets[0].rpartition(".")[2] in EXPERT_TENSORS[:2]]
    several = len(units[0]) > 1
    one = units[0][0]
    for what, change in WRONG.items():
        spec = change(specs[one])
        if spec == specs[one] or what == "float64" and not several:
            continue
        given = {n: s for n, s in specs.items() if n != one} | ({one: spec} if spec else {})
        with pytest.raises(fmoe.AdapterError) as error:
            adapter.from_hf(given)
        texts = [p.text for p in error.value.found if one in p.keys]
        assert any(repr(one) in t and re.search("expected|must stand beside|; of ", t) for t in texts), (what, texts)
        assert what in ("complex64", "bool") or any("Fix: " in t for t in texts), (what, texts)


@pytest.mark.parametrize("zeros", [0, 4])
def test_zero_experts_of_a_live_dict_are_told(zeros):
    cls, config = known_names.base("longcat_flash")
    config.zero_expert_num = zeros
    with torch.device("meta"):
        live = cls(config).state_dict()
    adapter = fmoe.adapter("longcat_flash", config)
    if not zeros:
        assert adapter.from_hf(live)
        return
    with pytest.raises(fmoe.AdapterError, match=r"8 experts and 4 zero experts in one tensor.* Fix: .*") as error:
        adapter.from_hf(live)
    assert "model.layers.0.mlp.experts.gate_up_proj" in error.value.keys


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_of_no_experts_has_an_adapter_and_every_system_takes_it_or_says_why(model_type):
    field = FAMILIES[model_type].fields["n_routed_experts"].split()[0]
    config = {"model_type": model_type, field: 0, "hidden_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32, "intermediate_size": 16}
    assert fmoe.adapter(model_type, config)
    for name, system in SYSTEMS.items():
        if system.native:
            assert fmoe.adapter(model_type, config, system=name)
            continue
        with pytest.raises(fmoe.AdapterError, match=rf"{field} 0 has no experts, and {name}.* Fix: "):
            fmoe.adapter(model_type, config, system=name)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v41", "phimoe"])
@pytest.mark.parametrize("field", ["n_routed_experts", "dim"])
def test_a_size_below_0_is_refused_as_the_configs(model_type, field):
    names = {f: FAMILIES[model_type].fields[f].split()[0] for f in ("n_routed_experts", "n_activated_experts", "dim")}
    config = {"model_type": model_type} | dict.fromkeys(names.values(), 4) | {names[field]: -1}
    with pytest.raises(fmoe.AdapterError, match="config.* is -1, expected"):
        fmoe.adapter(model_type, config)
