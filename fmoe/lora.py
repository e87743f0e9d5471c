"""LoRA on experts: both of its forms in files, derived from each family's rules; merging, drawing, PEFT's directories.

    A [E, D, r], B [E, r, U] beside W [E, D, U]:    h @ W + scale * (h @ A) @ B

Native names, beside those of the weights: `lora_gate_and_up_A` [E, D, r], `lora_gate_and_up_B` [E, r, U],
`lora_down_A` [E, I, r], `lora_down_B` [E, r, D]. Where gate and up were trained with matrices A of their own,
`lora_gate_and_up_A` is [E, D, 2, r]; `lift` makes one of rank 2r of them.
"""

from fmoe.checkpoint.lora import Tuned, load, save
from fmoe.entrance import held
from fmoe.lowrank.config import LoraConfig
from fmoe.lowrank.params import even, init, lift, merge, unmerge
from fmoe.lowrank.stage import is_lora

__all__ = ["LoraConfig", "Tuned", "even", "init", "is_lora", "lift", "load", "merge", "save", "unmerge"]

held(globals(), "LoraConfig even init is_lora lift load merge save unmerge")
