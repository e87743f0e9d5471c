"""GGUF files: to and from Hugging Face bit for bit, as the `gguf` package writes and reads them."""

import json
import struct

import pytest
import torch
from gguf_cases import KEEP, parts, saved
from gguf_writer import KEYS, write
from safetensors.torch import load_file

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.containers.gguf import read_file
from fmoe.checkpoint.files.containers.gguf_said import ARCHITECTURES, METADATA, other_model
from fmoe.checkpoint.files.containers.source import open_foreign
from fmoe.systems import SYSTEMS

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["qwen3_moe alike", "mixtral", "deepseek_v3", "gpt_oss", "gpt_oss mxfp4"]


def same(a, b):
    assert a.keys() == b.keys()
    assert all(a[n].dtype == t.dtype and torch.equal(a[n], t) for n, t in b.items())


@pytest.mark.parametrize("name", NAMES)
def test_hf_to_gguf_to_hf_bit_for_bit(tmp_path, name):
    config, hf, theirs = parts(name)
    arch = {"general.architecture": ARCHITECTURES[config["model_type"]]}
    src, like = saved(tmp_path / "hf", config, hf), write(tmp_path / "like.gguf", theirs, keys=arch)
    report = fmoe.convert(src, tmp_path / "there", to="gguf", like=like, **KEEP.get(name, {}))
    assert "-> gguf (GGUF" in report.sides and not report.notes
    assert (tmp_path / "there" / "model.gguf").read_bytes() == like.read_bytes()
    fmoe.convert(like, tmp_path / "back", to="hf", config=src)
    same(load_file(tmp_path / "back" / "model.safetensors"), hf)
    assert not (tmp_path / "back" / "like.gguf").exists()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((src / "config.json").read_text())
    assert fmoe.verify(tmp_path / "there").tensors == len(theirs)
    assert fmoe.inspect(tmp_path / "there")["format"] == "gguf"


