"""Weights of a trainer under an engine's names and into its memory: fmoe.sync against the loops that people write.

    python bench/sync.py --layers 2 --rounds 5 --json bench/results/sync.json

Qwen3-30B-A3B's layers in bf16. The engine's tensors exist (vLLM's names) and every method fills them. copies, copied:
calls and bytes of torch's copying operators, the last into the engine's memory among them; 1.00 of the model is the
least. memory: the peak of anonymous memory over what trainer and engine hold. Each method has a process of its own,
rounds are interleaved, times are medians.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from convert import _anonymous as anonymous
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fmoe
from fmoe.sync import stream

KIND, E, D, I = "qwen3_moe", 128, 2048, 768
CONFIG: dict[str, Any] = {"model_type": KIND, "num_experts": E, "num_experts_per_tok": 8, "hidden_size": D,
          "moe_intermediate_size": I, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
          "vocab_size": 4096}  # fmt: skip
SHARE = range(16, 32)  # the experts of one rank of eight
COPIES = {"copy_", "clone", "cat", "stack", "_to_copy", "index_select"}
State = dict[str, Tensor]
Loader = Callable[[str, Tensor], None]


def fused(trainer: fmoe.Adapter, params: State) -> Iterator[tuple[str, Tensor]]:
    """to_hf of all, then the engine's tensors made of it."""
    hf = trainer.to_hf(params)
    for l in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{l}."
        x = at + "mlp.experts."
        both = [torch.cat([hf.pop(f"{x}{e}.gate_proj.weight"), hf.pop(f"{x}{e}.up_proj.weight")]) for e in range(E)]
        yield x + "w13_weight", torch.stack(both)
        yield x + "w2_weight", torch.stack([hf.pop(f"{x}{e}.down_proj.weight") for e in range(E)])
        qkv = [hf.pop(f"{at}self_attn.{p}_proj.weight") for p in "qkv"]
        yield at + "self_attn.qkv_proj.weight", torch.cat(qkv)
    yield from hf.items()


def by_hand(trainer: fmoe.Adapter, params: State, engine: State) -> None:
    """to_hf of all, renamed and fused, then copied."""
    for name, tensor in fused(trainer, params):
        engine[name].copy_(tensor)


def one_by_one(trainer: fmoe.Adapter, params: State, engine: State) -> None:
    """to_hf of all, each tensor contiguous as it is sent, then copied into its place, as vLLM's loader takes them."""
    for name, tensor in trainer.to_hf(params).items():
        tensor, (layer, _, expert) = tensor.contiguous(), name.partition(".experts.")
        if expert:
            e, part, _ = expert.split(".")
            w13, w2 = engine[f"{layer}.experts.w13_weight"][int(e)], engine[f"{layer}.experts.w2_weight"][int(e)]
            {"gate_proj": w13[:I], "up_proj": w13[I:], "down_proj": w2}[part].copy_(tensor)
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            part = name[-len("q_proj.weight")]
            at = {"q": 0, "k": 4096, "v": 4608}[part]
            engine[name.replace(f".{part}_proj.", ".qkv_proj.")][at : at + len(tensor)].copy_(tensor)
        else:
            engine[name].copy_(tensor)


def streamed(trainer: fmoe.Adapter, params: State, engine: State, **how: Any) -> None:
    """fmoe.sync.stream"""
    for name, tensor in stream(trainer, fmoe.adapter(KIND, CONFIG, system="vllm"), params, **how):
        engine[name].copy_(tensor)


METHODS: dict[str, tuple[str, Callable[..., None], dict[str, Any]]] = {
    "native: to_hf, fuse, copy": ("native", by_hand, {}),
    "native: to_hf, one by one": ("native", one_by_one, {}),
    "native: fmoe.sync": ("native", streamed, {}),
    "native, a rank's experts, 1 of 8: fmoe.sync": ("native", streamed, {"held": SHARE}),
    "Megatron: to_hf, fuse, copy": ("megatron", by_hand, {}),
    "Megatron: to_hf, one by one": ("megatron", one_by_one, {}),
    "Megatron: fmoe.sync": ("megatron", streamed, {}),
}


class Counted(TorchDispatchMode):
    """How many copying operators ran, and the bytes of what they made."""

    copies = copied = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in COPIES:
            self.copies += 1
            self.copied += made.nbytes
        return made


def model(system: str, held: range | None) -> tuple[fmoe.Adapter, State, State]:
    """The trainer's adapter and tensors, and the engine's, which are not filled."""
    shapes = {"model.embed_tokens.weight": (4096, D), "model.norm.weight": (D,), "lm_head.weight": (4096, D)}
    for l in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{l}."
        shapes |= {at + f"{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
        shapes |= {at + f"self_attn.{n}_norm.weight": (128,) for n in "qk"}
        rows = {"q": (4096, D), "k": (512, D), "v": (512, D), "o": (D, 4096)}
        shapes |= {at + f"self_attn.{n}_proj.weight": shape for n, shape in rows.items()}
        shapes |= {at + "mlp.gate.weight": (E, D)}
        for e in range(E):
            shapes |= {f"{at}mlp.experts.{e}.{p}_proj.weight": (I, D) for p in ("gate", "up")}
            shapes |= {f"{at}mlp.experts.{e}.down_proj.weight": (D, I)}
    drawn = torch.randn(2**24).bfloat16()
    hf = {n: drawn[: torch.Size(s).numel()].view(s).clone() for n, s in shapes.items()}
    engine = {n: torch.zeros_like(t) for n, t in fmoe.adapter(KIND, CONFIG, system="vllm").from_hf(hf).items()}
    trainer = fmoe.adapter(KIND, CONFIG, system=system)
    params = trainer.from_hf(hf)
    if held is not None:
        cut = lambda tensors: {n: t[held.start : held.stop] if ".experts." in n else t for n, t in tensors.items()}
        params, engine = cut(params), cut(engine)
    return trainer, params, engine


def child(name: str) -> None:
    system, run, how = METHODS[name]
    trainer, params, engine = model(system, how.get("held"))
    with Counted() as counted:
        run(trainer, params, engine, **how)
    want = (trainer.inverse >> fmoe.adapter(KIND, CONFIG, system="vllm")).from_hf(params) if not how else {}
    assert all(torch.equal(engine[n], t) for n, t in want.items())
    del want
    base, peak, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    run(trainer, params, engine, **how)
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    size = sum(t.nbytes for t in params.values())
    facts = {"seconds": seconds, "memory": max(0, peak[0] - base), "copies": counted.copies, "copied": counted.copied}
    print(json.dumps(facts | {"bytes": size}))


def measure(name: str, layers: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--layers", str(layers), "--child", name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    CONFIG["num_hidden_layers"] = args.layers
    if args.child:
        child(args.child)
        return
    rounds = [{name: measure(name, args.layers) for name in METHODS} for _ in range(args.rounds)]
    found = [
        {"what": n, "rounds": len(rounds)} | {k: median(r[n][k] for r in rounds) for k in rounds[0][n]} for n in METHODS
    ]
    table = Table("what", "GB", "seconds", "copies", "copied / model", "peak MB")
    for row in found:
        sizes = (f"{row['bytes'] / 1e9:.2f}", f"{row['seconds']:.3f}", f"{row['copies']:.0f}")
        table.add_row(row["what"], *sizes, f"{row['copied'] / row['bytes']:.2f}", f"{row['memory'] / 1e6:.0f}")
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
