"""What --checksums writes beside a Hugging Face checkpoint is what verify holds its files against."""

import subprocess

import hf
import pytest

import fmoe
from fmoe.types import AdapterError

SUMS = "fmoe.sha256"
WAYS = {
    "back": {},
    "other layout": dict(layout="fused"),
    "codes": dict(quantize="fp8"),
    "other family": dict(to="mixtral", lossy=True),
}


def made(tmp_path, way):
    name, how = ("qwen3_5_moe", {}) if way == "other layout" else ("qwen3_moe", dict(mlp_only_layers=[]))
    hf.write(name, tmp_path / "hf", **how)
    (tmp_path / "hf" / "below").mkdir()
    (tmp_path / "hf" / "below" / "notes.txt").write_text("notes")
    source = tmp_path / "hf"
    if way == "back":
        fmoe.convert(source, source := tmp_path / "native", checksums=True)
    return fmoe.convert(source, tmp_path / "made", **dict(to="hf", checksums=True) | WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_a_bit_that_flipped_is_told(tmp_path, way):
    report = made(tmp_path, way)
    there = tmp_path / "made"
    files = {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()} - {SUMS}
    assert {str(there / n) for n in files} <= report.checksums.keys()
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=there, check=True)
    assert {str(there / n) for n in files} == fmoe.verify(there).checksums.keys()
    for name in sorted(files):
        data = (there / name).read_bytes()
        (there / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(AdapterError, match=name):
            fmoe.verify(there)
        (there / name).write_bytes(data)
    assert fmoe.verify(there).notes == ()


def test_digests_of_what_was_there_before_do_not_stay(tmp_path):
    made(tmp_path, "codes")
    there, native = tmp_path / "made", fmoe.load(tmp_path / "hf")
    fmoe.convert(there, tmp_path / "native")
    assert not (tmp_path / "native" / SUMS).exists()
    fmoe.save({n: t.clone() for n, t in native.items()}, there, fmoe.adapter(tmp_path / "hf"), force=True)
    assert not (there / SUMS).exists() and fmoe.verify(there)
    fmoe.convert(tmp_path / "hf", there, "hf", layout="per_expert", checksums=True, force=True)
    assert (there / SUMS).exists() and fmoe.verify(there).notes == ()
    fmoe.convert(tmp_path / "hf", there, "hf", layout="per_expert", force=True)
    assert not (there / SUMS).exists() and fmoe.verify(there)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\rb", "ä", "below/a b"])
def test_any_name_of_a_file_comes_back_from_the_list(tmp_path, name):
    from fmoe.checkpoint.stream.digests import kept_sums, sums_text

    (tmp_path / SUMS).write_bytes(sums_text({name: "0" * 64, "x": "1" * 64}))
    assert kept_sums(tmp_path) == {name: "0" * 64, "x": "1" * 64}


@pytest.mark.parametrize("line", ["", "0" * 64, "0" * 64 + "  ../x", "0" * 64 + "  /x", "g" * 64 + "  x", "x"])
def test_a_line_that_is_no_digest_is_refused_by_name(tmp_path, line):
    made(tmp_path, "codes")
    (tmp_path / "made" / SUMS).write_text(f"{'0' * 64}  config.json\n{line}\n")
    with pytest.raises(AdapterError, match="expected a sha256 and a file's name"):
        fmoe.verify(tmp_path / "made")


def test_a_name_too_long_for_a_file_is_no_such_file(tmp_path):
    made(tmp_path, "codes")
    (tmp_path / "made" / SUMS).write_text(f"{'0' * 64}  {'x' * 400}\n")
    with pytest.raises(AdapterError, match="no such file"):
        fmoe.verify(tmp_path / "made")


@pytest.mark.parametrize("to", ["native", "torchtitan", "mlx", "megatron_dist"])
def test_without_digests_no_more_is_said_than_is_known(tmp_path, to):
    hf.write("qwen3_moe", tmp_path / "hf")
    fmoe.convert(tmp_path / "hf", tmp_path / "there", to)
    (note,) = [n for n in fmoe.verify(tmp_path / "there").notes if "is not known" in n]
    assert ("fmoe.json has no digests" if to == "native" else f"there is no {SUMS}") in note and "--checksums" in note