@pytest.mark.parametrize("name", NAMES)
def test_as_the_gguf_package_writes_and_reads_it(tmp_path, name):
    gguf = pytest.importorskip("gguf")
    config, hf, theirs = parts(name)
    kinds = {torch.uint8: gguf.GGMLQuantizationType.MXFP4, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
    writer = gguf.GGUFWriter(str(tmp_path / "like.gguf"), "any")
    writer.add_file_type(0)
    writer.add_token_list(["a", "b"])
    for n, t in theirs.items():
        raw = t.view(torch.uint8) if t.dtype == torch.bfloat16 else t
        writer.add_tensor(n, raw.numpy(), raw_dtype=kinds.get(t.dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    src = saved(tmp_path / "hf", config, hf)
    fmoe.convert(tmp_path / "like.gguf", tmp_path / "back", to="hf", from_="gguf", config=config)
    same(load_file(tmp_path / "back" / "model.safetensors"), hf)
    fmoe.convert(src, tmp_path / "there", to="gguf", like=tmp_path / "like.gguf", **KEEP.get(name, {}))
    reader = gguf.GGUFReader(str(tmp_path / "there" / "model.gguf"))
    found = {t.name: t for t in reader.tensors}
    assert found.keys() == theirs.keys() and reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    for n, t in theirs.items():
        assert found[n].data.tobytes() == t.view(torch.uint8).numpy().tobytes(), n
        assert found[n].tensor_type == kinds.get(t.dtype, gguf.GGMLQuantizationType.F32)


def test_types_are_as_llama_cpp_has_them():
    gguf = pytest.importorskip("gguf")
    from fmoe.checkpoint.files.containers.gguf import TYPES

    theirs = {int(t): (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert {i: tuple(kind) for i, kind in TYPES.items()} == theirs


def test_norms_are_f32_where_they_are_there_and_what_is_otherwise_is_told(tmp_path):
    config, hf, theirs = parts("qwen3_moe alike")
    half = {n: t.bfloat16() for n, t in hf.items()}
    src = saved(tmp_path / "hf", config, half)
    like = {n: t if t.ndim == 1 else torch.zeros(t.shape, dtype=torch.float16) for n, t in theirs.items()}
    like["rope_freqs.weight"] = torch.arange(4.0)
    report = fmoe.convert(src, tmp_path / "there", to="gguf", like=write(tmp_path / "like.gguf", like))
    told = " ".join(report.notes)
    assert "own types (BF16), not in those of like.gguf" in told and "rope_freqs.weight" in told
    assert "in F32, as like.gguf has them, no value changed: 'blk.0.attn_k_norm.weight'" in told
    made = read_file(tmp_path / "there" / "model.gguf")
    assert made.tensors["blk.0.attn_norm.weight"].type.name == "F32"
    assert made.tensors["token_embd.weight"].type.name == "BF16" and made.keys["general.file_type"].value == 32
    source = open_foreign(tmp_path / "there", config)
    assert torch.equal(source.read(["rope_freqs.weight"])["rope_freqs.weight"], torch.arange(4.0))
    want = fmoe.adapter("qwen3_moe", config, system="gguf").from_hf(half)
    assert all(torch.equal(source.read([n])[n], t.to(source.specs[n].dtype)) for n, t in want.items())


def test_mxfp4_is_decoded_on_the_way_to_another_system(tmp_path):
    config, hf, theirs = parts("gpt_oss mxfp4")
    fmoe.convert(write(tmp_path / "x.gguf", theirs), tmp_path / "native", to="native", config=config)
    found = load_file(tmp_path / "native" / "model.safetensors")
    same(found, {n: t.contiguous() for n, t in fmoe.adapter("gpt_oss", config).from_hf(hf).items()})
    with pytest.raises(AdapterError, match="codes.*quantized='keep'"):
        fmoe.convert(tmp_path / "x.gguf", tmp_path / "no", to="hf", config=config, quantized="decode")
    plain = {n: v for n, v in config.items() if n != "quantization_config"}
    fmoe.convert(tmp_path / "x.gguf", tmp_path / "hf", to="hf", config=plain)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"


def test_a_model_in_several_files_is_one(tmp_path):
    config, hf, theirs = parts("mixtral")
    (tmp_path / "d").mkdir()
    names = list(theirs)
    split = KEYS | {"split.count": struct.pack("<IH", 2, 2)}
    for i, some in enumerate((names[:9], names[9:])):
        write(tmp_path / "d" / f"x-{i + 1:05d}-of-00002.gguf", {n: theirs[n] for n in some}, split)
    fmoe.convert(tmp_path / "d", tmp_path / "back", to="hf", config=config)
    same(load_file(tmp_path / "back" / "model.safetensors"), hf)
    src = saved(tmp_path / "hf", config, hf)
    fmoe.convert(src, tmp_path / "one", to="gguf", like=tmp_path / "d" / "x-00001-of-00002.gguf")
    assert "split.count" not in read_file(tmp_path / "one" / "model.gguf").keys
    (tmp_path / "d" / "x-00002-of-00002.gguf").rename(tmp_path / "d" / "y.gguf")
    with pytest.raises(AdapterError, match="x-00002-of-00002.gguf is not there"):
        open_foreign(tmp_path / "d", config)
    (tmp_path / "d" / "x-00001-of-00002.gguf").unlink()
    write(tmp_path / "d" / "z.gguf", theirs)
    with pytest.raises(AdapterError, match="several GGUF models: 'y.gguf' and 'z.gguf'"):
        open_foreign(tmp_path / "d", config)


ARCH = {"qwen3_moe alike": "qwen3moe", "mixtral": "llama", "deepseek_v3": "deepseek2", "gpt_oss": "gpt-oss"}
OTHER = {
    "block_count": 77, "embedding_length": 9, "head_count": 9, "layer_norm_rms_eps": 0.25, "rope_freq_base": 12345.0,
    "expert_count": 99, "expert_used_count": 7, "expert_weights_scale": 9.0,
}  # fmt: skip


def described(path, arch, theirs, said):
    """The tensors in a file, as the gguf package writes it, with what llama.cpp's converter says of a config."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), arch)
    for name, value in said.items():
        getattr(writer, f"add_{name}")(value)
    for n, t in theirs.items():
        kind = gguf.GGMLQuantizationType.BF16 if t.dtype == torch.bfloat16 else None
        writer.add_tensor(n, (t.view(torch.uint8) if kind else t).numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ARCH)
def test_metadata_that_are_another_models_are_named(tmp_path, name):
    """The rope base of a sibling of the same sizes, above all: llama.cpp would compute with it, and say nothing."""
    config, hf, theirs = parts(name)
    moe = fmoe.adapter(config["model_type"], config).moe_config
    rope = (config.get("rope_parameters") or config).get("rope_theta", 5.0)
    unsaid = {"layer_norm_rms_eps": "rms_norm_eps" not in config, "rope_freq_base": rope == 5.0}
    right = {
        "block_count": config["num_hidden_layers"], "embedding_length": config["hidden_size"],
        "head_count": config["num_attention_heads"], "layer_norm_rms_eps": config.get("rms_norm_eps", 1e-5),
        "rope_freq_base": rope, "expert_count": moe.n_routed_experts,
        "expert_used_count": moe.n_activated_experts, "expert_weights_scale": moe.route_scale,
        "expert_weights_norm": True if name != "deepseek_v3" else moe.norm_topk_prob,
    }  # fmt: skip
    src = saved(tmp_path / "hf", config, hf)
    both = {
        "to": lambda file, dst: fmoe.convert(src, dst, "gguf", like=file),
        "from": lambda file, dst: fmoe.convert(file, dst, "hf", config=src),
    }
    for field in [None, *(f for f in OTHER if not unsaid.get(f))]:
        file = described(
            tmp_path / f"{field}.gguf", ARCH[name], theirs, right | ({field: OTHER[field]} if field else {})
        )
        for way, convert in both.items():
            told = [n for n in convert(file, tmp_path / f"{field} {way}").notes if "is not as the config" in n]
            assert len(told) == (field is not None), (field, way, told)
            assert not field or f"{OTHER[field]}, expected {right[field]}"[:9] in told[0] and file.name in told[0]


def test_every_table_knows_what_llama_cpp_computes_its_family_as(tmp_path):
    assert ARCHITECTURES.keys() >= SYSTEMS["gguf"].tables.keys()
    for name, arch in ARCH.items():
        config, _, theirs = parts(name)
        assert ARCHITECTURES[config["model_type"]] == arch
        for other in {*ARCH.values()} - {arch}:
            file = read_file(write(tmp_path / "x.gguf", theirs, keys={"general.architecture": other}))
            assert f"general.architecture {other!r}, expected {arch!r}" in other_model(file, config)[0]


@pytest.mark.parametrize("odd", [[1, 2], {"a": 1}, 10**400, "x", float("inf"), float("nan"), None, True, -1], ids=repr)
def test_a_config_of_any_values_is_compared_with_metadata(odd, tmp_path):
    config, _, theirs = parts("qwen3_moe alike")
    said = {f"qwen3moe.{key}": value for key in METADATA for value in [3]}
    file = read_file(write(tmp_path / "x.gguf", theirs, keys={"general.architecture": "qwen3moe"} | said))
    for field in (*config, "num_nextn_predict_layers", "rope_theta", "rope_parameters", "kv_lora_rank"):
        if field != "model_type":
            assert len(other_model(file, config | {field: odd})) == 1
