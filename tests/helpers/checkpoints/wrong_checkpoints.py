"""Mutations of a complete checkpoint: what each does to its tensors, and the key that it concerns."""

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def drop(tensors: Tensors, key: str) -> list[str]:
    del tensors[key]
    return [key]


def transpose(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = tensors[key].mT.clone()
    return [key]


def retype(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = tensors[key].to(torch.float16 if tensors[key].dtype != torch.float16 else torch.float32)
    return [key]


def suffix(tensors: Tensors, key: str) -> list[str]:
    tensors[key + "_again"] = tensors[key]
    return [key + "_again"]


def orphan_scale(tensors: Tensors, key: str) -> list[str]:
    stray = key.replace("weight", "weight_scale_inv") if "weight" in key else key + "_scale_inv"
    if stray in tensors:
        del tensors[key]
        return [stray]
    tensors[stray] = torch.ones(1, 1)
    return [stray]


def renumber(tensors: Tensors, key: str) -> list[str]:
    """Experts counted from 1; aggregated ones lose one."""
    if ".experts.1." not in key:
        tensors[key] = tensors[key][1:]
        return [key]
    head = key.split(".experts.")[0] + ".experts."
    mine = sorted((n for n in tensors if n.startswith(head)), key=lambda n: -int(n[len(head) :].split(".")[0]))
    for name in mine:
        number, tail = name[len(head) :].split(".", 1)
        tensors[f"{head}{int(number) + 1}.{tail}"] = tensors.pop(name)
    return [key.replace(".experts.1.", ".experts.0.")]


def stray(tensors: Tensors, key: str) -> list[str]:
    """The tensor stands at another expert's number, or another layer's."""
    if ".experts.1." not in key:
        other = key.replace("gate_up_proj", "gate_up_proj.weight").replace("moe.gate_proj", "moe.experts.gate_proj")
        tensors[other] = tensors.pop(key)
        return [other]
    other = key.replace(".experts.1.", ".experts.99.")
    tensors[other] = tensors.pop(key)
    return [key, other]


def duplicate(tensors: Tensors, key: str) -> list[str]:
    """The layer's native tensor stands there as well."""
    head = (
        key.split(".experts.")[0] + ".experts." if ".experts." in key else key.rpartition("gate_proj")[0] + "experts."
    )
    tensors[head + "gate_and_up_projs"] = torch.zeros(1)
    return [head + "gate_and_up_projs"]
