"""What one process iterates, in the order in which it does; with RANK set, broadcast in step to another process.

python orders.py STORE        prints {what: names in order}, as JSON
"""

import json
import os
import sys

import hf_synthetic as synthetic
import torch
import torch.distributed as dist

import fmoe
from fmoe import keep, rename, rule

QWEN = dict(num_experts=3, num_experts_per_tok=2, hidden_size=4, moe_intermediate_size=3)
EXPERTS = {
    f"model.layers.{l}.mlp.experts.{e}.{p}_proj.weight": torch.randn((4, 3) if p == "down" else (3, 4))
    for l in (10, 2, 0)
    for e in (2, 0, 1)
    for p in ("up", "down", "gate")
}
OTHERS = {f"model.layers.{l}.self_attn.{p}_proj.weight": torch.randn(4, 4) for l in (2, 10, 0) for p in "vkq"}
PLAIN = EXPERTS | OTHERS | {"lm_head.weight": torch.randn(4, 4), "model.norm.weight": torch.randn(4)}
QKV = rule("{pre}self_attn.{p=q|k|v}_proj.weight [p d]", "{pre}self_attn.qkv.weight [(q|k|v) d]", q=4, k=4)
FAMILY = fmoe.adapter("qwen3_moe", QWEN)


def quantised() -> tuple[fmoe.Adapter, dict[str, torch.Tensor]]:
    config, hf = synthetic.deepseek_v3_fp8()
    return fmoe.adapter("deepseek_v3", config), hf


CASES = {
    "a family": lambda: (FAMILY, PLAIN),
    "a family, then a rule and a rename": lambda: (
        FAMILY >> (QKV | keep("{rest}")) >> rename("model.", "policy."),
        PLAIN,
    ),
    "side by side": lambda: ((FAMILY >> rename("model.", "policy.")) | keep("lm_head.{rest}"), PLAIN),
    "quantised": quantised,
}
"""What is iterated: an adapter and tensors."""


def orders(adapter: fmoe.Adapter, hf: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    native = adapter.from_hf(hf)
    back = adapter.inverse.plan(native)
    half = adapter.plan(hf, e=range(1, 3))
    return {
        "from_hf": list(native),
        "to_hf": list(adapter.to_hf(native)),
        "iter_hf": [name for name, _ in adapter.iter_hf(native)],
        "targets": list(back.targets),
        "sources": list(back.sources),
        "units": [f"{sources} {targets}" for sources, targets in back.units()],
        "copies": [f"{c.source} {c.target}" for c in adapter.plan(hf).copies],
        "a range": [f"{sources} {targets}" for sources, targets in half.units()],
        "of a range": list(adapter.from_hf(hf, e=range(1, 3))),
    }


def broadcast(store: str) -> int:
    """How many of what rank 1 received in the order of iter_hf is not what rank 0 sent under that name."""
    where = dict(init_method=f"file://{store}", rank=int(os.environ["RANK"]), world_size=2)
    dist.init_process_group("gloo", **where)
    torch.manual_seed(0)
    hf = {name: torch.randn_like(tensor) for name, tensor in PLAIN.items()}
    adapter, _ = CASES["a family, then a rule and a rename"]()
    native = adapter.from_hf(hf, copy=True)
    mine = native if dist.get_rank() == 0 else {n: torch.zeros_like(native[n]) for n in reversed(native)}
    wrong = 0
    for name, tensor in adapter.iter_hf(mine, contiguous=True):
        dist.broadcast(tensor, src=0)
        wrong += not torch.equal(tensor, hf[name])
    dist.destroy_process_group()
    return wrong


if __name__ == "__main__":
    torch.manual_seed(0)
    wrong = broadcast(sys.argv[1])
    print(json.dumps({what: orders(*case()) for what, case in CASES.items()} | {"wrong": wrong}))
