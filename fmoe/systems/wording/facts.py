"""What a table of another system asks of a Hugging Face config: sizes, quotients of sizes, and layers by their kind."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fmoe.families.kind import Family
from fmoe.families.where import translated
from fmoe.types import AdapterError, brief

_SIZE = re.compile(r"(num|n)_.*|.*_(size|dim|rank|replace|step|freq|interval|heads)")
_DIVISOR = re.compile(r"(heads|step|freq|interval)$")
"""Fields that others are divided by, so that 0 is none of their values."""
_LISTS = ("mlp_only_layers", "layer_types")


@dataclass(frozen=True)
class Facts:
    """A config's fields by name, and what follows from them. Nothing is asked for before a table needs it.

    choices: those of the system, such as `names="0.3"`. Raises AdapterError where the config does not say a field.
    """

    system: str
    kind: Family
    config: Mapping[str, Any]
    choices: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        if self.config.get(name) is None:
            raise AdapterError(f"system={self.system!r} needs the config's {name} for {self.family}: give a config")
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.config.get(name)
        if value is None:
            return default
        least = int(bool(_DIVISOR.search(name)))
        if _SIZE.fullmatch(name) and (type(value) is not int or value < least):
            raise AdapterError(f"config's {name} is {brief(value)}, expected an int of {least} or more")
        if name in _LISTS and not isinstance(value, list | tuple):
            raise AdapterError(f"config's {name} is {brief(value)}, expected a list")
        return value

    @property
    def family(self) -> str:
        return self.kind.model_types[0]

    @property
    def keep(self) -> bool:
        """Whether codes and scales move as they are."""
        return bool(self.choices.get("quantized") == "keep")

    @property
    def lossy(self) -> bool:
        return bool(self.choices.get("lossy"))

    @cached_property
    def layers(self) -> range:
        return range(self["num_hidden_layers"])

    @property
    def heads(self) -> int:
        return int(self["num_attention_heads"])

    @property
    def groups(self) -> int:
        return int(self.get("num_key_value_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        return int(self.get("head_dim") or self["hidden_size"] // self.heads)

    @property
    def experts(self) -> int:
        found = self.kind.values(self.config).get("n_routed_experts")
        if not isinstance(found, int):
            raise AdapterError(f"system={self.system!r} needs the number of experts: give a config")
        return found

    @property
    def tied(self) -> bool:
        return bool(self.get("tie_word_embeddings", False))

    @cached_property
    def dense(self) -> tuple[int, ...]:
        """The layers whose MLP has no experts."""
        if self.family == "deepseek_v3":
            every = self.get("moe_layer_freq", 1)
            sparse = [l for l in self.layers if l >= self.get("first_k_dense_replace", 0) and l % every == 0]
        elif self.family in ("qwen3_moe", "qwen3_next"):
            step, only = self.get("decoder_sparse_step", 1), self.get("mlp_only_layers", [])
            sparse = [l for l in self.layers if l not in only and (l + 1) % step == 0]
        else:
            sparse = list(self.layers)
        return tuple(l for l in self.layers if l not in sparse)

    @cached_property
    def sparse(self) -> tuple[int, ...]:
        """The layers with experts."""
        return tuple(l for l in self.layers if l not in self.dense)

    @cached_property
    def linear(self) -> tuple[int, ...]:
        """The layers with linear attention."""
        kinds = self.get("layer_types") and translated(self.config)["layer_types"]
        if kinds is None:
            every = self.get("full_attention_interval", 4)
            kinds = ["full_attention" if (l + 1) % every == 0 else "linear_attention" for l in self.layers]
        if len(kinds) < len(self.layers):
            raise AdapterError(
                f"config's layer_types has {len(kinds)}, expected one for each of {len(self.layers)} layers"
            )
        return tuple(l for l in self.layers if kinds[l] == "linear_attention")

    @cached_property
    def full(self) -> tuple[int, ...]:
        """The layers with full attention, of a family that has both."""
        return tuple(l for l in self.layers if l not in self.linear)

    @property
    def query(self) -> int:
        """Query heads of a key-value group."""
        if self.heads % self.groups:
            raise AdapterError(f"num_attention_heads={self.heads}: expected a multiple of {self.groups} groups")
        return self.heads // self.groups
