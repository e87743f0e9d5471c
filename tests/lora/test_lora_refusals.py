"""LoRA matrices in files that fit nowhere: what must be refused, and what only values settle."""

from typing import Any

import pytest
import torch
from lora_cases import SIZES, adapter_of, forms, native, sized, stems
from tiny import FAMILIES as KINDS

import fmoe
from fmoe.families import FAMILIES
from fmoe.layout.names import Names
from fmoe.lowrank.derive import CURRENT
from fmoe.lowrank.scales import Scales
from fmoe.testing import same


@pytest.mark.parametrize("name", KINDS)
def test_every_mutation_is_an_error_that_names_the_key(name):
    for form in forms(name):
        for apart in (False, True) if form == "per-expert" and name == KINDS[0] else (False,):
            adapter = adapter_of(name)
            files = adapter.choose(lora=form).to_hf(native(name, form, apart))
            one_of_each = {template: rows.names[-1] for template, rows in Names(files).rows.items()}
            for key in (n for n in one_of_each.values() if "self_attn" not in n):
                tensor = files[key]
                others = {n: t for n, t in files.items() if n != key}
                wrongs = [others, others | {key: tensor.T}, others | {key: tensor.half()}, others | {key: tensor[:-1]}]
                wrongs += [others | {key.replace(".lora_", ".lore_"): tensor}, files | {key + "_too": tensor}]
                wrongs += [
                    others | {key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor}
                ]
                for wrong in wrongs:
                    with pytest.raises(fmoe.AdapterError) as error:
                        adapter.from_hf(wrong)
                    named = set(error.value.keys)
                    assert key in named or named & (wrong.keys() - files.keys()), (key, error.value)


def test_lone_gates_lone_ups_and_experts_that_are_missing():
    adapter = adapter_of("qwen3_moe", lora="per-expert")
    files = adapter.to_hf(native("qwen3_moe"))
    for part in ("gate_proj", "up_proj"):
        for matrix in ("lora_A", "lora_B"):
            gone = [n for n in files if f"{part}.{matrix}" in n]
            with pytest.raises(fmoe.AdapterError, match="missing") as error:
                adapter.from_hf({n: t for n, t in files.items() if n not in gone})
            assert set(gone) <= set(error.value.keys)
    for part, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
        alone = {n: t for n, t in files.items() if other not in n}
        with pytest.raises(fmoe.AdapterError, match=f"LoRA of {part!r} without {other!r}.*lora_B of zeros") as error:
            adapter.from_hf(alone)
        keys = {n for n in files if other in n or (part in n and ".lora_A." in n)}
        assert keys == set(error.value.keys)
        told = {n: alone[n.replace(other, part)] for n in files if other in n}  # what the message says
        whole = adapter.from_hf(alone | {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in told.items()})
        A, B = (whole[n] for n in whole if "gate_and_up" in n)
        delta, I = (A @ B).mT, B.shape[2] // 2
        mine, its = (delta[:, :I], delta[:, I:]) if part == "gate_proj" else (delta[:, I:], delta[:, :I])
        assert mine.any() and not its.any()
    gone = [n for n in files if ".experts.2." in n]
    with pytest.raises(fmoe.AdapterError, match="missing") as error:
        adapter.from_hf({n: t for n, t in files.items() if n not in gone})
    assert {n for n in gone if "up_proj.lora_A" in n} <= set(error.value.keys)
    down = {n: t for n, t in files.items() if "down_proj" in n}
    assert {n.rpartition(".")[2] for n in adapter.from_hf(down)} == {"lora_down_A", "lora_down_B"}


def test_pairs_fit_and_forms_do_not_mix():
    adapter = adapter_of("qwen3_moe")
    stem = stems("qwen3_moe")[0][0]
    params = native("qwen3_moe")
    both = adapter.choose(lora="per-expert").to_hf(params) | adapter.to_hf(params)
    with pytest.raises(fmoe.AdapterError, match="two forms of LoRA at once"):
        adapter.from_hf(both)
    with pytest.raises(fmoe.AdapterError, match="two forms of LoRA at once"):
        adapter.resolve(both)
    for form in ("peft", "per-expert"):
        other = "peft" if form == "per-expert" else "per-expert"
        with pytest.raises(fmoe.AdapterError, match=f"the form '{form}', and lora='{other}' was chosen"):
            adapter.choose(lora=other).from_hf(adapter.choose(lora=form).to_hf(params))
        alone = {n: t for n, t in params.items() if not n.endswith("lora_down_B")}
        with pytest.raises(fmoe.AdapterError, match="stands without") as error:
            adapter.choose(lora=form).to_hf(alone)
        assert {f"{stem}.lora_down_A", f"{stem}.lora_down_B"} <= set(error.value.keys)
        wide = params | {f"{stem}.lora_down_B": torch.randn(3, 4, 10)}
        with pytest.raises(fmoe.AdapterError, match="rank 2 of 3 experts, and 4 of 3"):
            adapter.choose(lora=form).to_hf(wide)
    with pytest.raises(fmoe.AdapterError, match=r"fmoe.lora.lift\(params\) is exact"):
        adapter.to_hf(native("qwen3_moe", apart=True))
    for what, why in (dict(lora="vllm"), "lora='vllm'"), (dict(lora_A="both"), "lora_A='both'"):
        with pytest.raises(fmoe.AdapterError, match=why):
            adapter.choose(**what)
    loose = FAMILIES["qwen3_moe"].adapter()
    other = {n.replace("layers.3", "layers.4"): t[:2] for n, t in params.items() if "down" in n}
    files = loose.choose(lora="per-expert").to_hf({n: t for n, t in params.items() if "self_attn" not in n})
    with pytest.raises(fmoe.AdapterError, match="where .* has"):
        loose.from_hf(files | loose.choose(lora="per-expert").to_hf(other))


