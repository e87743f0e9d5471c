"""Adapters that are refused, and what the error says to do: done, it gives the model that PEFT runs."""

import json
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, CordaConfig, KasaConfig, MontecloraConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.variants import QALoraLinearVariant
from peft_cases import ALPHA, WARNS, R, adapter_of, build, close, config_of, logits
from safetensors.torch import load_file, save_file

import fmoe

pytestmark = [*WARNS, pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore:PEFT")]
FILE = "adapter_model.safetensors"
Q = dict(target_modules=["q_proj"])
MERGED: dict[str, tuple[str, dict[str, Any]]] = {
    "use_dora": ("mixtral", dict(use_dora=True)),
    "lora_bias": ("qwen2_moe", dict(lora_bias=True)),
    "bias": ("qwen2_moe", dict(bias="all")),
    "modules_to_save": ("mixtral", dict(modules_to_save=["lm_head"])),
    "trainable_token_indices": ("mixtral", dict(trainable_token_indices={"embed_tokens": [1, 3], "lm_head": [2]})),
    "kasa_config": ("mixtral", dict(kasa_config=KasaConfig())),
    "use_bdlora": ("mixtral", dict(use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2))),
    "monteclora_config": ("mixtral", dict(monteclora_config=MontecloraConfig())),
    "experts of LongCat": ("longcat_flash", dict(target_modules=[], target_parameters=["gate_up_proj", "down_proj"])),
    "attention": ("aria", dict(target_modules=["multihead_attn"])),
}
SAYS = {"experts of LongCat": "zero experts too", "attention": "MultiheadAttention, of whose out_proj"}


def trained(name: str, path: Any, **how: Any) -> Any:
    """PEFT's model whose matrices, and all that it trains, are drawn anew; saved at a path."""
    made = peft.get_peft_model(build(name), LoraConfig(**dict(r=4, lora_alpha=ALPHA) | Q | how)).eval()
    drawn = torch.Generator().manual_seed(1)
    for _, p in (n for n in made.named_parameters() if n[1].requires_grad):
        p.data.add_(0.1 * torch.randn(p.shape, generator=drawn))
    made.save_pretrained(path)
    return made


def refused(path: Any, base: fmoe.Adapter, says: str) -> None:
    with pytest.raises(fmoe.AdapterError, match=says):
        fmoe.lora.load(path, base)


@pytest.mark.parametrize("what", MERGED)
def test_what_is_to_be_merged_with_peft_is_the_adapters_model_then(what, tmp_path):
    name, how = MERGED[what]
    meant = trained(name, tmp_path / "a", **how)
    refused(tmp_path / "a", adapter_of(build(name)), SAYS.get(what, f"says {what}=") + ".*Fix: merge it with PEFT")
    merged = PeftModel.from_pretrained(build(name), tmp_path / "a").eval().merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    native, adapter = fmoe.load(tmp_path / "merged"), fmoe.adapter(tmp_path / "merged")
    fmoe.save(native, tmp_path / "ours", adapter, fsync=False)
    again = type(merged).from_pretrained(tmp_path / "ours", dtype=merged.dtype).eval()
    if name != "aria":
        close(logits(again), logits(meant))
        assert (logits(build(name)) - logits(meant)).abs().max() > 1e-3
        return
    images = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(2))
    ours, theirs, plain = (m.get_submodule(f"{at}model.multi_modal_projector.cross_attn.multihead_attn") for m, at in
                           ((again, ""), (meant, "base_model.model."), (build(name), "")))  # fmt: skip
    with torch.no_grad():
        made = [m(images, images, images)[0] for m in (ours, theirs, plain)]
    close(made[0], made[1])
    assert (made[2] - made[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("how", "says"), [
    (dict(lora_bias=True), "where the base's modules have no bias PEFT cannot: keep it there"),
    (dict(alora_invocation_tokens=[5]), "Fix: keep it beside its base, in PEFT"),
])  # fmt: skip
def test_what_peft_cannot_merge_is_not_said_to_be_merged_with_it(how, says, tmp_path):
    made = trained("mixtral", tmp_path / "a", **how)
    with pytest.raises(fmoe.AdapterError, match=says):
        fmoe.lora.load(tmp_path / "a", adapter_of(build("mixtral")))
    with pytest.raises((RuntimeError, NotImplementedError)):
        made.merge_and_unload()


def test_adapters_among_which_arrow_chooses_are_read_one_by_one(tmp_path):
    """And its router is kept in PEFT, which merges none: as the error says."""
    alone = [trained("mixtral", tmp_path / n) for n in ("a", "b")]
    paths = [str(tmp_path / n) for n in ("a", "b")]
    made = peft.create_arrow_model(build("mixtral"), paths, ArrowConfig(top_k=1)).eval()
    made.save_pretrained(tmp_path / "arrow")
    says = "says arrow_config=.*Fix: keep it beside its base.*load one of its adapters alone"
    refused(tmp_path / "arrow" / "arrow_router", adapter_of(build("mixtral")), says)
    with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router"):
        made.merge_and_unload()
    for i, meant in enumerate(alone):
        adapter = adapter_of(model := build("mixtral"))
        tuned = fmoe.lora.load(tmp_path / "arrow" / f"task_{i}", adapter)
        merged = adapter.to_hf(fmoe.lora.merge(adapter.from_hf(model.state_dict()), tuned.params, tuned.scales))
        model.load_state_dict({n: t.clone() for n, t in merged.items()})
        close(logits(model), logits(meant))


def told(path: Any, **said: Any) -> None:
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | said))


