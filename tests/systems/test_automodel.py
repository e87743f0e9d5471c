"""Automodel's own names: what its loader looks up, of ten families, and back; by hand and through the integration."""

import hf_zoo as zoo
import pytest
import torch
from automodel_names import GATED, ROWS, W123, D, E, I, drawn
from directories import load
from torch import cat, stack

import fmoe
from fmoe.families.known import known
from fmoe.integrations import automodel
from fmoe.layout.names import Names
from fmoe.systems.wording.known_names import KnownNames
from fmoe.testing import same


def row(config, hf, names, at):
    words = names.split()
    renamed = dict(zip(words[::2], words[1::2], strict=True))
    gates = {n: drawn(E, D) for n in renamed if n.endswith("mlp.gate.weight")}
    return config, hf | {n: drawn(I) for n in renamed} | gates, renamed, at


FAMILIES = {kind: row(*parts) for kind, parts in ROWS.items()}


def adapter(name):
    kind, config = name.split()[0], FAMILIES[name][0]
    return fmoe.adapter(kind, {"model_type": kind} | config, system="automodel")


def halves(hf):
    """gate and up [E, I, D] and down [E, D, I], whatever the family's layout."""
    of = lambda *ends: [
        t for n, t in hf.items() if n.endswith(ends) and (".experts." in n or ".moe." in n) and t.ndim > 1
    ]
    if both := of("gate_up_proj", "w13_weight"):
        return *both[0].split(I, 1), of("experts.down_proj", "w2_weight")[0]
    if (gate := of(".gate_proj.weight"))[:1] and gate[0].ndim == 3:
        return gate[0], of(".up_proj.weight")[0], of(".down_proj.weight")[0]
    one = lambda w: stack([t for n, t in hf.items() if n.endswith(f"{w}.weight") and "experts." in n and t.ndim == 2])
    words = W123 if any(".w1." in n for n in hf) else [f".{g}_proj" for g in GATED]
    return tuple(map(one, words))


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_numbers_are_those_of_its_loader_and_come_back(name):
    _, hf, renamed, at = FAMILIES[name]
    made = adapter(name)
    there = made.from_hf(hf)
    assert all(torch.equal(there[b], hf[a]) for a, b in renamed.items())
    gate, up, down = halves(hf)
    up_gate = cat([gate, up], 1).mT
    if name == "inkling_mm_model":  # rows in turn, as on disk
        up_gate = hf["model.llm.layers.1.mlp.experts.w13_weight"].mT
    if name == "gemma4":
        down = down * hf["model.language_model.layers.1.router.per_expert_scale"][:, None, None]
    assert torch.equal(there[at + "gate_and_up_projs"], up_gate) and torch.equal(there[at + "down_projs"], down.mT)
    more = {at + "gate_and_up_projs", at + "down_projs"}
    if name == "bailing_moe_v2":
        for kind in ("weight", "bias"):
            rows = hf[f"model.layers.0.attention.query_key_value.{kind}"].split([6, 3, 3])
            for p, part in zip("qkv", rows, strict=True):
                more.add(f"model.layers.0.self_attn.{p}_proj.{kind}")
                assert torch.equal(there[f"model.layers.0.self_attn.{p}_proj.{kind}"], part)
    if name == "mistral4":
        bias = there["model.layers.1.mlp.gate.e_score_correction_bias"]
        more.add("model.layers.1.mlp.gate.e_score_correction_bias")
        assert bias.dtype == torch.float32 and bias.shape == (E,) and not bias.any()
    assert there.keys() == {*renamed.values(), *more}
    back = made.to_hf(there)
    assert back.keys() == hf.keys()
    if name != "gemma4":
        assert made.lossless and all(torch.equal(t, back[n]) for n, t in hf.items())
        return
    assert not made.lossless and (back["model.language_model.layers.1.router.per_expert_scale"] == 1).all()
    again = made.from_hf(back)
    assert all(torch.equal(t, there[n]) for n, t in again.items())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("part", [range(1, 2), range(E - 2, E)], ids=str)
def test_a_range_of_experts_is_that_part_of_every_stack_and_the_rest_as_it_is(name, part):
    made, hf = adapter(name), FAMILIES[name][1]
    whole, cut = made.from_hf(hf), made.from_hf(hf, e=part)
    assert cut.keys() == whole.keys()
    for n, t in whole.items():
        stacked = n.endswith(("gate_and_up_projs", "down_projs"))
        assert torch.equal(cut[n], t[part.start : part.stop] if stacked else t), n


