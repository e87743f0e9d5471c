"""Megatron's legacy directories: joined whatever the cut, read as data alone and only if asked; broken ones refused."""

import json
import os
import pickle
import zipfile

import mp_rank
import pytest
import torch
from system_directories import files, same
from systems_zoo import model

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.containers import pickles

CUTS = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 1, 1), (1, 1, 2, 1), (2, 3, 2, 1), (2, 1, 2, 1), (1, 1, 1, 3)]
CASES = [("qwen3_moe alike", cut) for cut in CUTS]
CASES += [(name, cut) for name in ("deepseek_v3", "gpt_oss") for cut in ((1, 1, 1, 1), (2, 3, 2, 1))]


def there(name, specs="te"):
    config, tensors = model(name)
    made = fmoe.adapter(config["model_type"], config, system="megatron", specs=specs)
    return config, tensors, made.from_hf(tensors)


def directory(path, name, tp, pp, ep, vp=1, specs="te", **more):
    config, tensors, theirs = there(name, specs)
    mp_rank.write(path, mp_rank.split(theirs, config["num_hidden_layers"], tp, pp, ep, vp), **more)
    (path / "config.json").write_text(json.dumps(config, default=str))
    return tensors


@pytest.mark.parametrize("name,cut", CASES, ids=str)
def test_ranks_of_any_cut_are_joined(tmp_path, name, cut):
    tensors = directory(tmp_path / "old", name, *cut)
    report = fmoe.convert(tmp_path / "old", tmp_path / "hf", to="hf", trust_pickle=True, fsync=False)
    same(files(tmp_path / "hf"), tensors)
    assert report.sides.startswith("megatron (mp_rank") and "optimizer" in " ".join(report.notes)


def test_local_specs_go_to_a_third_and_are_verified(tmp_path):
    tensors = directory(tmp_path / "old", "qwen3_moe alike", 2, 1, 2, specs="local")
    fmoe.convert(tmp_path / "old", tmp_path / "titan", to="torchtitan", trust_pickle=True)
    fmoe.convert(tmp_path / "titan", tmp_path / "hf", to="hf")
    same(files(tmp_path / "hf"), tensors)
    config = tmp_path / "old"
    assert fmoe.verify(tmp_path / "old" / "iter_0000010", config=config, trust_pickle=True).family == "qwen3_moe"
    assert fmoe.inspect(tmp_path / "old", trust_pickle=True)["format"] == "megatron"


def test_parts_of_one_buffer_are_read(tmp_path):
    config, tensors, theirs = there("qwen3_moe alike")
    chunks = mp_rank.split(theirs, config["num_hidden_layers"], 1, 1, 1)["mp_rank_00"]
    flat, at = torch.cat([t.flatten() for t in chunks[0].values()]), 0
    for name, tensor in chunks[0].items():
        chunks[0][name] = torch.nn.Parameter(flat[at : at + tensor.numel()].view(tensor.shape))
        at += tensor.numel()
    mp_rank.write(tmp_path / "old", {"mp_rank_00": chunks})
    fmoe.convert(tmp_path / "old", tmp_path / "hf", to="hf", config=config, trust_pickle=True)
    same(files(tmp_path / "hf"), tensors)


def test_without_trust_the_flag_is_named(tmp_path):
    directory(tmp_path / "old", "qwen3_moe alike", 2, 1, 1)
    for refused in (
        lambda: fmoe.convert(tmp_path / "old", tmp_path / "hf", to="hf"),
        lambda: fmoe.inspect(tmp_path / "old"),
        lambda: fmoe.verify(tmp_path / "old"),
    ):
        with pytest.raises(AdapterError, match="trust_pickle=True, or --trust-pickle"):
            refused()
    assert not (tmp_path / "hf").exists()


class Evil:
    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return self.what


HOSTILE_NAMES = [
    (os.system, ("touch ran",), r"(posix|os|nt)\.system: refused"),
    (eval, ("open('ran', 'w')",), r"__builtin__\.eval: refused"),
    (getattr, (os, "system"), r"__builtin__\.getattr: refused"),
    (torch.load, ("x",), r"torch\.serialization\.load: refused"),
]