def test_values_settle_what_names_cannot_and_nothing_is_dropped():
    adapter = adapter_of("mixtral")
    files = adapter.choose(lora="per-expert").to_hf(native("mixtral"))
    stem = stems("mixtral")[0][0]
    ups = [n for n in files if ".w3.lora_A" in n]
    assert adapter.from_hf(files)[f"{stem}.lora_gate_and_up_A"].shape == (3, 10, 2)
    for change in (
        lambda t: t + 1,
        lambda t: torch.where(t == t.max(), torch.nan, t),
        lambda t: t.index_fill(0, torch.tensor(0), -0.0),
    ):
        zeros = {n: t.index_fill(0, torch.tensor(0), 0.0) if "lora_A" in n else t for n, t in files.items()}
        changed = zeros | {ups[1]: change(zeros[ups[1]])}
        params = adapter.from_hf(changed)
        assert params[f"{stem}.lora_gate_and_up_A"].shape == (3, 10, 2, 2)
        same(adapter.resolve(changed).to_hf(params), changed)
        with pytest.raises(fmoe.AdapterError, match="should be the same tensor") as error:
            adapter.choose(lora_A="shared").from_hf(changed)
        assert ups[1] in error.value.keys
    assert adapter.choose(lora_A="separate").from_hf(files)[f"{stem}.lora_gate_and_up_A"].shape == (3, 10, 2, 2)
    same(
        adapter.from_hf({n: t.to("meta") for n, t in files.items()}),
        {n: t.to("meta") for n, t in native("mixtral").items()},
    )


def test_versions_that_say_too_little_are_refused():
    for version in ("0.18.2.dev0@abc", "0.19.1.dev0", "new", 3, 0.19, 10**5000, ("0.19.1",)):
        with pytest.raises(fmoe.AdapterError, match="peft_version"):
            adapter_of("qwen3_moe", peft_version=version)
    for version, like in ("0.18.0.rc0", "0.18.1"), ("0.19.2.dev0@1", CURRENT), ("1.0.0", CURRENT), ("0.17.1", "0.18.1"):
        params = native("qwen3_moe")
        same(*(adapter_of("qwen3_moe", peft_version=v).to_hf(params) for v in (version, like)))
    with pytest.raises(fmoe.AdapterError, match="expected names"):
        adapter_of("qwen3_moe", target_parameters="mlp.experts.down_proj")


def test_target_parameters_that_name_something_else():
    adapter = adapter_of("qwen3_moe")
    files = adapter.to_hf(native("qwen3_moe"))
    inner = {n for n in files if "base_layer" in n}
    for targets, why in (
        (["mlp.experts.down_proj"], "two wrappers, .* name down of its parameters"),
        (["mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj"], "wrap gate_up_proj_bias too"),
        (["other.down_proj"], "name none of its parameters"),
    ):
        given = dict(target_parameters=targets)
        if "two" in why:  # names prove it, and the config says otherwise
            given = dict(target_parameters=["layers.3.mlp.experts.down_proj"])
        with pytest.raises(fmoe.AdapterError, match=why) as error:
            adapter_of_fresh(**given).from_hf(
                files if "none" not in why else {n: t for n, t in files.items() if n not in inner}
            )
        assert error.value.keys


def adapter_of_fresh(**choices: Any) -> fmoe.Adapter:
    return FAMILIES["qwen3_moe"].adapter(sized("qwen3_moe", **SIZES), **choices)


def test_a_whole_weight_beside_the_matrices_of_one_that_is_cut_natively_is_refused():
    stem = "layers.0.mlp.gate"
    params = {"layers.0.mlp.text_moe.gate.weight": torch.ones(4, 6), "other": torch.ones(1)}
    lora = {f"{stem}.lora_A.weight": torch.ones(1, 4), f"{stem}.lora_B.weight": torch.ones(6, 1)}
    turned = lambda update: {"layers.0.mlp.text_moe.gate.weight": update.mT}
    scales = Scales({f"{stem}.lora_A.weight": 1.0}, (), None, {f"{stem}.lora_A.weight": turned})
    assert fmoe.lora.merge(params, lora, scales)["layers.0.mlp.text_moe.gate.weight"].eq(2).all()
    with pytest.raises(fmoe.AdapterError, match="is a whole weight, and natively that is cut or turned") as error:
        fmoe.lora.merge(params, lora | {f"{stem}.base_layer.weight": torch.ones(6, 4)}, scales)
    assert error.value.keys == (f"{stem}.base_layer.weight",)