def test_what_is_folded_into_experts_is_verified(tmp_path):
    fmoe.convert(zoo.saved("gemma4_text")[1], tmp_path / "there", "automodel", fsync=False)
    assert fmoe.verify(tmp_path / "there").tensors == 44


@pytest.mark.parametrize("name", FAMILIES)
def test_the_integration_gives_its_loader_these_names_and_takes_them_in_place_or_converted(name):
    kind, (config, hf, *_) = name.split()[0], FAMILIES[name]
    made = automodel.StateDictAdapter({"model_type": kind} | config, dtype=None)
    want = adapter(name).from_hf(hf)
    model = {n: torch.zeros_like(t) for n, t in want.items()}  # what a model holds before it is loaded
    lent = made.to_hf(model)
    assert lent.keys() == hf.keys()
    for n, t in lent.items():  # the loader reads files into them
        t.copy_(hf[n])
    rest = made.from_hf(lent)
    assert rest.keys() | made.view_loaded_native_keys == want.keys()
    assert all(torch.equal(rest.get(n, model[n]), t) for n, t in want.items())


def test_what_is_not_zero_has_no_place_in_mistral4_on_disk():
    there = adapter("mistral4").from_hf(FAMILIES["mistral4"][1])
    there["model.layers.1.mlp.gate.e_score_correction_bias"][1] = 1
    with pytest.raises(fmoe.AdapterError, match="e_score_correction_bias.*not zero.*lossy=True"):
        adapter("mistral4").to_hf(there)


def test_the_talker_of_qwen3_omni_is_refused_unless_lossy():
    hf = FAMILIES["qwen3_omni_moe"][1] | {"talker.x": drawn(1), "code2wav.y": drawn(1)}
    with pytest.raises(fmoe.AdapterError, match="'talker.x'|talker"):
        adapter("qwen3_omni_moe").from_hf(hf)
    config = {"model_type": "qwen3_omni_moe"} | FAMILIES["qwen3_omni_moe"][0]
    lossy = fmoe.adapter("qwen3_omni_moe", config, system="automodel", lossy=True)
    assert "talker.x" not in lossy.from_hf(hf)


@pytest.mark.parametrize("model_type", known())
def test_a_name_that_the_class_has_not_is_refused_and_all_of_its_own_pass(model_type):
    entry, spec = known()[model_type], fmoe.TensorSpec((1,), torch.float32)
    config = dict(model_type=model_type, num_hidden_layers=2) if model_type == "step3p7" else None
    (stage,) = (s for s in fmoe.adapter(model_type, config, system="automodel").stages if isinstance(s, KnownNames))
    for form in entry["forms"]:
        names = {*form["root"]} | {f"{form['stem']}layers.1.{n}" for n in form["others"]}
        names |= {f"{at}.1.{n}" for at, groups in form["stacks"].items() for sets in groups for s in sets for n in s}
        names |= {n + "_scale_inv" for n in names} | {"mtp.fc.weight", "model.layers.9.enorm.weight"}
        specs = dict.fromkeys(names, spec)
        assert stage.plan(specs, Names(specs), {}, frozenset()).targets == specs
        for odd in ("something", f"{form['stem']}layers.1.something.weight"):
            if any(rule.source.name.startswith(odd.partition(".")[0] + ".{p=") for rule in stage.after):
                continue  # of all that stands below there the next rules speak
            more = {**specs, odd: spec}
            with pytest.raises(fmoe.AdapterError, match=f"{odd}'.*{entry['class']}"):
                stage.plan(more, Names(more), {}, frozenset())


@pytest.mark.parametrize("name", ["deepseek_v4", "mistral4", "qwen3_vl_moe"])
def test_the_forms_that_transformers_writes_become_the_same_names_as_what_is_published(name, tmp_path):
    """Names of one form are not enough: what a loader looks up is one table, whoever wrote the file."""
    model, there = zoo.build(name), {}
    for original in (True, False):
        model.save_pretrained(tmp_path / f"{original}", save_original_format=original)
        fmoe.convert(tmp_path / f"{original}", tmp_path / f"{original}-there", "automodel", fsync=False)
        there[original] = load(tmp_path / f"{original}-there")
    same(there[True], there[False])
    fmoe.convert(tmp_path / "True-there", tmp_path / "published", "hf", fsync=False)
    fmoe.convert(tmp_path / "published", tmp_path / "again", "automodel", fsync=False)
    same(load(tmp_path / "again"), there[True])
