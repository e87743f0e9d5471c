"""Megatron's legacy directories with an expert-tensor-parallel size of 1: experts whole, spread over tensor ranks."""

import re

import mp_rank
import pytest
from system_directories import files, same
from systems_zoo import model

import fmoe
from fmoe import AdapterError

OWN = re.compile(r"\.experts\.")


def spread(theirs, layers, tp, pp, ep):
    """Rank r's file: whole experts of expert rank r % ep, the rest cut as tensor rank r % tp has it."""
    cut = mp_rank.split(theirs, layers, tp, pp, ep)
    whole = mp_rank.split(theirs, layers, 1, pp, ep)
    rank = lambda folder: [int(n) for n in folder.split("_")[2:]]
    there = [f for f in cut if ep == 1 or (rank(f)[-1] - rank(f)[0]) % min(tp, ep) == 0]
    of = lambda folder: whole[re.sub(r"mp_rank_\d\d", "mp_rank_00", folder)]
    return {
        f: [{n: b[n] if OWN.search(n) else t for n, t in a.items()} for a, b in zip(cut[f], of(f), strict=True)]
        for f in there
    }


@pytest.mark.parametrize("name,specs", [("qwen3_moe alike", "te"), ("qwen3_moe alike", "local"), ("gpt_oss", "te")])
@pytest.mark.parametrize("cut", [(2, 1, 2), (2, 3, 4), (2, 1, 1)], ids=str)
def test_experts_spread_over_tensor_ranks_are_joined(tmp_path, name, specs, cut):
    config, tensors = model(name)
    theirs = fmoe.adapter(config["model_type"], config, system="megatron", specs=specs).from_hf(tensors)
    ranks = spread(theirs, config["num_hidden_layers"], *cut)
    assert len(ranks) == cut[1] * max(cut[0], cut[2])
    mp_rank.write(tmp_path / "old", ranks)
    there = dict(config=config, trust_pickle=True)
    fmoe.convert(tmp_path / "old", tmp_path / "hf", to="hf", fsync=False, **there)
    same(files(tmp_path / "hf"), tensors)
    if cut == (2, 3, 4):
        next((tmp_path / "old").glob("*/mp_rank_01_002_003")).rename(tmp_path / "gone")
        with pytest.raises(AdapterError, match=r"missing .*'mp_rank \(1, 2, 3\)'"):
            fmoe.convert(tmp_path / "old", tmp_path / "no", to="hf", **there)
