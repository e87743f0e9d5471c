"""GGUF files that lie, are cut short, or are of another model; and the commands that take one by its name."""

import struct

import pytest
import torch
from command import runner
from gguf_cases import parts, saved
from gguf_writer import key, write

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.containers.gguf import read_file

pytestmark = pytest.mark.filterwarnings("ignore")


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
