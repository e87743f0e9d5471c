"""Every table of every system: there and back bit for bit, the laws, any system to any other, and what has no place."""

import re
from itertools import permutations

import pytest
import torch
from systems_zoo import CHOICES, MODELS, cases, knows, model

import fmoe
from fmoe import AdapterError, TensorSpec
from fmoe.families import family
from fmoe.families.complete import gaps
from fmoe.systems import SYSTEMS
from fmoe.testing import assert_laws

CASES = cases()
ids = lambda case: " ".join(map(str, case)) if isinstance(case, tuple) else str(case)


def adapter(system, name, choice=None):
    config, tensors = model(name)
    return fmoe.adapter(name.split()[0], config, system=system, **(choice or {})).resolve(tensors), tensors


@pytest.mark.parametrize("system,name,choice", CASES, ids=lambda x: str(x))
def test_there_and_back(system, name, choice):
    made, hf = adapter(system, name, choice)
    there = made.from_hf(hf)
    back = made.to_hf(there)
    assert back.keys() == hf.keys()
    for key, tensor in hf.items():
        if made.lossless:
            assert torch.equal(back[key], tensor), key
        else:  # norms and A_log, whose values change: stated bounds, in units of what was stored
            assert torch.allclose(back[key].float(), tensor.float(), rtol=3e-7, atol=3e-7), key
    again = made.from_hf(back)
    assert again.keys() == there.keys() and all(torch.equal(again[k], there[k]) for k in there)
    for other in known_as(there, name, SYSTEMS[system].container):
        assert other == system or adapter(other, name)[0].from_hf(hf).keys() == there.keys()


@pytest.mark.parametrize("system,name,choice", CASES, ids=lambda x: str(x))
def test_what_comes_back_near_and_not_equal_is_told_both_ways(system, name, choice):
    made, hf = adapter(system, name, choice)
    hf = {n: (t * 0.02).bfloat16() if t.is_floating_point() else t for n, t in hf.items()}
    there, plan = made.from_hf(hf), made.plan(hf)
    back = made.to_hf(there)
    near = [n for n, t in hf.items() if not torch.equal(back[n], t)]
    for notes in (plan.notes, made.inverse.plan(there).notes):
        assert bool(notes) >= bool(near) and not (notes and made.lossless)
        assert all("not bit for bit" in note for note in notes)
    told = " ".join(plan.notes)
    near = [sources for sources, _ in plan.units() if not {*near}.isdisjoint(sources)]  # as they lie there
    assert len(near) <= len(re.findall(r"'[^']+'", told)) + sum(map(int, re.findall(r"(\d+) more", told)))


def known_as(names, name, container):
    """The systems that a directory with these names may be of: those with the very same names, or its own alone."""
    fits = [s.name for s in SYSTEMS.values() if s.marks(names, name.split()[0])]
    fits = [s for s in fits if (SYSTEMS[s].container == "dcp") == (container == "dcp")]
    assert len(fits) <= 1
    return fits


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s != "automodel"])
def test_laws_of_adapters_hold(system):
    name, choice = next((m, c) for s, m, c in CASES if s == system)
    made, hf = adapter(system, name, choice)
    assert_laws(made, {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in hf.items()})


THREE = ["qwen3_moe alike", "deepseek_v3", "gpt_oss"]


