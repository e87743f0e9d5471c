"""A wrong checkpoint never converts: every family x every mutation on a complete one; the error names the key."""

from collections.abc import Callable
from types import MappingProxyType

import hf
import hf_synthetic as synthetic
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import CHOICES
from wrong_checkpoints import Tensors, drop, duplicate, orphan_scale, renumber, retype, stray, suffix, transpose

import fmoe
from fmoe.testing import checkpoints

WEIGHTS = ("gate_and_up_projs", "down_projs")


def written(name: str) -> Callable[[object], tuple[fmoe.Adapter, Tensors]]:
    def make(folder) -> tuple[fmoe.Adapter, Tensors]:
        hf.write(name, folder)
        return fmoe.adapter(folder), {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}

    return make


def published(name: str) -> Callable[[object], tuple[fmoe.Adapter, Tensors]]:
    def make(folder) -> tuple[fmoe.Adapter, Tensors]:
        config, tensors = synthetic.CHECKPOINTS[name]()
        return fmoe.adapter(config["model_type"], config), tensors

    return make


SOURCES = {name: written(name) for name in hf.MODELS} | {
    f"{name}, published": published(name) for name in synthetic.CHECKPOINTS
}

# one expert tensor of each source: of expert 1 where experts stand alone
EXPERT = (".experts.1.gate_proj.weight", ".experts.1.w1.weight", ".experts.1.up_proj.weight", ".experts.gate_up_proj")
EXPERT += (".moe.gate_proj.weight",)


def an_expert(tensors: Tensors) -> str:
    return next(name for end in EXPERT for name in tensors if name.endswith(end))


def rename(tensors: Tensors, key: str) -> list[str]:
    stray = key.replace("gate_", "gote_").replace("w1", "w7").replace("up_proj", "op_proj")
    tensors[stray] = tensors.pop(key)
    return [stray]


MUTATIONS = (drop, rename, transpose, retype, suffix, orphan_scale, renumber, stray, duplicate)
# an aggregated tensor is its own stack: in another dtype, or alone, it is a right tensor of another checkpoint
WHOLE_STACK = {retype}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[fmoe.Adapter, Tensors]]:
    return {name: make(tmp_path_factory.mktemp("source")) for name, make in SOURCES.items()}


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", SOURCES)
def test_a_wrong_checkpoint_never_converts(name, mutate, sources):
    adapter, tensors = sources[name]
    key = an_expert(tensors)
    wrong = dict(tensors)
    named = mutate(wrong, key)
    if mutate in WHOLE_STACK and ".experts.gate_up_proj" in key:
        assert adapter.from_hf(wrong)[key.replace("gate_up_proj", "gate_and_up_projs")].dtype == wrong[key].dtype
        return
    before = {n: t.clone() for n, t in wrong.items()}
    with pytest.raises(fmoe.AdapterError) as error:
        adapter.from_hf(MappingProxyType(wrong))
    assert set(named) <= set(error.value.keys), (named, str(error.value))
    assert all(n in str(error.value) for n in named)
    with pytest.raises(fmoe.AdapterError):
        adapter.plan(wrong)
    assert all(torch.equal(t.float(), before[n].float()) for n, t in wrong.items())


SIZES = dict(n_routed_experts=3, moe_inter_dim=4, dim=5, n_activated_experts=1)  # no expert matrix is square


@pytest.mark.parametrize("model_type", fmoe.families.FAMILIES)
@settings(max_examples=3)
@given(data=st.data())
def test_every_mutation_of_every_family_is_an_error_that_names_the_key(model_type, data):
    kind = fmoe.families.FAMILIES[model_type]
    config = {kind.fields[f].split()[0]: n for f, n in SIZES.items()}
    adapter = kind.adapter(config, **CHOICES.get(model_type, {}))
    specs = data.draw(checkpoints(adapter))
    adapter = adapter.resolve(specs)
    stacks = {t: sources for sources, made in adapter.plan(specs).units() for t in made if t.endswith(WEIGHTS)}
    assume(stacks)
    target = data.draw(st.sampled_from(sorted(stacks)))
    key = data.draw(st.sampled_from(sorted(stacks[target])))
    shape = specs[key].shape
    turned = specs[key]._replace(shape=shape[:-2] + shape[:-3:-1])
    wrong = {
        "drop": {n: s for n, s in specs.items() if n != key},
        "rename": {n + "x" * (n == key): s for n, s in specs.items()},
        "duplicate": specs | {key + "_again": specs[key]},
        "duplicate native": specs | {target: specs[key]} if target != key else {},
        "transpose": specs | {key: turned} if turned.shape != shape else {},
        "retype": specs | {key: specs[key]._replace(dtype=torch.float8_e5m2)} if len(stacks[target]) > 1 else {},
    }
    for name, mutant in wrong.items():
        if mutant:
            with pytest.raises(fmoe.AdapterError) as error:
                adapter.plan(mutant)
            named = {key, key + "x", key + "_again", target} & set(error.value.keys)
            assert named and all(n in str(error.value) for n in named), (name, key, error.value.keys)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int8, torch.complex64], ids=str)
@pytest.mark.parametrize("model_type", fmoe.families.FAMILIES)
def test_a_weight_that_is_no_float_and_has_no_scale_is_refused_both_ways(model_type, dtype):
    kind = fmoe.families.FAMILIES[model_type]
    config = {kind.fields[f].split()[0]: n for f, n in SIZES.items()}
    good = {n: fmoe.TensorSpec((4, 4), torch.float32) for n in ("model.layers.0.fc1.weight", "model.fc.bias")}
    adapter = kind.adapter(config, **CHOICES.get(model_type, {})).resolve(good)
    plan = adapter.plan(good)
    for (key,), (native,) in plan.units():
        for way, specs, name in ((adapter, good, key), (adapter.inverse, plan.targets, native)):
            with pytest.raises(fmoe.AdapterError) as error:
                way.plan(specs | {name: specs[name]._replace(dtype=dtype)})
            assert error.value.keys[:1] == (name,) and str(dtype).removeprefix("torch.") in str(error.value)
