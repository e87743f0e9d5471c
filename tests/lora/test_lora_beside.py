"""LoRA of embeddings, heads and routers against PEFT's own merge in fp64, of a model in memory and of its directory."""

import json
import re
from typing import Any

import peft
import pytest
import torch
from peft_cases import ALPHA, MODELS, WARNS, R, adapter_of, build, close, logits, parameters
from safetensors.torch import load_file, save_file

import fmoe
from fmoe.testing import same

pytestmark = [
    *WARNS,
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings=True.:UserWarning"),
]
ENDS = ["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]
FILE = "adapter_model.safetensors"
ROUTER = re.compile(
    r"((mlp|moe|mixer|feed_forward|ffn)\.(\w+_moe\.)?|layers\.\d+\.)"
    r"(gate|router)(\.(gate|layer|wg|proj|classifier|router_mlp\.\w+))?\.weight$"
)
APART = {"longcat_flash"}  # zero experts among others in memory


def wrapped(model: Any, path: Any, **how: Any) -> Any:
    """PEFT's model in fp64 with random matrices, saved at a path."""
    made = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=ALPHA, **how))
    drawn = torch.Generator().manual_seed(1)
    for n, p in made.named_parameters():
        if ".lora_" in n:
            p.data.copy_(torch.randn(p.shape, generator=drawn, dtype=torch.float64))
    made.save_pretrained(path)
    return made


def agree(ours: dict[str, Any], theirs: dict[str, Any], before: dict[str, Any], count: int) -> None:
    assert ours.keys() == theirs.keys()
    for n, t in theirs.items():
        torch.testing.assert_close(ours[n].double(), t.double(), rtol=1e-12, atol=1e-12)
    assert sum(not torch.equal(before[n], t) for n, t in theirs.items()) == count


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", ENDS, ids="-".join)
def test_embeddings_and_heads_with_the_copies_that_peft_writes_beside_them(targets, name, tmp_path):
    model = build(name).double()
    adapter = adapter_of(model)
    before = adapter.from_hf({n: t.clone() for n, t in model.state_dict().items()})
    made = wrapped(model, tmp_path, target_modules=targets)
    files = load_file(tmp_path / "adapter_model.safetensors")
    assert any(n.endswith("base_layer.weight") for n in files)
    tuned = fmoe.lora.load(tmp_path, adapter)
    same(tuned.adapter.to_hf(tuned.params), files)
    fmoe.lora.save(tuned.params, tmp_path / "again", tuned.adapter, tuned.config)
    same(load_file(tmp_path / "again" / "adapter_model.safetensors"), files)
    theirs = adapter.from_hf(made.merge_and_unload().state_dict())
    merged = fmoe.lora.merge(before, tuned.params, tuned.scales)
    agree(merged, theirs, before, len(tuned.scales))
    for n, t in fmoe.lora.unmerge(merged, tuned.params, tuned.scales).items():
        torch.testing.assert_close(t, before[n], rtol=1e-9, atol=1e-9)


def test_a_copy_that_is_another_is_what_peft_puts_in_the_weights_place(tmp_path):
    model = build("qwen3_moe").double()
    adapter = adapter_of(model)
    before = adapter.from_hf({n: t.clone() for n, t in model.state_dict().items()})
    wrapped(model, tmp_path, target_modules=["lm_head"])
    file = tmp_path / "adapter_model.safetensors"
    copy = "base_model.model.lm_head.base_layer.weight"
    save_file(load_file(file) | {copy: 2 * load_file(file)[copy]}, file)
    again = peft.PeftModel.from_pretrained(build("qwen3_moe").double(), tmp_path)
    tuned = fmoe.lora.load(tmp_path, adapter)
    theirs = adapter.from_hf(again.merge_and_unload().state_dict())
    agree(fmoe.lora.merge(before, tuned.params, tuned.scales), theirs, before, 1)
    longer = tuned.params | {copy: torch.ones(99, 32)}
    with pytest.raises(fmoe.AdapterError, match=r"base_layer.weight' is \[99, 32\].*Fix: resize the base's embeddings"):
        fmoe.lora.merge(before, longer, tuned.scales)
    alone = {n: t for n, t in load_file(file).items() if ".lora_" not in n}
    save_file(alone, file)
    with pytest.raises(fmoe.AdapterError, match="no matrix A or B") as error:
        fmoe.lora.load(tmp_path, adapter)
    assert copy in error.value.keys


