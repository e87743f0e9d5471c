"""Other systems' names and axes for the same models, as data: SYSTEMS, by name. A new one is a file and a line here."""

from importlib import import_module
from typing import Any

from fmoe.entrance import held
from fmoe.folding import meant
from fmoe.layout.adapter import Adapter
from fmoe.systems.system import System
from fmoe.types import AdapterError

_FILES = "torchtitan megatron megatron_dist engines gguf mlx maxtext prime_rl deepseek gpt_oss_original automodel"

__all__ = ["SYSTEMS", "System", "adapter"]

SYSTEMS: dict[str, System] = {}

for _file in _FILES.split():
    for _value in vars(import_module(f"fmoe.systems.{_file}")).values():
        if isinstance(_value, System):
            SYSTEMS[_value.name] = _value


def adapter(name: str, model_type: str, config: Any = None, **choices: Any) -> Adapter:
    """Hugging Face <-> the system of a name: `fmoe.adapter(model_type, config, system=name)`.

    Raises AdapterError for a system that there is not, and as `System.adapter`.

    >>> adapter("torchtitan", "qwen3_moe", {"num_hidden_layers": 1}).lossless
    True
    """
    if not isinstance(name, str) or name not in SYSTEMS:
        told = f"native, {', '.join(SYSTEMS)}{meant(name, ('native', *SYSTEMS))}"
        raise AdapterError(f"system={name!r}: expected one of {told}")
    return SYSTEMS[name].adapter(model_type, config, **choices)


held(globals(), "System adapter")