@pytest.mark.parametrize("function,args,match", HOSTILE_NAMES, ids=lambda x: getattr(x, "__name__", ""))
def test_foreign_names_are_refused_and_nothing_runs(tmp_path, monkeypatch, function, args, match):
    monkeypatch.chdir(tmp_path)
    if function is getattr:
        args = (1, "real")
    directory(tmp_path / "old", "qwen3_moe alike", 1, 1, 1, evil=Evil(function, args))
    with pytest.raises(AdapterError, match=match):
        fmoe.convert(tmp_path / "old", tmp_path / "hf", to="hf", trust_pickle=True)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "hf").exists()


THEIRS = """_codecs.encode argparse.Namespace collections.OrderedDict numpy.dtype numpy.ndarray signal.Signals
numpy._core.multiarray._reconstruct megatron.core.transformer.enums.AttnBackend
megatron.core.transformer.enums.InferenceCudaGraphScope torch.bfloat16 torch._utils._rebuild_tensor_v2"""


@pytest.mark.parametrize("name", THEIRS.split())
def test_every_name_in_what_megatron_lm_saves_is_read(name):
    """Of a model_optim_rng.pt that its own save_checkpoint wrote (bench/peers/with_megatron_lm.py)."""
    module, _, last = name.rpartition(".")
    assert pickles.read(f"c{module}\n{last}\n.".encode(), "a file", tensors=True, training=True) is not None


def _rewritten(file, edit):
    """The file with the bytes of its members changed."""
    with zipfile.ZipFile(file) as old:
        held = {i.filename: old.read(i) for i in old.infolist()}
    edit(held)
    with zipfile.ZipFile(file, "w", getattr(edit, "how", zipfile.ZIP_STORED)) as new:
        for name, data in held.items():
            new.writestr(name, data)


def _deflated(held): ...


_deflated.how = zipfile.ZIP_DEFLATED


def _dotted(held):
    name = next(n for n in held if n.endswith("data.pkl"))
    held[name] = b"\x80\x04\x8c\x08argparse\x8c\x0eos.system.real\x93\x8c\x04true\x85R."


def _member(suffix, change):
    def edit(held):
        for name in [n for n in held if suffix in n]:
            held[name] = change(held[name])

    return edit


