"""GGUF files: to and from Hugging Face bit for bit, as the `gguf` package writes and reads them; and files that lie."""

import json
import struct
from functools import cache

import pytest
import torch
from command import runner
from gguf_writer import KEYS, key, write
from safetensors.torch import load_file, save_file
from systems_zoo import model

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.containers.gguf import read_file
from fmoe.checkpoint.files.containers.source import open_foreign

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["qwen3_moe alike", "mixtral", "deepseek_v3", "gpt_oss", "gpt_oss mxfp4"]
KEEP = {"gpt_oss mxfp4": {"quantized": "keep"}}


def mxfp4():
    """gpt-oss with its experts, wider than in the zoo, as random blocks and scales."""
    config, hf = model("gpt_oss")
    drawn = torch.Generator().manual_seed(0)
    byte = lambda *shape: torch.randint(100, 140, shape, generator=drawn, dtype=torch.uint8)
    made = {n: t for n, t in hf.items() if not n.endswith(("gate_up_proj", "down_proj", "gate_up_proj_bias"))}
    for l in range(config["num_hidden_layers"]):
        at = f"model.layers.{l}.mlp.experts."
        made |= {at + "gate_up_proj_blocks": byte(8, 128, 1, 16), at + "gate_up_proj_scales": byte(8, 128, 1)}
        made |= {at + "down_proj_blocks": byte(8, 32, 2, 16), at + "down_proj_scales": byte(8, 32, 2)}
        made |= {at + "gate_up_proj_bias": torch.randn(8, 128, generator=drawn)}
    return config | {"intermediate_size": 64, "quantization_config": {"quant_method": "mxfp4"}}, made


@cache
def parts(name):
    """config, Hugging Face's tensors, and llama.cpp's."""
    config, hf = mxfp4() if name in KEEP else model(name)
    theirs = fmoe.adapter(config["model_type"], config, system="gguf", **KEEP.get(name, {})).from_hf(hf)
    return config, hf, {n: t.contiguous() for n, t in theirs.items()}


def saved(path, config, tensors):
    path.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, default=str))
    return path


def same(a, b):
    assert a.keys() == b.keys()
    assert all(a[n].dtype == t.dtype and torch.equal(a[n], t) for n, t in b.items())


@pytest.mark.parametrize("name", NAMES)
def test_hf_to_gguf_to_hf_bit_for_bit(tmp_path, name):
    config, hf, theirs = parts(name)
    src, like = saved(tmp_path / "hf", config, hf), write(tmp_path / "like.gguf", theirs)
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
    with pytest.raises(AdapterError, match="MXFP4.*quantized='keep'"):
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