@pytest.mark.parametrize("name", THREE)
def test_any_system_to_any_other(name):
    known = [(s, c) for s in SYSTEMS for c in CHOICES.get(s, [{}]) if knows(s, name, c)]
    _, hf = adapter(*(known[0][0], name))
    made = {i: adapter(s, name, c)[0] for i, (s, c) in enumerate(known)}
    theirs = {i: a.from_hf(hf) for i, a in made.items()}
    for i, j in permutations(made, 2):
        bridge = made[i].inverse >> made[j]
        found = bridge.from_hf(theirs[i])
        assert found.keys() == theirs[j].keys(), (known[i], known[j])
        assert all(torch.equal(found[k], theirs[j][k]) for k in found), (known[i], known[j])


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_tensor_is_claimed_by_a_rule(system):
    name, choice = next((m, c) for s, m, c in CASES if s == system)
    made, hf = adapter(system, name, choice)
    with pytest.raises(AdapterError, match="model.layers.0.something"):
        made.from_hf({**hf, "model.layers.0.something": torch.zeros(1)})
    lost = next(
        n for n in hf if re.search(r"experts\.\d+\.(up_proj|w3)\.weight$", n) or n.endswith("experts.down_proj")
    )
    if ".experts." in lost and re.search(r"experts\.\d", lost):
        with pytest.raises(AdapterError, match=re.escape(lost)):
            made.from_hf({n: t for n, t in hf.items() if n != lost})


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_that_a_model_of_another_system_has_lost_is_named(name):
    """Natively, which every system's directory is looked at as: what a system joins, its plan misses."""
    config, hf = model(name)
    kind = family(config["model_type"])
    names = list(kind.adapter(config).from_hf({n: TensorSpec(tuple(t.shape), t.dtype) for n, t in hf.items()}))
    assert not gaps(kind, config, names).problems
    unnamed = [lost for lost in names if not names_it(gaps(kind, config, [n for n in names if n != lost]), lost)]
    assert not unnamed


def names_it(found, lost):
    return any(lost in problem.keys for problem in found.problems)


ROUTER = re.compile(r"model\.layers\.\d+\.\w+\.(gate|router)\.weight")


@pytest.mark.parametrize("system", [s for s in SYSTEMS if not SYSTEMS[s].native])
def test_a_shape_that_the_config_rules_out_is_refused_by_name_both_ways(system):
    name, choice = next((m, c) for s, m, c in CASES if s == system)
    made, hf = adapter(system, name, choice)
    specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in hf.items()}
    theirs = made.plan(specs).targets
    longer = lambda spec: TensorSpec((spec.shape[0] + 1, *spec.shape[1:]), spec.dtype)
    for lost in ("model.norm.weight", next(filter(ROUTER.fullmatch, specs))):
        with pytest.raises(AdapterError, match=rf"{re.escape(lost)}' is .*, expected .* by the config"):
            made.plan({**specs, lost: longer(specs[lost])})
    (norm,) = next(targets for sources, targets in made.plan(specs).units() if "model.norm.weight" in sources)
    told = "" if norm == "model.norm.weight" else f"; from {norm!r}"
    with pytest.raises(AdapterError, match=rf"'model.norm.weight' is .* by the config{re.escape(told)}"):
        made.inverse.plan({**theirs, norm: longer(theirs[norm])})


@pytest.mark.parametrize("system", [s for s, m, c in CASES if m == "deepseek_v3" and not c])
def test_what_has_no_place_is_refused_by_name_unless_lossy(system):
    if SYSTEMS[system].native:
        return
    config, hf = model("deepseek_v3")
    n = config["num_hidden_layers"]
    extra = {
        f"model.layers.{n}.embed_tokens.weight": torch.zeros(4, 3),
        f"model.layers.{n}.shared_head.head.weight": torch.zeros(4, 3),
    }
    config = config | {"num_nextn_predict_layers": 1}
    with pytest.raises(AdapterError, match=rf"layers\.{n}\.embed_tokens\.weight.*lossy=True"):
        fmoe.adapter("deepseek_v3", config, system=system).from_hf(hf | extra)
    lossy = fmoe.adapter("deepseek_v3", config, system=system, lossy=True)
    assert not lossy.lossless
    plain = fmoe.adapter("deepseek_v3", config, system=system).from_hf(hf)
    assert lossy.from_hf(hf | extra).keys() == plain.keys()