BROKEN = {
    "a dotted name": (lambda f: _rewritten(f, _dotted), r"argparse\.os\.system\.real: refused"),
    "cut short": (lambda f: os.truncate(f, f.stat().st_size - 100), "is no zip"),
    "no zip": (lambda f: f.write_bytes(pickle.dumps({"model": {}})), "is no zip"),
    "compressed": (lambda f: _rewritten(f, _deflated), "is compressed"),
    "a storage cut short": (lambda f: _rewritten(f, _member("/data/", lambda d: d[:-4])), "bytes, expected"),
    "of other machines": (lambda f: _rewritten(f, _member("byteorder", lambda d: b"big")), "other byte order"),
    "no pickle": (lambda f: _rewritten(f, _member("data.pkl", lambda d: d[:-9])), "no pickle that can be read"),
    "no model": (lambda f: torch.save({"optimizer": {}}, f), "holds no model"),
    "before the core": (lambda f: torch.save({"model": {"language_model": {}}}, f), "before its Core"),
    "a nested model": (lambda f: torch.save({"model": {"a": {"b": torch.ones(1)}}}, f), "'a' is a dict"),
    "strides": (lambda f: torch.save({"model": {"a": torch.ones(2, 3).T}}, f), "'a' is not contiguous"),
    "gone": (lambda f: f.unlink(), "holds no model_optim_rng.pt"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_lies_is_refused_and_nothing_is_written(tmp_path, what):
    break_, match = BROKEN[what]
    directory(tmp_path / "old", "qwen3_moe alike", 1, 1, 1)
    break_(tmp_path / "old" / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(AdapterError, match=match):
        fmoe.convert(tmp_path / "old", tmp_path / "hf", to="hf", trust_pickle=True)
    assert not (tmp_path / "hf").exists()


def edited(tmp_path, cut, edit):
    config, _, theirs = there("qwen3_moe alike")
    ranks = mp_rank.split(theirs, config["num_hidden_layers"], *cut)
    edit(ranks)
    mp_rank.write(tmp_path / "old", ranks)
    with pytest.raises(AdapterError) as found:
        fmoe.convert(tmp_path / "old", tmp_path / "hf", to="hf", config=config, trust_pickle=True)
    assert not (tmp_path / "hf").exists()
    return str(found.value)


NORM = "decoder.layers.0.pre_mlp_layernorm.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


def test_what_ranks_hold_alike_must_be_alike(tmp_path):
    told = edited(
        tmp_path, (2, 1, 1), lambda r: r["mp_rank_01"][0].update({NORM: torch.zeros_like(r["mp_rank_01"][0][NORM])})
    )
    assert f"'{NORM}' in mp_rank_00" in told and "is another in mp_rank_01" in told


@pytest.mark.parametrize(
    "cut,edit,match",
    [
        ((2, 1, 2), lambda r: r.pop("mp_rank_01_001"), "missing 'mp_rank (1, 0, 1)'"),
        ((1, 1, 2), lambda r: r["mp_rank_00_001"][0][QKV].add_(1), "is another in mp_rank_00_001"),
        ((2, 1, 1), lambda r: r["mp_rank_01"][0].pop(QKV), "linear_qkv"),
        ((2, 1, 1), lambda r: r["mp_rank_01"][0].update({QKV: torch.ones(2, 2)}), "linear_qkv"),
        ((2, 1, 1), lambda r: r["mp_rank_01"][0].update({NORM: torch.ones(3)}), f"'{NORM}' is"),
        (
            (2, 1, 1),
            lambda r: r["mp_rank_01"][0].update({"decoder.other.weight": torch.ones(3)}),
            "decoder.other.weight",
        ),
        ((2, 1, 2), lambda r: r["mp_rank_01_001"][0].update({QKV: r["mp_rank_01_001"][0][QKV].half()}), "linear_qkv"),
        ((1, 3, 1), lambda r: r["mp_rank_00_001"][0].update({"decoder.layers.1.x": torch.ones(1)}), "decoder.layers"),
        ((2, 1, 1), lambda r: r["mp_rank_01"][0].update({"decoder.layers.7.x": torch.ones(1)}), "layers, and another"),
    ],
    ids=["a rank", "a copy", "a part", "a shape", "a copy's shape", "a name", "a dtype", "a layer", "layers"],
)
def test_ranks_that_disagree_are_refused_by_name(tmp_path, cut, edit, match):
    assert match in edited(tmp_path, cut, edit)


EMBED = "embedding.word_embeddings.weight"


@pytest.mark.parametrize("dirty", [False, True])
def test_padding_of_the_vocabulary_is_cut_off_and_must_be_zero(tmp_path, dirty):
    config, tensors = model("qwen3_moe alike")
    theirs = fmoe.adapter("qwen3_moe", config, system="megatron", vocab_multiple=96).from_hf(tensors)
    assert theirs[EMBED].shape[0] == 96 > config["vocab_size"]
    theirs[EMBED][-1] = float(dirty)
    mp_rank.write(tmp_path / "old", mp_rank.split(theirs, config["num_hidden_layers"], 2, 1, 1))
    convert = lambda **how: fmoe.convert(
        tmp_path / "old", tmp_path / "hf", to="hf", config=config, trust_pickle=True, **how
    )
    if dirty:
        with pytest.raises(AdapterError, match="word_embeddings.*not zero"):
            convert()
        assert not (tmp_path / "hf").exists()
    convert(lossy=dirty)
    same(files(tmp_path / "hf"), tensors)


def test_a_copy_of_the_embedding_on_the_last_stage_is_one_if_the_two_are_tied(tmp_path):
    config, tensors = model("qwen3_moe alike")
    config = config | {"tie_word_embeddings": True}
    tensors = {n: t for n, t in tensors.items() if n != "lm_head.weight"}
    theirs = fmoe.adapter("qwen3_moe", config, system="megatron").from_hf(tensors)
    ranks = mp_rank.split(theirs, config["num_hidden_layers"], 2, 3, 1)
    for t in range(2):
        ranks[f"mp_rank_{t:02}_002"][0]["output_layer.weight"] = ranks[f"mp_rank_{t:02}_000"][0][EMBED].clone()
    mp_rank.write(tmp_path / "old", ranks)
    fmoe.convert(tmp_path / "old", tmp_path / "hf", to="hf", config=config, trust_pickle=True)
    same(files(tmp_path / "hf"), tensors)
