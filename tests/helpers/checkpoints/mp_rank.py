"""Megatron's legacy directories, made of a model's parameters by name: cut over tensor, pipeline and expert ranks."""

import argparse
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS = "word_embeddings|output_layer|linear_qkv|linear_q_proj|linear_q_up|linear_kv_up|softmax_offset"


def part(name: str, tensor: Tensor, t: int, ranks: int) -> Tensor:
    """What tensor rank t holds of a parameter: written here by hand, and not by the rules that join it."""
    if re.search(rf"({ROWS}).*(weight|bias)|softmax_offset", name) and "layer_norm" not in name:
        return tensor.chunk(ranks, 0)[t].clone(memory_format=torch.contiguous_format)
    if "linear_fc1" in name and "layer_norm" not in name:
        return torch.cat([half.chunk(ranks, 0)[t] for half in tensor.chunk(2, 0)])
    if re.search(r"(linear_proj|linear_fc2)\.weight", name):
        return tensor.chunk(ranks, 1)[t].clone(memory_format=torch.contiguous_format)
    return tensor.clone(memory_format=torch.contiguous_format)


def split(tensors: Mapping[str, Tensor], layers: int, tp: int, pp: int, ep: int, vp: int = 1) -> dict[str, list[dict]]:
    """folder -> the model of each virtual stage: layers and experts are numbered from 0 on every rank."""
    experts = 1 + max(
        int(m[1]) for n in tensors if (m := re.search(r"experts\.(?:linear_fc1.weight|local_experts\.)(\d+)", n))
    )
    per, mine = -(-layers // (pp * vp)), experts // ep
    made: dict[str, list[dict]] = {}
    for t in range(tp):
        for p in range(pp):
            for e in range(ep):
                folder = f"mp_rank_{t:02}" + f"_{p:03}" * (pp > 1) + f"_{e:03}" * (ep > 1)
                made[folder] = [OrderedDict() for _ in range(vp)]
                for name, tensor in tensors.items():
                    layer = re.match(r"decoder\.layers\.(\d+)", name)
                    stage = int(layer[1]) // per if layer else 0 if "embedding" in name else pp * vp - 1
                    if stage % pp != p:
                        continue
                    name = (
                        name.replace(f"layers.{layer[1]}.", f"layers.{int(layer[1]) - stage * per}.", 1)
                        if layer
                        else name
                    )
                    if own := re.search(
                        r"(?<=local_experts\.)\d+|(?<=\.experts\.linear_fc[12]\.weight)\d+|(?<=\.experts\.linear_fc[12]\.bias)\d+",
                        name,
                    ):
                        if int(own[0]) // mine != e:
                            continue
                        name = name[: own.start()] + str(int(own[0]) - e * mine) + name[own.end() :]
                    made[folder][stage // pp][name] = part(name, tensor, t, tp)
    return made


def write(path: Path, ranks: Mapping[str, list[dict]], **more: Any) -> Path:
    """As Megatron saves it: arguments, random numbers and an optimizer's state in the same pickle."""
    import numpy as np

    for folder, chunks in ranks.items():
        (path / "iter_0000010" / folder).mkdir(parents=True)
        models = {"model": chunks[0]} if len(chunks) == 1 else {f"model{v}": c for v, c in enumerate(chunks)}
        state = {"args": argparse.Namespace(tensor_model_parallel_size=2, params_dtype=torch.bfloat16), "iteration": 10}
        state |= {"checkpoint_version": 3.0, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
        state |= {"rng_state": [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}]}
        for chunk in chunks:
            chunk["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
        torch.save(state | models | more, path / "iter_0000010" / folder / "model_optim_rng.pt")
    (path / "latest_checkpointed_iteration.txt").write_text("10")
    return path
