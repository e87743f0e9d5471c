"""Weights of a trainer under an engine's names and into its memory: fmoe.sync against the loops that people write.

    python bench/systems/sync.py --layers 2 --rounds 5 --json bench/results/sync.json

Qwen3-30B-A3B's layers in bf16. The engine's tensors exist (vLLM's names) and every method fills them. copies, copied:
calls and bytes of torch's copying operators, the last into the engine's memory among them; 1.00 of the model is the
least. memory: the peak of anonymous memory over what trainer and engine hold. Rounds are interleaved, figures are
medians, and what each method has made is compared first.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from convert import _anonymous as anonymous  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import fmoe  # noqa: E402
from fmoe.sync import stream  # noqa: E402

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


def placed(engine: State, name: str, tensor: Tensor) -> None:
    """A tensor by Hugging Face's name, copied into its place, as vLLM's loader takes them."""
    layer, _, expert = name.partition(".experts.")
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


def one_by_one(trainer: fmoe.Adapter, params: State, engine: State) -> None:
    """to_hf of all, then each into its place."""
    for name, tensor in trainer.to_hf(params).items():
        placed(engine, name, tensor)


def lazily(trainer: fmoe.Adapter, params: State, engine: State) -> None:
    """fmoe.sync.stream to Hugging Face's names, each into its place."""
    for name, tensor in stream(trainer, fmoe.Adapter(), params):
        placed(engine, name, tensor)


def streamed(trainer: fmoe.Adapter, params: State, engine: State, **how: Any) -> None:
    """fmoe.sync.stream"""
    for name, tensor in stream(trainer, fmoe.adapter(KIND, CONFIG, system="vllm"), params, **how):
        engine[name].copy_(tensor)


LOOPS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "to_hf, fuse, copy": (by_hand, {}),
    "to_hf, one by one": (one_by_one, {}),
    "fmoe.sync": (streamed, {}),
    "fmoe.sync, one by one": (lazily, {}),
}
METHODS = {
    "native": LOOPS | {"fmoe.sync, a rank's experts, 1 of 8": (streamed, {"held": SHARE})},
    "megatron": LOOPS,
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


def model(system: str) -> tuple[fmoe.Adapter, State, State]:
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
    return trainer, {n: t.clone() for n, t in trainer.from_hf(hf).items()}, engine


def measure(run: Callable[..., None], trainer: fmoe.Adapter, params: State, engine: State, how: Any) -> dict[str, Any]:
    base, peak, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started, used = time.perf_counter(), time.process_time()
    run(trainer, params, engine, **how)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    stop.set()
    watcher.join()
    return {"seconds": seconds, "cpu": cpu, "memory": max(0, peak[0] - base)}


def rows(system: str, rounds: int) -> list[dict[str, Any]]:
    """Every method of a trainer, in turns; first each is run once, its copies counted and what it made compared."""
    trainer, params, engine = model(system)
    want = (trainer.inverse >> fmoe.adapter(KIND, CONFIG, system="vllm")).from_hf(params)
    found, cases = [], {}
    for name, (run, how) in METHODS[system].items():
        held = how.get("held")
        cut = lambda tensors, held=held: {
            n: t[held.start : held.stop] if held and ".experts." in n else t for n, t in tensors.items()
        }
        cases[name] = (run, trainer, cut(params), cut(engine), how)
        for tensor in engine.values():
            tensor.zero_()
        with Counted() as counted:
            run(*cases[name][1:4], **how)
        assert all(torch.equal(cases[name][3][n], t) for n, t in cut(want).items()), name
        size = sum(t.nbytes for t in cases[name][2].values())
        found.append({"what": f"{system}: {name}", "copies": counted.copies, "copied": counted.copied, "bytes": size})
    del want
    taken = [{name: measure(*case) for name, case in cases.items()} for _ in range(rounds)]
    for row, name in zip(found, cases, strict=True):
        row |= {"rounds": rounds} | {k: median(t[name][k] for t in taken) for k in taken[0][name]}
    return found


def main() -> None:
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # what is freed goes back to the system, and is not the next one's
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    CONFIG["num_hidden_layers"] = args.layers
    found = [row for system in METHODS for row in rows(system, args.rounds)]
    table = Table("what", "GB", "seconds", "cpu", "copies", "copied / model", "peak MB")
    for row in found:
        sizes = (f"{row['bytes'] / 1e9:.2f}", f"{row['seconds']:.3f}", f"{row['cpu']:.3f}", f"{row['copies']:.0f}")
        table.add_row(row["what"], *sizes, f"{row['copied'] / row['bytes']:.2f}", f"{row['memory'] / 1e6:.0f}")
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
