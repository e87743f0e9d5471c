"""LoRA in PEFT's other forms: lone wrappers, some layers, ranks and alphas by pattern, experts that are modules."""

import json
import re
from pathlib import Path

import hf
import peft
import pytest
import torch
from peft_cases import (
    ALONE,
    ALPHA,
    MODELS,
    WARNS,
    E,
    R,
    adapter_of,
    build,
    close,
    config_of,
    drawn,
    logits,
    merged_model,
    parameters,
    train,
)
from safetensors.torch import load_file

import fmoe
from fmoe.lowrank.targets import table_of
from fmoe.testing import same

pytestmark = WARNS


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_a_lone_wrapper_is_what_target_parameters_says(part, tmp_path):
    """Without `base_layer.` in names, only adapter_config.json says which parameter it is."""
    model = build("qwen3_moe", moe_intermediate_size=32)
    adapter = adapter_of(model)
    wrapped = drawn(model, [f"mlp.experts.{part}"])
    wrapped.save_pretrained(tmp_path / "a")
    files = peft.get_peft_model_state_dict(wrapped)
    assert not any("base_layer" in n for n in files)
    with pytest.raises(fmoe.AdapterError, match="pass target_parameters") as error:
        adapter.from_hf(files)
    assert set(error.value.keys) == set(files)
    tuned = fmoe.lora.load(tmp_path / "a", adapter)
    stem = "lora_gate_and_up" if part == "gate_up_proj" else "lora_down"
    assert {n.rpartition(".")[2] for n in tuned.params} == {f"{stem}_A", f"{stem}_B"}
    same(tuned.adapter.to_hf(tuned.params), files)
    close(
        logits(merged_model("qwen3_moe", dict(moe_intermediate_size=32), tuned.params, tuned.scales)), logits(wrapped)
    )
    fmoe.lora.save(tuned.params, tmp_path / "b", adapter, lora_alpha=ALPHA)
    again = peft.PeftModel.from_pretrained(build("qwen3_moe", moe_intermediate_size=32), tmp_path / "b").eval()
    close(logits(again), logits(wrapped), 1e-6)
    same(peft.get_peft_model_state_dict(again), files)


