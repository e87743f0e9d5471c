"""LoRA of an expert's gate without its up, or the other way round: natively one matrix, whose other half is zeros."""

from collections.abc import Iterable, Iterator

from torch import Tensor, zeros_like

from fmoe.layout.names import Names
from fmoe.layout.notation import Rule
from fmoe.lowrank.config import LoraConfig
from fmoe.lowrank.sorting import END, WRAPPED, twins
from fmoe.types import Params


def whole(rules: Iterable[Rule], tensors: Params, config: LoraConfig) -> dict[str, Tensor]:
    """The tensors, with the same A and a B of zeros for each half that the config does not wrap and that is not there.

    >>> from fmoe import adapter, lowrank
    >>> rules = lowrank.targets.table_of(adapter("qwen3_moe")).forms.per_expert
    >>> A, B = (f"layers.0.mlp.experts.0.gate_proj.lora_{m}.weight" for m in "AB")
    >>> import torch
    >>> made = whole(rules, {A: torch.ones(1, 3), B: torch.ones(2, 1)}, LoraConfig(r=1, target_modules=("gate_proj",)))
    >>> made["layers.0.mlp.experts.0.up_proj.lora_B.weight"].tolist()
    [[0.0], [0.0]]
    """
    made = dict(tensors)
    for mine, other in _halves(rules, tensors, config):
        if mine in tensors and _b(mine) in tensors and other not in tensors and _b(other) not in tensors:
            made |= {other: tensors[mine], _b(other): zeros_like(tensors[_b(mine)])}
    return made


def pared(rules: Iterable[Rule], tensors: Params, config: LoraConfig) -> dict[str, Tensor]:
    """The tensors without those halves, where they are zeros."""
    made = dict(tensors)
    for _, other in _halves(rules, tensors, config):
        if other in made and _b(other) in made and not made[_b(other)].any():
            del made[other], made[_b(other)]
    return made


def _halves(rules: Iterable[Rule], tensors: Params, config: LoraConfig) -> Iterator[tuple[str, str]]:
    """The matrices A of gates and ups of which the config wraps one, that one first."""
    names = Names([n for n in tensors if END.search(n)])
    pairs = {up: gate for gates in (False, True) for up, gate in twins(rules, names, of_gates=gates).items()}
    wraps = lambda name: config.wraps(END.sub("", name).removeprefix(WRAPPED))
    for up, gate in pairs.items():
        if wraps(up) != wraps(gate):
            yield (up, gate) if wraps(up) else (gate, up)


def _b(name: str) -> str:
    return name.replace(".lora_A.weight", ".lora_B.weight")
