"""Where users already are; nothing here is imported before it is asked for.

    fmoe.patch(model)                                   any model of Transformers' expert modules: bound here and now
    fmoe.integrations.transformers.register()           experts_implementation="fmoe" in Transformers
    fmoe.integrations.automodel.StateDictAdapter        an adapter as NeMo Automodel's loader calls one
    fmoe.integrations.torchtitan.StateDictAdapter       an adapter as torchtitan's loader calls one

`gates` has what is known of the functions between two products, `composed` an expert around a function that is not
ours, `bindings` the expert modules that Transformers cannot exchange, `peft` LoRA on expert parameters.
"""

from importlib import import_module
from types import ModuleType

_PARTS = "automodel bindings composed gates kinds patch peft stacks torchtitan transformers".split()


def __getattr__(name: str) -> ModuleType:
    if name in _PARTS:
        return import_module(f"fmoe.integrations.{name}")
    raise AttributeError(f"module 'fmoe.integrations' has no attribute {name!r}")
