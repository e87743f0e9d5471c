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
from tiny import CHOICES, FAMILIES, OTHERS
from torch import Tensor

import fmoe
from fmoe.testing import checkpoints

WEIGHTS = ("gate_and_up_projs", "down_projs")
Tensors = dict[str, Tensor]


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


def drop(tensors: Tensors, key: str) -> list[str]:
    del tensors[key]
    return [key]


def rename(tensors: Tensors, key: str) -> list[str]:
    stray = key.replace("gate_", "gote_").replace("w1", "w7").replace("up_proj", "op_proj")
    tensors[stray] = tensors.pop(key)
    return [stray]


def transpose(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = tensors[key].mT.clone()
    return [key]


def retype(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = tensors[key].to(torch.float16 if tensors[key].dtype != torch.float16 else torch.float32)
    return [key]


def suffix(tensors: Tensors, key: str) -> list[str]:
    tensors[key + "_again"] = tensors[key]
    return [key + "_again"]


def orphan_scale(tensors: Tensors, key: str) -> list[str]:
    stray = key.replace("weight", "weight_scale_inv") if "weight" in key else key + "_scale_inv"
    if stray in tensors:
        del tensors[key]
        return [stray]
    tensors[stray] = torch.ones(1, 1)
    return [stray]


def renumber(tensors: Tensors, key: str) -> list[str]:
    """Experts counted from 1; aggregated ones lose one."""
    if ".experts.1." not in key:
        tensors[key] = tensors[key][1:]
        return [key]
    head = key.split(".experts.")[0] + ".experts."
    mine = sorted((n for n in tensors if n.startswith(head)), key=lambda n: -int(n[len(head) :].split(".")[0]))
    for name in mine:
        number, tail = name[len(head) :].split(".", 1)
        tensors[f"{head}{int(number) + 1}.{tail}"] = tensors.pop(name)
    return [key.replace(".experts.1.", ".experts.0.")]


def stray(tensors: Tensors, key: str) -> list[str]:
    """The tensor stands at another expert's number, or another layer's."""
    if ".experts.1." not in key:
        other = key.replace("gate_up_proj", "gate_up_proj.weight").replace("moe.gate_proj", "moe.experts.gate_proj")
        tensors[other] = tensors.pop(key)
        return [other]
    other = key.replace(".experts.1.", ".experts.99.")
    tensors[other] = tensors.pop(key)
    return [key, other]


def duplicate(tensors: Tensors, key: str) -> list[str]:
    """The layer's native tensor stands there as well."""
    head = (
        key.split(".experts.")[0] + ".experts." if ".experts." in key else key.rpartition("gate_proj")[0] + "experts."
    )
    tensors[head + "gate_and_up_projs"] = torch.zeros(1)
    return [head + "gate_and_up_projs"]


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


ROWS = [  # of all those that share their rules, the others are marked slow
    pytest.param(name, marks=() if name in {*FAMILIES, *OTHERS} else pytest.mark.slow)
    for name in fmoe.families.FAMILIES
]


@pytest.mark.parametrize("model_type", ROWS)
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


@pytest.mark.parametrize("model_type", ["per_expert", "per_expert_non_gated", "qwen3_moe"])
def test_without_a_config_the_tensors_themselves_must_agree(model_type):
    gates = () if "non_gated" in model_type else ("gate",)
    good = {
        f"layers.{l}.mlp.experts.{e}.{p}_proj.weight": torch.randn(*((4, 3) if p == "down" else (3, 4)))
        for l in range(2)
        for e in range(3)
        for p in (*gates, "up", "down")
    }
    adapter = fmoe.adapter(model_type)
    assert adapter.from_hf(good)["layers.0.mlp.experts.down_projs"].shape == (3, 3, 4)
    for mutate in (drop, transpose, retype, suffix, orphan_scale, renumber, stray, duplicate):
        for key in (
            f"layers.1.mlp.experts.1.{gates[0] if gates else 'up'}_proj.weight",
            "layers.1.mlp.experts.1.down_proj.weight",
        ):
            wrong = dict(good)
            named = mutate(wrong, key)
            with pytest.raises(fmoe.AdapterError) as error:
                adapter.from_hf(wrong)
            assert set(named) <= set(error.value.keys), (mutate, named, str(error.value))


def test_all_problems_are_told_at_once():
    config, tensors = synthetic.deepseek_v3()
    wrong = dict(tensors)
    expected = []
    for layer, mutate in ((1, drop), (2, transpose), (3, suffix)):
        expected += mutate(wrong, f"model.layers.{layer}.mlp.experts.1.gate_proj.weight")
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.adapter("deepseek_v3", config).from_hf(wrong)
    assert isinstance(error.value, ValueError) and len(error.value.problems) == 3
    assert set(expected) <= set(error.value.keys)


@pytest.mark.parametrize("also", ["gate_proj.weight_scale_inv", "gate_proj.bias"])
def test_step3p5_names_are_anchored_at_their_end(also):
    """The seed took `moe.gate_proj.weight_scale_inv` for the weight (reference-behaviour 12, 36)."""
    config, tensors = synthetic.step3p5()
    name = f"model.layers.2.moe.{also}"
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.adapter("step3p5", config).from_hf(tensors | {name: torch.ones(8)})
    assert name in error.value.keys


def test_a_lone_half_and_two_heads_are_refused():
    config, tensors = synthetic.step3p5()
    lone = {n: t for n, t in tensors.items() if n != "model.layers.2.moe.up_proj.weight"}
    with pytest.raises(fmoe.AdapterError, match=r"model\.layers\.2\.moe\.up_proj\.weight"):
        fmoe.adapter("step3p5", config).from_hf(lone)
    config, tensors = synthetic.qwen3_5_moe()
    two = tensors | {"model.lm_head.weight": tensors["lm_head.weight"]}
    with pytest.raises(fmoe.AdapterError, match=r"model\.lm_head\.weight"):
        fmoe.adapter("qwen3_5_moe", config).from_hf(two)


def test_mixed_layouts_are_refused_with_a_key_of_each():
    config, fused = synthetic.qwen3_5_moe()
    key = "model.language_model.layers.0.mlp.experts.0.gate_proj.weight"
    with pytest.raises(fmoe.AdapterError, match="mixed layouts") as error:
        fmoe.adapter("qwen3_5_moe", config).from_hf(fused | {key: torch.zeros(144, 160)})
    assert key in error.value.keys and any("gate_up_proj" in k for k in error.value.keys)
