"""What of a model that was there is replaced: all that is its own, in folders too, and nothing that is mine."""

import json
import shutil
from pathlib import Path

import pytest
from command import demo
from directories import files
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils import CHAT_TEMPLATE_DIR

import fmoe


@pytest.fixture
def source(tmp_path) -> Path:
    return Path(shutil.copytree(demo() / "hf", tmp_path / "source"))


OLD = [
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.txt",
]
OLD += ["modeling_old.py", "configuration_old.py", "mycode.py", "pytorch_model.bin", "pytorch_model.bin.index.json"]
OLD += ["adapter_config.json", "adapter_model.safetensors", "mtp.safetensors", "vocab.json"]
OLD += [
    "merges.txt",
    "vocab.txt",
    "additional_chat_templates/a.jinja",
    "original/consolidated.00.pth",
    "generation_config.json",
]
OLD += ["custom_generate/generate.py", "custom_generate/requirements.txt", "chat_templates/tool_use.jinja"]
OLD += ["qformer_tokenizer/tokenizer.json", "tokenizer_2/vocab.json", "tokenizer/special_tokens_map.json"]
OLD += ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "configuration.json"]
OLD += ["1_Pooling/config.json", "2_Dense/model.safetensors", "rotary.py", "layers/norm.py", "layers/more/deep.py"]
IMPORTS = {"modeling_old.py": "import torch\nfrom .rotary import R\n", "rotary.py": "from .layers.norm import N\n"}
IMPORTS |= {"layers/norm.py": "import .more.deep\nfrom ..train import T\nfrom .gone import G\nfrom . import x\n"}
MINE = [
    "notes.txt",
    "train.py",
    "tokenizers/a.json",
    "1_pooling/b",
    "layers/mine.py",
    "checkpoint-5/config.json",
    "checkpoint-5/model.safetensors",
    "eval/results.json",
]


def test_force_leaves_nothing_of_the_former_model_and_all_that_is_mine(source, tmp_path):
    dst = tmp_path / "dst"
    fmoe.convert(source, dst, max_shard_size=1)
    config = json.loads((dst / "config.json").read_text())
    (dst / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "mycode.Model"}}))
    for name in (*OLD, *MINE):
        (dst / name).parent.mkdir(parents=True, exist_ok=True)
        (dst / name).write_text(IMPORTS.get(name, "old"))
    report = fmoe.convert(source, dst, force=True)
    fmoe.convert(source, tmp_path / "new")
    assert files(dst) == files(tmp_path / "new") | dict.fromkeys(MINE, b"old")
    assert not (dst / "original").exists()
    notes = " ".join(report.notes)
    assert (
        all(repr(n) in notes for n in OLD if n not in files(dst)) and "'notes.txt'" in notes and "'train.py'" in notes
    )


def test_force_leaves_nothing_that_transformers_wrote_of_a_tokenizer_and_its_templates(source, tmp_path):
    templates = {"default": "a{{ messages }}", "tool_use": "b{{ messages }}", "rag": "c"}
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=templates, unk_token="a")
    fmoe.convert(source, dst := tmp_path / "dst", fsync=False)
    for folder in ("", "qformer_tokenizer"):  # as a processor writes a further one
        tokenizer.save_pretrained(dst / folder)
    assert {"tool_use.jinja", "rag.jinja"} <= {p.name for p in (dst / CHAT_TEMPLATE_DIR).iterdir()}
    fmoe.convert(source, dst, force=True, fsync=False)
    fmoe.convert(source, tmp_path / "new", fsync=False)
    assert files(dst) == files(tmp_path / "new") and not [p for p in dst.iterdir() if p.is_dir()]


def test_saving_over_another_models_directory_names_the_folders_that_stay(source, tmp_path):
    config, params = json.loads((source / "config.json").read_text()), fmoe.load(source)
    adapter = fmoe.adapter(config["model_type"], config | {"vocab_size": 5})
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 6}))
    for folder in ("custom_generate", "chat_templates", "additional_chat_templates"):
        (source / folder).mkdir()
        (source / folder / "x").write_text("old")
    for name in ("pytorch_model.bin", "tokenizer.json"):
        (source / name).write_text("old")
    (stays,) = (n for n in fmoe.save(params, source, adapter, force=True, fsync=False).notes if "left as it was" in n)
    assert all(f"'{folder}'" in stays for folder in ("custom_generate", "chat_templates", "additional_chat_templates"))
    assert "tokenizer.json" in files(source) and "pytorch_model.bin" not in files(source)


def test_saving_over_a_models_own_directory_keeps_its_tokenizer_and_no_other_weights(source, tmp_path):
    kept = ["tokenizer.json", "chat_template.jinja", "modeling_x.py", "notes.txt", "optimizer.pt"]
    gone = ["pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.safetensors"]
    params, adapter = fmoe.load(source), fmoe.adapter(source)
    for name in (*kept, *gone):
        (source / name).write_text("old")
    fmoe.save(params, source, adapter, force=True)
    there = files(source)
    assert all(there[n] == b"old" for n in kept) and not set(gone) & set(there)