def test_replicated_layers_are_layers_of_a_base_that_is_written_so(tmp_path):
    meant = trained("mixtral", tmp_path / "a", layer_replication=[[0, 2], [0, 2]], target_modules=["q_proj", "o_proj"])
    refused(tmp_path / "a", adapter_of(build("mixtral")), "PEFT merges all copies into one. Fix: write a base")
    model = build("mixtral")
    model.config.num_hidden_layers = 4
    longer = type(model)(model.config).eval()
    layer = lambda n: n.replace("layers.2.", "layers.0.").replace("layers.3.", "layers.1.")
    longer.load_state_dict({n: model.state_dict()[layer(n)] for n in longer.state_dict()})
    told(tmp_path / "a", layer_replication=None)
    adapter = adapter_of(longer)
    tuned = fmoe.lora.load(tmp_path / "a", adapter)
    merged = adapter.to_hf(fmoe.lora.merge(adapter.from_hf(longer.state_dict()), tuned.params, tuned.scales))
    longer.load_state_dict({n: t.clone() for n, t in merged.items()})
    close(logits(longer), logits(meant))


def test_qalora_is_lora_of_repeated_columns(tmp_path):
    group, meant = 8, trained("mixtral", tmp_path / "plain")
    (layer,) = [m for n, m in meant.named_modules() if n.endswith("layers.1.self_attn.q_proj")]
    QALoraLinearVariant.init(layer, "default", LoraConfig(use_qalora=True, qalora_group_size=group))
    meant.save_pretrained(tmp_path / "a")
    told(tmp_path / "a", use_qalora=True, qalora_group_size=group)
    refused(tmp_path / "a", adapter_of(build("mixtral")), "says use_qalora=True: matrices A of groups.*Fix: say")
    told(tmp_path / "a", use_qalora=False)
    files, a = load_file(tmp_path / "a" / FILE), "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    A = files[a]
    save_file(files | {a: A.repeat_interleave(group, 1) * A.shape[1] / group}, tmp_path / "a" / FILE)
    adapter = adapter_of(build("mixtral"))
    tuned, native = fmoe.lora.load(tmp_path / "a", adapter), adapter.from_hf(build("mixtral").state_dict())
    name = "model.layers.1.self_attn.q_proj.weight"
    ours = fmoe.lora.merge(native, tuned.params, tuned.scales)[name]
    x = torch.randn(5, ours.shape[1], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        close(x @ ours.T, QALoraLinearVariant.forward(layer, "default", x, x @ native[name].T))


def started(start: str, rslora: bool) -> Any:
    """PEFT's model whose base the start has changed; CorDA looks at what goes through it first."""
    model, ids = build("mixtral"), torch.arange(12)[None] * 7 % 60 + 1
    how = dict(corda_config=CordaConfig(corda_method=start[-3:])) if start.startswith("corda") else {}
    said = LoraConfig(r=4, init_lora_weights=start[:5] if how else start, use_rslora=rslora, **Q, **how)
    if how:
        preprocess_corda(model, said, run_model=lambda: model(input_ids=ids, use_cache=False))
    return peft.get_peft_model(model, said)


STARTED = ["pissa", "pissa_niter_2", "olora", "corda ipm", "corda kpm"]


@pytest.mark.parametrize("start", STARTED)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_that_changes_the_base_is_lora_of_the_base_once_peft_converts_it(rslora, start, tmp_path):
    """Or once it is merged with PEFT where it was trained: both are in the error."""
    made, start = started(start, rslora), start.partition(" ")[0]
    said = made.peft_config["default"]
    said.init_lora_weights = True
    made.eval().save_pretrained(tmp_path / "first")
    said.init_lora_weights = start
    for _, p in (n for n in made.named_parameters() if n[1].requires_grad):
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    meant = logits(made)
    made.save_pretrained(tmp_path / "a")
    adapter = adapter_of(model := build("mixtral"))
    refused(
        tmp_path / "a", adapter, f"init_lora_weights='{start}'.*Fix: save it with PEFT's path_initial_model.*or merge"
    )
    made.save_pretrained(tmp_path / "b", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    tuned = fmoe.lora.load(tmp_path / "b", adapter)
    merged = adapter.to_hf(fmoe.lora.merge(adapter.from_hf(model.state_dict()), tuned.params, tuned.scales))
    model.load_state_dict({n: t.clone() for n, t in merged.items()})
    close(logits(model), meant)
    made.merge_and_unload().save_pretrained(tmp_path / "merged")
    fmoe.convert(tmp_path / "merged", tmp_path / "native", "native", fsync=False)
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    close(logits(type(model).from_pretrained(tmp_path / "back", dtype=model.dtype).eval()), meant)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_of_16_bits_are_merged_as_the_numbers_that_they_are(dtype, tmp_path):
    """And those of a pickle, which is refused, once it is written as safetensors."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    made = peft.get_peft_model(build("qwen3_moe").double(), config_of(targets))
    for n, p in made.named_parameters():
        if ".lora_" in n:
            p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(R)).to(dtype))
    made.save_pretrained(tmp_path / "a", safe_serialization=False)
    adapter = adapter_of(build("qwen3_moe"))
    refused(tmp_path / "a", adapter, "'adapter_model.bin': a pickle, which.*not read here: convert it to safetensors")
    tensors = torch.load(tmp_path / "a" / "adapter_model.bin", weights_only=True)
    save_file({n: t.to(dtype) for n, t in tensors.items()}, tmp_path / "a" / FILE)
    tuned = fmoe.lora.load(tmp_path / "a", adapter)
    assert {t.dtype for t in tuned.params.values()} == {dtype}
    native = adapter.from_hf(build("qwen3_moe").double().state_dict())
    ours = fmoe.lora.merge(native, tuned.params, tuned.scales)
    for n, t in adapter.from_hf(made.merge_and_unload().state_dict()).items():
        torch.testing.assert_close(ours[n], t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "aria", "llama4"])
def test_a_tower_that_was_merged_goes_native_and_back(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    ends = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "vis" in n and "MHA" not in n
            and "multihead" not in n]  # fmt: skip
    trained(name, tmp_path / "a", target_modules=ends)
    tuned, native = fmoe.lora.load(tmp_path / "a", tmp_path / "base"), fmoe.load(tmp_path / "base")
    merged = fmoe.lora.merge(native, tuned.params, tuned.scales)
    assert sum(not torch.equal(native[n], t) for n, t in merged.items()) == len(ends)
    fmoe.save(merged, tmp_path / "merged", fmoe.adapter(tmp_path / "base"), fsync=False)
    fmoe.convert(tmp_path / "merged", tmp_path / "native", "native", fsync=False)
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    one, other = (load_file(tmp_path / d / "model.safetensors") for d in ("merged", "back"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], t) for n, t in other.items())
    again = type(model).from_pretrained(tmp_path / "back", dtype=model.dtype).eval()
    theirs = PeftModel.from_pretrained(build(name), tmp_path / "a").merge_and_unload().state_dict()
    for n, t in again.state_dict().items():
        close(t.float(), theirs[n].float(), 1e-5)
