"""Files in the making that something else changes before a conversion goes on: with checksums they are made anew."""

from pathlib import Path

import pytest
import torch
from codec_cases import FEW, config, made
from command import demo
from directories import files
from hf import save

import fmoe
from fmoe.checkpoint.staging.journal import lines

WAYS = {
    "stacked": (None, "native", {}),
    "taken apart": ("native", "hf", {}),
    "fused": (None, "hf", dict(layout="fused")),
    "renamed": ("plain", "mixtral", dict(lossy=True)),
    "decoded": ("fp8", "hf", dict(dtype="bfloat16")),
    "decoded natives of codes": ("int4 codes", "hf", dict(dtype="bfloat16")),
    "another system's": (None, "mlx", {}),
}


def source_of(kind: str | None, path: Path) -> Path:
    if kind is None:
        return demo() / "hf"
    if kind == "native":
        fmoe.convert(demo() / "hf", path, fsync=False)
        return path
    if kind == "plain":
        torch.manual_seed(0)
        return save(config("qwen3_moe", 128, 256), FEW["qwen3_moe"](128, 256), path) or path
    case = ("kimi_k25", "int4") if kind == "int4 codes" else ("deepseek_v3", "fp8 blocks")
    save(config(case[0], 128, 256) | {"torch_dtype": "bfloat16"}, made(case)[1], path)
    if kind == "int4 codes":
        fmoe.convert(path, path.with_name("codes"), quantized="keep", fsync=False)
        return path.with_name("codes")
    return path


def stopped(source: Path, dst: Path, to: str, **how) -> int:
    """Begins a conversion and stops it in the middle; how many steps were done."""

    def stop(done, of):
        if done > of * (0.2 if how.get("checksums") else 0.6):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fmoe.convert(source, dst, to, threads=1, fsync=False, progress=stop, max_shard_size=30_000, **how)
    return lines(dst)[-1]["done"]


@pytest.mark.parametrize("way", WAYS)
def test_what_was_changed_since_is_made_anew_and_nothing_else(way, tmp_path):
    kind, to, how = WAYS[way]
    source, how = source_of(kind, tmp_path / "source"), how | dict(checksums=True)
    again = lambda dst: fmoe.convert(source, dst, to, fsync=False, max_shard_size=30_000, **how)
    again(tmp_path / "whole")
    wanted = files(tmp_path / "whole")
    assert stopped(source, tmp_path / "as it was", to, **how)
    kept = again(tmp_path / "as it was")
    assert kept.resumed > 0 and files(tmp_path / "as it was") == wanted
    for name, change in {
        "all of it": lambda data: bytes(255 - b for b in data),
        "a byte at the start": lambda data: bytes([data[0] ^ 1]) + data[1:],
        "zeros": lambda data: bytes(len(data)),
        "every 40th byte": lambda data: bytes(b ^ 1 if i % 40 == 0 else b for i, b in enumerate(data)),
    }.items():
        assert stopped(source, dst := tmp_path / name, to, **how)
        for part in dst.rglob("*.part"):
            part.write_bytes(change(part.read_bytes()))
        report = again(dst)
        assert files(dst) == wanted and report.resumed <= kept.resumed, name
        fmoe.verify(dst) if to in ("native", "hf") else None


def test_without_checksums_what_lies_there_is_trusted(tmp_path):
    dst, source = tmp_path / "dst", demo() / "hf"
    done = stopped(source, dst, "native")
    assert done and not any("sum" in line for line in lines(dst))
    report = fmoe.convert(source, dst, fsync=False, max_shard_size=30_000, checksums=True)
    fmoe.convert(source, tmp_path / "whole", fsync=False, max_shard_size=30_000, checksums=True)
    assert report.resumed > 0 and files(dst) == files(tmp_path / "whole")
