"""Weight sync: a rank's experts reach the engine's names as the whole model's would, without a gather."""

import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from systems_zoo import model

import fmoe
from fmoe.sync import stream

pytestmark = pytest.mark.filterwarnings("ignore")


def _rank(rank, path, config, native):
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    mine = range(4 * rank, 4 * rank + 4)
    held = {n: t[mine.start : mine.stop] if ".experts." in n else t for n, t in native.items()}
    trainer, engine = fmoe.adapter("qwen3_moe", config), fmoe.adapter("qwen3_moe", config, system="vllm")
    made = dict(stream(trainer, engine, held, held=mine))
    with open(f"{path}/{rank}.pkl", "wb") as file:
        pickle.dump(made, file)
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_sync_their_own_experts(tmp_path):
    config, hf = model("qwen3_moe alike")
    native = fmoe.adapter("qwen3_moe", config).from_hf(hf)
    whole = fmoe.adapter("qwen3_moe", config, system="vllm").from_hf(hf)
    mp.spawn(_rank, (str(tmp_path), config, native), nprocs=2)
    for rank in range(2):
        made = pickle.loads((tmp_path / f"{rank}.pkl").read_bytes())
        assert made.keys() == whole.keys()
        for name, tensor in made.items():
            part = whole[name][4 * rank : 4 * rank + 4] if ".experts." in name else whole[name]
            assert torch.equal(tensor, part), name


def test_from_megatron_lazily_and_cut_along_the_experts_width():
    config, hf = model("qwen3_moe alike")
    trainer = fmoe.adapter("qwen3_moe", config, system="megatron")
    engine = fmoe.adapter("qwen3_moe", config, system="vllm")
    params, whole = trainer.from_hf(hf), engine.from_hf(hf)
    made = dict(stream(trainer, engine, params))
    assert made.keys() == whole.keys() and all(torch.equal(made[n], whole[n]) for n in made)
    first = next(stream(trainer, engine, params))
    assert first[0] in whole