def test_what_a_system_does_not_know_is_an_error_that_says_so():
    with pytest.raises(AdapterError, match="expected one of native, torchtitan"):
        fmoe.adapter("qwen3_moe", {}, system="megatrom")
    with pytest.raises(AdapterError, match="'deepseek' does not know 'qwen3_moe'"):
        fmoe.adapter("qwen3_moe", {}, system="deepseek")
    with pytest.raises(AdapterError, match="names='0.1', expected '0.3' | '0.2'"):
        fmoe.adapter("qwen3_moe", {}, system="torchtitan", names="0.1")
    with pytest.raises(AdapterError, match="no choice speks"):
        fmoe.adapter("qwen3_moe", model("qwen3_moe")[0], system="megatron", speks="te")
    with pytest.raises(AdapterError, match="num_hidden_layers"):
        fmoe.adapter("qwen3_moe", {"num_attention_heads": 4, "hidden_size": 8}, system="megatron")


@pytest.mark.parametrize("system,name", sorted({(s, m) for s, m, _ in CASES if s != "automodel" and " " not in m}))
def test_a_config_whose_field_is_of_another_kind_is_an_adapter_error_or_none(system, name):
    config, _ = model(name)
    for at, field in enumerate(sorted(config.keys() - {"model_type"}), list(SYSTEMS).index(system)):
        try:
            fmoe.adapter(name, config | {field: ([1], "x", 0)[at % 3]}, system=system)
        except AdapterError as error:
            assert str(error)


@pytest.mark.parametrize("form", ["stacked", "numbered", "singleton"])
@pytest.mark.parametrize("specs", ["te", "local"])
def test_the_form_of_a_torch_dist_directory_is_settled_by_its_keys(form, specs):
    config, hf = model("qwen3_moe alike")
    label = form + ("" if specs == "te" else "_local")
    written = fmoe.adapter("qwen3_moe", config, system="megatron_dist").choose(form=label)
    there = written.from_hf(hf)
    found = fmoe.adapter("qwen3_moe", config, system="megatron_dist")
    assert all(torch.equal(t, hf[n]) for n, t in found.to_hf(there).items())
    assert found.inverse.resolve(there).inverse.from_hf(hf).keys() == there.keys()


def test_fused_experts_are_read_and_given_back():
    config, hf = model("qwen3_moe alike")
    fused = fmoe.adapter("qwen3_moe", config, layout="fused").to_hf(fmoe.adapter("qwen3_moe", config).from_hf(hf))
    made = fmoe.adapter("qwen3_moe", config, system="torchtitan")
    there = made.from_hf(fused)
    assert all(torch.equal(t, there[n]) for n, t in made.from_hf(hf).items())
    assert made.resolve(fused).to_hf(there).keys() == fused.keys()


def test_a_ragged_tensor_is_taken_apart_while_another_capture_is_stacked():
    rule = fmoe.rule("{r}:a [(h q|k|v) d]", "b.{p=q|k|v} [(r h p) d]", h=2, q=4, k=1, v=1)
    assert_laws(rule, {f"{r}:a": TensorSpec((12, 3), torch.float32) for r in range(2)})


@pytest.mark.parametrize("system,name,choice", cases(), ids=str)
def test_of_a_range_of_experts_the_router_stays_whole(system, name, choice):
    """As from Hugging Face: a rank has some experts, and sends tokens to all of them."""
    config, hf = model(name)
    specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in hf.items()}
    native = fmoe.adapter(config["model_type"], config).resolve(specs)
    made = fmoe.adapter(config["model_type"], config, system=system, **choice).resolve(specs)
    back = (made.inverse >> native).resolve(made.plan(specs).targets)
    part = back.plan(made.plan(specs).targets, e=range(1, 3)).targets
    want = native.plan(specs, e=range(1, 3)).targets
    assert {n: want[n] for n in part if n in want} == part
    numbered = re.compile(r"experts\.(\d|\w+\.weight\d)")
    if any(map(numbered.search, made.plan(specs).targets)) and any(map(numbered.search, specs)):
        with pytest.raises(AdapterError, match="e=range.*: expected|a range of e is asked for"):  # names alone, no axis
            made.from_hf(specs, e=range(1, 3))
        return
    there = made.to_hf(made.from_hf(specs, e=range(1, 3)), e=range(1, 3))
    assert there == native.to_hf(native.from_hf(specs, e=range(1, 3)), e=range(1, 3))