@pytest.mark.parametrize("targets", ENDS, ids="-".join)
def test_of_a_tied_base_they_are_refused_and_of_one_that_was_untied_as_told_they_are_not(targets, tmp_path):
    model = build("qwen3_moe")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "base")
    made = wrapped(model, tmp_path / "a", target_modules=targets)
    meant = logits(made)
    with pytest.raises(AssertionError):  # PEFT adds to the one tensor that both are
        close(logits(made.merge_and_unload()), meant)
    with pytest.raises(fmoe.AdapterError, match="changes both.*another model than the adapter's. Fix: untie the base"):
        fmoe.lora.load(tmp_path / "a", tmp_path / "base")
    file, config = tmp_path / "base" / "model.safetensors", tmp_path / "base" / "config.json"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    tuned, before = fmoe.lora.load(tmp_path / "a", tmp_path / "base"), fmoe.load(tmp_path / "base")
    merged = fmoe.lora.merge(before, tuned.params, tuned.scales)
    assert sum(not torch.equal(before[n], t) for n, t in merged.items()) == len(tuned.scales)
    fmoe.save(merged, tmp_path / "merged", fmoe.adapter(tmp_path / "base"), fsync=False)
    close(logits(type(model).from_pretrained(tmp_path / "merged", dtype=model.dtype)), meant)


def routers(name: str) -> tuple[Any, list[str]]:
    model = build(name).double()
    found = [n for n, p in model.named_parameters() if p.ndim == 2 and ROUTER.search(n)]
    return model, sorted({re.sub(r".*\.\d+\.", "", n) for n in found})


HERE = ["phimoe", "granitemoe", "ernie4_5_vl_moe", "minimax_m3_vl_text", "qwen3_moe"]
REST = [pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n not in (*HERE, *APART)]


@pytest.mark.parametrize("name", [*HERE, *REST])
def test_routers_of_every_family_in_memory_and_of_its_published_directory(name, tmp_path):
    model, ends = routers(name)
    adapter = adapter_of(model)
    model.save_pretrained(tmp_path / "base")
    before = adapter.from_hf({n: t.clone() for n, t in model.state_dict().items()})
    made = wrapped(model, tmp_path / "a", target_modules=[], target_parameters=ends)
    tuned = fmoe.lora.load(tmp_path / "a", adapter)
    merged = made.merge_and_unload()
    theirs = adapter.from_hf(merged.state_dict())
    agree(fmoe.lora.merge(before, tuned.params, tuned.scales), theirs, before, len(tuned.scales))
    tuned, before = fmoe.lora.load(tmp_path / "a", tmp_path / "base"), fmoe.load(tmp_path / "base")
    merged.save_pretrained(tmp_path / "merged")
    theirs = fmoe.load(tmp_path / "merged")
    agree(fmoe.lora.merge(before, tuned.params, tuned.scales), theirs, before, len(tuned.scales))


ELSEWHERE = ["dots3_note", "ernie4_5_vl_moe", "inkling2_loop", "inkling2_loop_text", "inkling2_text"]
ELSEWHERE += ["qwen3_omni_moe_thinker"]


@pytest.mark.parametrize("name", ["hy_v4_vl", *(pytest.param(n, marks=pytest.mark.slow) for n in ELSEWHERE)])
def test_a_base_by_its_directory_is_found_where_memory_has_other_names(name, tmp_path):
    model = build(name).double()
    model.save_pretrained(tmp_path / "base")
    fmoe.lora.save(
        fmoe.lora.init(fmoe.load(tmp_path / "base"), r=R), tmp_path / "drawn", fmoe.adapter(tmp_path / "base")
    )
    made = wrapped(model, tmp_path / "a", target_modules=[], target_parameters=parameters(adapter_of(model)))
    assert {n: t.shape for n, t in load_file(tmp_path / "drawn" / FILE).items()} == {
        n: t.shape for n, t in load_file(tmp_path / "a" / FILE).items()
    }
    tuned, before = fmoe.lora.load(tmp_path / "a", tmp_path / "base"), fmoe.load(tmp_path / "base")
    made.merge_and_unload().save_pretrained(tmp_path / "merged")
    theirs = fmoe.load(tmp_path / "merged")
    agree(fmoe.lora.merge(before, tuned.params, tuned.scales), theirs, before, len(tuned.scales))
