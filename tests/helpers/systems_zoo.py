"""Tiny whole models of the six families that other systems know, as (config, HF tensors), each built once."""

from functools import cache
from typing import Any

import hf
import hf_synthetic as synthetic
import hf_zoo
import torch
from safetensors.torch import load_file
from torch import Tensor

from fmoe.systems import SYSTEMS

Model = tuple[dict[str, Any], dict[str, Tensor]]


def _saved(name: str, **overrides: Any) -> Model:
    if overrides:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            model = hf.write(name, folder, **overrides)
            return model.config.to_dict(), _files(Path(folder))
    model, path = hf_zoo.saved(name)
    return model.config.to_dict(), _files(path)


def _files(path: Any) -> dict[str, Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def _deepseek(mtp: int, **overrides: Any) -> Model:
    config, tensors = synthetic.deepseek_v3(num_nextn_predict_layers=mtp, **overrides)[:2]
    copies = (".embed_tokens.weight", ".shared_head.head.weight")
    return config, {n: t for n, t in tensors.items() if not ("layers" in n and n.endswith(copies))}


def _straight(model: Model) -> Model:
    """Without q_lora: one q_proj."""
    config, tensors = model
    made = {}
    for name, tensor in tensors.items():
        if name.endswith("q_b_proj.weight"):
            rows = tensor.shape[0]
            made[name.replace("q_b_proj", "q_proj")] = torch.randn(rows, config["hidden_size"]).to(tensor.dtype)
        elif ".q_a_" not in name:
            made[name] = tensor
    return config | {"q_lora_rank": None}, made


def _with_mtp(model: Model) -> Model:
    """Qwen's MTP layer, made of the last full-attention layer's shapes."""
    config, tensors = model
    full = next(n for n in tensors if n.endswith("self_attn.q_proj.weight")).split("self_attn")[0]
    more = {n.replace(full, "mtp.layers.0."): torch.randn_like(t) for n, t in tensors.items() if n.startswith(full)}
    d = config["hidden_size"]
    more |= {f"mtp.{n}.weight": torch.randn(d) for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    return config, tensors | more | {"mtp.fc.weight": torch.randn(d, 2 * d)}


@cache
def model(name: str) -> Model:
    """One of `MODELS`."""
    return MODELS[name]()


MODELS = {
    "qwen3_moe": lambda: _saved("qwen3_moe"),
    "qwen3_moe alike": lambda: _saved("qwen3_moe", mlp_only_layers=[]),
    "mixtral": lambda: _saved("mixtral"),
    "deepseek_v3": lambda: _deepseek(0),
    "deepseek_v3 mtp": lambda: _deepseek(1),
    "deepseek_v3 q_proj": lambda: _straight(_deepseek(0)),
    "gpt_oss": lambda: _saved("gpt_oss"),
    "qwen3_next": lambda: _saved("qwen3_next"),
    "qwen3_next mtp": lambda: _with_mtp(_saved("qwen3_next")),
    "qwen3_5_moe_text": lambda: _saved("qwen3_5_moe_text"),
    "qwen3_5_moe_text mtp": lambda: _with_mtp(_saved("qwen3_5_moe_text")),
}

CHOICES: dict[str, list[dict[str, Any]]] = {
    "torchtitan": [{}, {"names": "0.2"}],
    "megatron": [{}, {"specs": "local"}],
    "megatron_dist": [{}, {"specs": "local"}],
    "maxtext": [{}, {"scan": True}],
}
NO_MTP = ("vllm", "sglang", "gguf", "mlx", "maxtext", "prime_rl", "deepseek")
"""Systems, or the DeepSeek and Qwen parts of them, whose MTP layer has no place."""


def knows(system: str, name: str, choice: dict[str, Any]) -> bool:
    """Whether there is a table for a model of `MODELS`, with all its tensors."""
    family, *more = name.split()
    if family == "gpt_oss" and (system == "mlx" or choice.get("names") == "0.2"):
        return False
    if choice.get("names") == "0.2" and (family == "qwen3_5_moe_text" or more == ["mtp"]):
        return False
    if more == ["mtp"] and (
        system in NO_MTP and not (system == "gguf" and "qwen" in family) or system == "torchtitan" and "qwen" in family
    ):
        return False
    if system == "maxtext" and name == "qwen3_moe":  # it has no dense layer among sparse ones
        return False
    tables = SYSTEMS[system].tables
    return SYSTEMS[system].native or family in tables or family.removesuffix("_text") in tables


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    return [(s, m, c) for s in SYSTEMS for c in CHOICES.get(s, [{}]) for m in MODELS if knows(s, m, c)]
