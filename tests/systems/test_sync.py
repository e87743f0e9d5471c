"""Weight sync: a rank's experts reach the engine's names as the whole model's would, without a gather."""

import distributed
import pytest
import torch
import torch.distributed as dist
from systems_zoo import model

import fmoe
from fmoe.sync import stream

pytestmark = pytest.mark.filterwarnings("ignore")


def _rank(config, native):
    mine = range(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    held = {n: t[mine.start : mine.stop] if ".experts." in n else t for n, t in native.items()}
    trainer, engine = fmoe.adapter("qwen3_moe", config), fmoe.adapter("qwen3_moe", config, system="vllm")
    return dict(stream(trainer, engine, held, held=mine))


def test_two_ranks_sync_their_own_experts():
    config, hf = model("qwen3_moe alike")
    native = fmoe.adapter("qwen3_moe", config).from_hf(hf)
    whole = fmoe.adapter("qwen3_moe", config, system="vllm").from_hf(hf)
    for rank, made in enumerate(distributed.run(_rank, 2, config, native)):
        assert made.keys() == whole.keys()
        for name, tensor in made.items():
            part = whole[name][4 * rank : 4 * rank + 4] if ".experts." in name else whole[name]
            assert torch.equal(tensor, part), name


def _cut(config, hf):
    """From each trainer, of experts 2 to 5 this rank's half of their width."""
    half = config["moe_intermediate_size"] // 2
    mine = range(dist.get_rank() * half, dist.get_rank() * half + half)
    engine, made = fmoe.adapter("qwen3_moe", config, system="vllm"), {}
    for system in ("native", "megatron"):
        trainer = fmoe.adapter("qwen3_moe", config, system=system)
        made[system] = dict(stream(trainer, engine, trainer.from_hf(hf), i=mine, e=range(2, 6)))
    return made


def test_two_ranks_sync_their_tensor_parallel_cut():
    config, hf = model("qwen3_moe alike")
    want = fmoe.adapter("qwen3_moe", config, system="vllm").from_hf(hf)
    for rank, made in enumerate(distributed.run(_cut, 2, config, hf)):
        for system, found in made.items():
            assert found.keys() == want.keys()
            for name, tensor in found.items():
                part = want[name][2:6] if ".experts." in name else want[name]
                if "w13" in name:
                    part = torch.cat([gate_or_up.chunk(2, 1)[rank] for gate_or_up in part.chunk(2, 1)], 1)
                elif "w2" in name:
                    part = part.chunk(2, 2)[rank]
                assert torch.equal(tensor, part), (system, name)


def test_from_megatron_lazily_and_cut_along_the_experts_width():
    config, hf = model("qwen3_moe alike")
    trainer = fmoe.adapter("qwen3_moe", config, system="megatron")
    engine = fmoe.adapter("qwen3_moe", config, system="vllm")
    params, whole = trainer.from_hf(hf), engine.from_hf(hf)
    made = dict(stream(trainer, engine, params))
    assert made.keys() == whole.keys() and all(torch.equal(made[n], whole[n]) for n in made)
    first = next(stream(trainer, engine, params))
    assert first[0] in whole


def test_to_hugging_faces_names_native_experts_are_lent():
    config, hf = model("qwen3_moe alike")
    trainer = fmoe.adapter("qwen3_moe", config)
    params = trainer.from_hf(hf)
    held = {t.untyped_storage().data_ptr() for t in params.values()}
    made = dict(stream(trainer, fmoe.Adapter(), params))
    assert made.keys() == hf.keys() and all(torch.equal(made[n], t) for n, t in hf.items())
    assert all(t.untyped_storage().data_ptr() in held for n, t in made.items() if ".experts." in n)
