"""torchtitan beside ours: its adapters, its models and its way to load, on what fmoe made and wrote.

python bench/peers/with_torchtitan.py     where torchtitan 0.3 is installed; on a CPU
"""

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from models import files, same
from torch import Tensor
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.models import deepseek_v3, qwen3

import fmoe
from fmoe.integrations.torchtitan import StateDictAdapter


def small(config: Any) -> Any:
    """The debug model with a dense layer, if it has one, and one with experts."""
    kinds = {layer.moe is None: layer for layer in config.layers}
    config.layers = [kinds[kind] for kind in sorted(kinds, reverse=True)]
    return config


def qwen() -> tuple[Any, Any, dict[str, Any]]:
    made = small(qwen3.qwen3_configs["debugmodel_moe"](attn_backend="flex"))
    attention = made.layers[0].attention
    config = dict(model_type="qwen3_moe", num_hidden_layers=len(made.layers), hidden_size=made.dim)
    config |= dict(head_dim=attention.head_dim, num_attention_heads=attention.n_heads, vocab_size=made.vocab_size)
    config |= dict(num_key_value_heads=attention.n_kv_heads, num_experts_per_tok=8, decoder_sparse_step=1)
    return made, qwen3.Qwen3StateDictAdapter, config


def deepseek() -> tuple[Any, Any, dict[str, Any]]:
    how = dict(attn_backend="flex", moe_comm_backend="standard")
    made = small(deepseek_v3.deepseekv3_configs["debugmodel"](**how))
    config = dict(model_type="deepseek_v3", num_hidden_layers=len(made.layers), hidden_size=made.dim)
    config |= dict(first_k_dense_replace=sum(layer.moe is None for layer in made.layers), num_experts_per_tok=8)
    attention = made.layers[0].attention
    config |= dict(num_attention_heads=attention.n_heads, kv_lora_rank=attention.kv_lora_rank)
    config |= dict(q_lora_rank=attention.q_lora_rank or None, v_head_dim=attention.v_head_dim)
    config |= dict(vocab_size=made.vocab_size)
    config |= dict(qk_nope_head_dim=attention.qk_nope_head_dim, qk_rope_head_dim=attention.qk_rope_head_dim)
    return made, deepseek_v3.DeepSeekV3StateDictAdapter, config


def completed(config: dict[str, Any], held: dict[str, Tensor]) -> dict[str, Any]:
    """The experts' sizes, off the model."""
    name = next(n for n in held if n.endswith("w1_EFD"))
    experts, width, _ = held[name].shape
    counts = dict(num_experts=experts, n_routed_experts=experts, num_local_experts=experts, n_shared_experts=0)
    if shared := [t for n, t in held.items() if n.endswith("shared_experts.w1.weight")]:
        counts["n_shared_experts"] = shared[0].shape[0] // width
    return config | counts | dict(moe_intermediate_size=width, intermediate_size=4 * config["hidden_size"])


class Held:
    """What its checkpointer calls a model: a state dict that it loads into."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def state_dict(self) -> dict[str, Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            self.state[name].copy_(tensor)


def loaded(like: dict[str, Tensor], where: str, adapter: StateDictAdapter, from_hf: bool) -> dict[str, Tensor]:
    """What torchtitan's own checkpointer loads from a directory, through fmoe's adapter where that is Hugging Face's.

    The biases are no part of that, so they begin as the model makes them.
    """
    state = {n: torch.zeros_like(t) if n.endswith("expert_bias_E") else torch.full_like(t, 7) for n, t in like.items()}
    manager = CheckpointManager.__new__(CheckpointManager)
    manager.sd_adapter, manager.states = adapter, {"model": Held(state)}
    manager.dcp_load(state, where, from_hf=from_hf, from_quantized=False)
    return state


def main() -> None:
    torch.manual_seed(0)
    for made, theirs, config in (qwen(), deepseek()):
        with torch.device("meta"):
            model = made.build()
        held = {n: torch.randn(t.shape, dtype=torch.bfloat16) for n, t in model.state_dict().items()}
        biases = [n for n in held if n.endswith("expert_bias_E")]
        made_up = config["model_type"] == "qwen3_moe"  # the bias is in Hugging Face's DeepSeek
        held |= {n: torch.randn(held[n].shape) * (not made_up) for n in biases}
        config = completed(config, held)
        hf = dict(theirs(made, None).to_hf(dict(held)))
        ours = fmoe.adapter(config["model_type"], config, system="torchtitan")
        same(ours.to_hf(held), hf)
        same(ours.from_hf(hf), held)
        back = theirs(made, None).from_hf(dict(hf))
        same(back, {n: t for n, t in held.items() if not made_up or n not in biases})
        with tempfile.TemporaryDirectory() as out:
            native = fmoe.adapter(config["model_type"], config)
            fmoe.save(native.from_hf(hf), f"{out}/hf", native)
            fmoe.convert(f"{out}/hf", f"{out}/ours", to="torchtitan", config=config)
            for from_hf, where in ((False, f"{out}/ours"), (True, f"{out}/hf")):
                same(loaded(held, where, StateDictAdapter(made, f"{out}/hf", adapter=ours), from_hf), held)
            dcp.save(dict(held), checkpoint_id=f"{out}/theirs", no_dist=True)
            fmoe.convert(f"{out}/theirs", f"{out}/back", to="hf", config=config)
            same(files(Path(out, "back")), hf)
        print(f"{config['model_type']}: equal, with torchtitan {version('torchtitan')}", flush=True)


if __name__ == "__main__":
    main()