W = {"a": torch.arange(64.0).view(2, 32), "b": torch.ones(2, 17, dtype=torch.uint8)}
HOSTILE = {
    "other magic": (dict(magic=b"GGUX"), "begins with b'GGUX'"),
    "version 1": (dict(version=1), "version 1, of before 2023.*expected 2 or 3"),
    "big-endian": (dict(version=3 << 24), "other byte order"),
    "a key twice": (dict(keys={"x": b"\4\0\0\0\1\0\0\0" + key("x", 2)}), "'x' is there twice|'x'"),
    "no UTF-8": (dict(keys={"x": struct.pack("<IQ", 8, 1) + b"\xff"}), "'x' is no UTF-8"),
    "a list of lists": (dict(keys={"x": struct.pack("<IIQ", 9, 9, 1)}), "'x' is a list of type 9"),
    "a type that is none": (dict(keys={"x": struct.pack("<I", 77)}), "'x' is of type 77"),
    "a text without end": (dict(keys={"x": struct.pack("<IQ", 8, 2**60)}), "'x' would end at .*cut short"),
    "a list without end": (dict(keys={"x": struct.pack("<IIQ", 9, 12, 2**62)}), "'x' would end at .*cut short"),
    "alignment 0": (dict(keys={"general.alignment": 0}), "general.alignment 0, expected a power of two"),
    "alignment 24": (dict(keys={"general.alignment": 24}), "general.alignment 24, expected a power of two"),
    "another alignment": (dict(keys={"general.alignment": 256}), "'b' begins at 256 of the data|'a' ends at|'b'"),
    "a tensor twice": (dict(twice="a"), "'a' is there twice"),
    "overlap": (dict(b={"offset": 32}), "'b' begins at 32 of the data, inside 'a', expected 256"),
    "a hole": (dict(b={"offset": 512}), "'b' begins at 512 of the data, a hole after 'a', expected 256"),
    "unaligned": (dict(b={"offset": 257}), "'b' begins at 257 of the data, no multiple of 32"),
    "beyond the end": (dict(b={"shape": (4096, 32)}), "'b' ends at .*cut short"),
    "too large": (dict(a={"shape": (2**40, 2**40)}), r"'a' cannot be F32 \[1099511627776, 1099511627776\]"),
    "five dimensions": (dict(a={"shape": (1, 1, 1, 2, 32)}), "'a' has 5 dimensions, expected at most 4"),
    "rows of no whole blocks": (dict(b={"shape": (2, 33)}), r"'b' cannot be MXFP4 \[2, 33\]"),
    "a type from nowhere": (dict(a={"code": 99}), "'a' is of type 99, which fmoe does not know"),
    "another type": (dict(a={"code": 1}), "'b' begins at 256 of the data, a hole after 'a', expected 128"),
    "shorter than it is": (dict(b={"shape": (0, 32)}), "its tensors end at .*no tensor has the rest"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_lies_is_refused_by_name_and_nothing_written(tmp_path, what):
    how, match = HOSTILE[what]
    path = write(tmp_path / "x.gguf", W, **how)
    with pytest.raises(AdapterError, match=match):
        read_file(path)
    with pytest.raises(AdapterError):
        fmoe.convert(path, tmp_path / "out", to="hf", from_="gguf", config=parts("mixtral")[0])
    assert not (tmp_path / "out").exists()


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    data = write(tmp_path / "x.gguf", W).read_bytes()
    read_file(tmp_path / "x.gguf")
    end = len(data) - 30  # the padding behind the last tensor may be missing
    for n in (*range(0, end, 7), end - 1):
        (tmp_path / "x.gguf").write_bytes(data[:n])
        with pytest.raises(AdapterError, match="cut short|no GGUF file"):
            read_file(tmp_path / "x.gguf")


def test_a_flipped_bit_of_the_header_never_ends_otherwise_than_in_an_error_or_the_same_specs(tmp_path):
    data = write(tmp_path / "x.gguf", W).read_bytes()
    head = data.index(bytes(W["a"].flatten().view(torch.uint8).numpy())[:32])
    for bit in range(0, 8 * head, 3):
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x.gguf").write_bytes(wrong)
        try:
            found = read_file(tmp_path / "x.gguf")
        except AdapterError:
            continue
        ends = [(i.at, i.at + i.nbytes) for i in found.tensors.values()]
        assert all(0 < a <= b <= len(data) for a, b in ends) and sorted(ends) == ends


def test_a_quantised_file_is_refused_by_name(tmp_path):
    config = parts("mixtral")[0]
    wide = {"blk.0.attn_q.weight": torch.zeros(2, 34, dtype=torch.int8)}
    path = write(tmp_path / "x.gguf", wide, **{"blk.0.attn_q.weight": {"code": 8, "shape": (2, 32)}})
    with pytest.raises(AdapterError, match="'blk.0.attn_q.weight': Q8_0, which fmoe does not decode"):
        fmoe.convert(path, tmp_path / "out", to="hf", config=config)
    assert not (tmp_path / "out").exists()


def test_a_target_needs_a_file_of_the_same_model(tmp_path):
    config, hf, theirs = parts("mixtral")
    src = saved(tmp_path / "hf", config, hf)
    with pytest.raises(AdapterError, match="needs like=FILE.gguf"):
        fmoe.convert(src, tmp_path / "out", to="gguf")
    with pytest.raises(AdapterError, match="like=.*expected to='gguf'"):
        fmoe.convert(src, tmp_path / "out", to="mlx", like="x.gguf")
    with pytest.raises(AdapterError, match="like=.*expected to='gguf'"):
        fmoe.convert(src, tmp_path / "out", like="x.gguf")
    with pytest.raises(AdapterError, match="name the directory to write"):
        fmoe.convert(src, tmp_path / "out.gguf", to="gguf", like=src)
    with pytest.raises(AdapterError, match="nowhere.gguf' is not there"):
        fmoe.convert(src, tmp_path / "out", to="gguf", like=tmp_path / "nowhere.gguf")
    for edit, match in (
        (lambda t: t.pop("blk.1.attn_q.weight"), "has no 'blk.1.attn_q.weight'"),
        (
            lambda t: t.update({"blk.9.attn_q.weight": torch.ones(2)}),
            "'blk.9.attn_q.weight', and the source gives none",
        ),
        (lambda t: t.update({"output_norm.weight": torch.ones(9)}), r"'output_norm.weight' is \[32\], and in .* \[9\]"),
    ):
        other = dict(theirs)
        edit(other)
        with pytest.raises(AdapterError, match=match):
            fmoe.convert(src, tmp_path / "out", to="gguf", like=write(tmp_path / "like.gguf", other))
    assert not (tmp_path / "out").exists()


def test_a_file_without_config_beside_it_says_so(tmp_path):
    path = write(tmp_path / "x.gguf", parts("mixtral")[2])
    with pytest.raises(AdapterError, match="--config"):
        fmoe.convert(path, tmp_path / "out", to="hf")


def test_the_commands_take_a_file_by_its_name(tmp_path, monkeypatch, capsys):
    fmoe_ = runner(monkeypatch, capsys)
    config, hf, theirs = parts("qwen3_moe alike")
    src = saved(tmp_path / "hf", config, hf)
    half = {n: t if t.ndim == 1 else t.half() for n, t in theirs.items()}
    path = write(tmp_path / "x.gguf", half)
    for command in ("inspect", "plan", "verify"):
        assert fmoe_(command, path, "--config", src)[0] == 0, command
    code, out, err = fmoe_("convert", path, tmp_path / "back", "--to", "hf", "--config", src)
    assert code == 0 and "gguf (GGUF, 39 tensors" in out and "in F32, as the file has them" in err
    assert fmoe_("convert", src, tmp_path / "there", "--to", "gguf", "--like", path, "--checksums")[0] == 0
    assert (tmp_path / "there" / "fmoe.sha256").exists() and fmoe_("verify", tmp_path / "there")[0] == 0
    with pytest.raises(AdapterError):
        fmoe.convert(tmp_path / "missing.gguf", tmp_path / "no", to="hf", config=src)
