"""There and back through native files, Transformers loads what we wrote and computes the same numbers, bit for bit."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import hf
import hf_zoo as zoo
import pytest
import torch
from directories import files, load
from safetensors.torch import save_file
from torch import Tensor

import fmoe
from fmoe.testing import same

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
# what Transformers writes under other names than it was published under -> the published ones (checkpoints 1.1)
HUB = {
    "deepseek_v4": {
        r"^model\.embed_tokens\.": "embed.",
        r"^model\.hc_head\.hc_": "hc_head_",
        r"^model\.": "",
        r"\.attn\.norm\.": ".attn.kv_norm.",
    },
    "hy_v4": {r"(mlp|shared_experts)\.linear_gate\.": r"\1.gate_proj."},
    "kimi_linear": {r"block_sparse_moe\.(gate|up|down)_proj\.": r"mlp.\1_proj."},
}


@torch.no_grad()
def output(model: Any) -> Tensor:
    """The logits, or the last hidden states of a model without a head."""
    inputs = dict(input_ids=IDS, use_cache=False)
    model = model.language_model if model.config.model_type == "llama4" else model  # its own forward needs an image
    if model.config.is_encoder_decoder:
        inputs |= dict(decoder_input_ids=IDS[:, :5])
    out = copy.deepcopy(model)(**inputs)  # fresh storage: how files align a tensor is in no bit of what is compared
    return out.logits if "logits" in out else out.last_hidden_state


def reloaded(model: Any, path: Path) -> Any:
    found, told = type(model).from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return found.eval()


def there_and_back(source: Path, folder: Path, **choices: Any) -> Path:
    """source -> native -> Hugging Face again, in a directory that has nothing else."""
    fmoe.convert(source, folder / "native", fsync=False, **choices)
    shutil.rmtree(source)
    fmoe.convert(folder / "native", folder / "back", to="hf", fsync=False, **choices)
    return folder / "back"


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_transformers_loads_what_came_back_and_computes_the_same(name, tmp_path):
    model, saved = zoo.saved(name)
    source = Path(shutil.copytree(saved, tmp_path / "source"))
    # Transformers sets the last bias of a router of ZAYA to -1 after it has loaded another
    expected, before = output(reloaded(model, source) if name == "zaya" else model), files(source)
    assert expected.isfinite().all() and expected.std() > 0
    back = there_and_back(source, tmp_path)
    assert files(back) == before
    assert torch.equal(output(reloaded(model, back)), expected)


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_transformers_loads_what_an_adapter_writes_that_knows_the_config_alone(name, tmp_path):
    """As after surgery, where no directory says which of a family's layouts its class reads."""
    model, source = zoo.saved(name)
    config = json.loads((source / "config.json").read_text())
    fmoe.save(fmoe.load(source), tmp_path / "saved", fmoe.adapter(config["model_type"], config))
    expected = reloaded(model, source).state_dict()
    same(dict(reloaded(model, tmp_path / "saved").state_dict()), dict(expected))


def test_zero_experts_without_weights_need_no_config():
    """As published; only of files with weights for them a config has to say which they are."""
    _, source = zoo.saved("longcat_flash")
    published = {n: t for n, t in load(source).items() if not re.search(r"\.experts\.(8|9|1\d)\.", n)}
    adapter = fmoe.adapter("longcat_flash")
    same(adapter.to_hf(adapter.from_hf(published)), published)
    with pytest.raises(fmoe.AdapterError, match="e is 8, but 12"):
        adapter.from_hf(load(source))


@pytest.mark.parametrize("name", HUB)
def test_names_as_published_come_back_where_transformers_writes_others(name, tmp_path):
    model, saved = zoo.saved(name)
    source = Path(shutil.copytree(saved, tmp_path / "source"))
    published = {hub(name, n): t for n, t in load(saved).items()}
    assert published.keys() != load(saved).keys()
    save_file(published, source / "model.safetensors", {"format": "pt"})
    assert torch.equal(output(again := reloaded(model, source)), output(model))
    again.save_pretrained(tmp_path / "theirs")
    assert load(tmp_path / "theirs").keys() != published.keys(), "Transformers gives them back: take this test away"
    before = files(source)
    back = there_and_back(source, tmp_path)
    assert files(back) == before
    assert torch.equal(output(reloaded(model, back)), output(model))


def hub(name: str, key: str) -> str:
    for pattern, instead in HUB[name].items():
        key = re.sub(pattern, instead, key)
    return key


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe", "lfm2_moe", "granitemoe"])
def test_files_of_transformers_4_and_5_become_each_other_and_both_load(name, tmp_path):
    """One expert after the other (or Granite's linear layers) <-> as in memory: the files that Transformers writes."""
    model, published = zoo.saved(name)
    _, fused = zoo.saved(name, original=False)
    layout = "linear" if name == "granitemoe" else "per_expert"
    fmoe.convert(published, tmp_path / "v5", to="hf", layout="fused", fsync=False)
    fmoe.convert(tmp_path / "v5", tmp_path / "v4", to="hf", layout=layout, fsync=False)
    fmoe.convert(fused, tmp_path / "from v5", to="hf", layout=layout, fsync=False)
    expert = lambda tensors: {n.split("layers.")[-1]: t for n, t in tensors.items() if re.search("experts|_linear", n)}
    same(load(tmp_path / "v4"), load(published))
    same(expert(load(tmp_path / "v5")), expert(load(fused)))
    same(expert(load(tmp_path / "from v5")), expert(load(published)))
    for path in ("v4", "v5"):
        assert torch.equal(output(reloaded(model, tmp_path / path)), output(model))