@pytest.mark.parametrize("layer", [0, 2])
def test_parameters_of_some_layers_alone(layer, tmp_path):
    """Both parameters in one layer, one in the others: nesting is a layer's own."""
    model = build("qwen3_moe")
    adapter = adapter_of(model)
    targets = [f"model.layers.{layer}.mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wrapped = drawn(model, targets)
    wrapped.save_pretrained(tmp_path)
    tuned = fmoe.lora.load(tmp_path, adapter)
    assert len(tuned.params) == 6 and sum("gate_and_up" in n for n in tuned.params) == 2
    close(logits(merged_model("qwen3_moe", {}, tuned.params, tuned.scales)), logits(wrapped))
    same(tuned.adapter.to_hf(tuned.params), peft.get_peft_model_state_dict(wrapped))


@pytest.mark.parametrize("how", [dict(use_rslora=True), dict(rank_pattern={"experts.down_proj": 5}), dict(
    alpha_pattern={r"layers\.0\.mlp\.experts\.gate_up_proj": 1.5})], ids=str)  # fmt: skip
def test_ranks_alphas_and_rslora(how, tmp_path):
    model = build("qwen3_moe")
    adapter = adapter_of(model)
    wrapped = peft.get_peft_model(model, config_of(parameters(adapter), **how))
    train(wrapped)
    wrapped.eval().save_pretrained(tmp_path)
    tuned = fmoe.lora.load(tmp_path, adapter)
    close(logits(merged_model("qwen3_moe", {}, tuned.params, tuned.scales)), logits(wrapped))
    for l in (0, 2):
        prefix = f"model.layers.{l}.mlp.experts"
        mine = {n: t for n, t in tuned.params.items() if f"{prefix}." in n}
        even, alpha = fmoe.lora.even(mine, tuned.scales)
        config = adapter.moe_config
        x = torch.randn(5, config.expert_dim, generator=torch.Generator().manual_seed(5))
        routing = fmoe.Routing(torch.arange(10).view(5, 2) % E, torch.ones(5, 2))
        weights = fmoe.subtree(adapter.from_hf(build("qwen3_moe").state_dict()), prefix)
        ours = fmoe.experts(
            weights | fmoe.subtree(even, f"base_model.model.{prefix}"), x, routing, config, lora_alpha=alpha
        )
        with torch.no_grad():
            theirs = wrapped.get_submodule(f"base_model.model.{prefix}")(x, *routing[:2]).view_as(x)
        close(ours, theirs)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("apart", [True, False])
def test_peft_reads_the_per_expert_form_that_we_write(name, apart, tmp_path):
    """PEFT fuses such files block-diagonally as it loads them: the same update as our matrices."""
    base = adapter_of(build(name), lora="per-expert")
    lora = fmoe.lora.init(base.from_hf(build(name).state_dict()), R)
    made = torch.Generator().manual_seed(6)
    lora = {n: 0.3 * torch.randn(t.shape, generator=made) for n, t in lora.items()}
    if apart:
        for n in [n for n in lora if n.endswith("gate_and_up_A")]:
            lora[n] = 0.3 * torch.randn(E, lora[n].shape[1], 2, R, generator=made)
    fmoe.lora.save(lora, tmp_path, base, lora_alpha=ALPHA)
    files = load_file(tmp_path / "adapter_model.safetensors")
    assert all(n.startswith("base_model.model.model.layers.") for n in files), "names as PEFT writes them"
    tuned = fmoe.lora.load(tmp_path, base)
    same({n.removeprefix("base_model.model."): t for n, t in tuned.params.items()}, lora)
    again = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    close(logits(again), logits(merged_model(name, {}, lora, ALPHA / R, interleaved=False)))
    fused = fmoe.adapter(again.config.model_type, again.base_model.model.config).from_hf(
        peft.get_peft_model_state_dict(again)
    )
    lifted = {f"base_model.model.{n}": t for n, t in fmoe.lora.lift(lora, interleaved=False).items()}
    if apart:  # the way that PEFT fuses them is our lift, bit for bit
        same(fused, lifted)


def test_experts_that_are_modules(tmp_path):
    """Switch Transformers: PEFT wraps each expert's linear layers, and other layers of the same names beside them."""
    model = build("switch_transformers")
    adapter = adapter_of(model)
    before = adapter.from_hf({n: t.clone() for n, t in model.state_dict().items()})
    config = peft.LoraConfig(target_modules=["wi", "wo", "q"], r=R, lora_alpha=ALPHA, bias="none")
    wrapped = peft.get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if ".lora_" in name:
            p.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    wrapped.save_pretrained(tmp_path)
    tuned = fmoe.lora.load(tmp_path, adapter)
    assert {"lora_gate_and_up_A", "weight"} <= {n.rpartition(".")[2] for n in tuned.params}
    merged = adapter.from_hf(wrapped.merge_and_unload().state_dict())
    ours = fmoe.lora.merge(before, tuned.params, tuned.scales)
    for n in merged:
        close(ours[n], merged[n], 1e-6)
    changed = [n for n in merged if not torch.equal(before[n], merged[n])]
    assert any(n.endswith("down_projs") for n in changed) and any(re.search(r"\.q\.weight$", n) for n in changed)


def test_names_and_order_that_peft_depends_on():
    """What the derived rules rely on: parameters in the order of the rules, and what modules say of themselves."""
    checked = 0
    for name in (n for n in MODELS if n not in ALONE):
        model = build(name)
        table = table_of(adapter_of(model))
        for module_name, module in model.named_modules():
            own = [n for n, _ in module.named_parameters(recurse=False)]
            found = {
                w.parameter: w.weight for w in table.forms.wrappers if w.parameter in own and w.parameter != "weight"
            }
            if found and "experts" in module_name:
                checked += 1
                assert [*found] == [n for n in own if n in found], "one wrapper stands around the other in this order"
                weight = next(iter(found.values()))
                inward = weight.source.axes[1] == weight.target.axes[1]
                assert getattr(module, "is_transposed", False) == (inward and table.forms.marked), name
    assert checked > 60


def test_a_model_saved_by_path_is_its_adapters_base(tmp_path):
    model = hf.write("qwen3_moe", tmp_path / "model")
    wrapped = drawn(model, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    wrapped.save_pretrained(tmp_path / "adapter")
    config: Path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(config.read_text())
    for base in (str(tmp_path / "model"), "someone/somewhere"):
        config.write_text(json.dumps(said | dict(base_model_name_or_path=base)))
        if base == "someone/somewhere":
            with pytest.raises(fmoe.AdapterError, match="'someone/somewhere', which is no directory here"):
                fmoe.lora.load(tmp_path / "adapter")
            continue
        tuned = fmoe.lora.load(tmp_path / "adapter")
        merged = fmoe.lora.merge(fmoe.load(tmp_path / "model"), tuned.params, tuned.scales)
        fmoe.save(merged, tmp_path / "merged", fmoe.adapter(tmp_path / "model"))
        again = type(model).from_pretrained(tmp_path / "merged", experts_implementation="eager").eval()
        close(logits(again), logits(wrapped))
