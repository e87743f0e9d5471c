"""An adapter in the shape that NeMo Automodel's checkpoint loader calls, for every family.

    destinations = adapter.to_hf(model.state_dict())       # views of the model's storage, wherever strides allow
    ...                                                    # the loader reads files into them
    rest = adapter.from_hf(destinations, device_mesh)      # what was read in place is not returned,
    adapter.view_loaded_native_keys                        # but told here: it is not missing

What is in place is known by its memory, not by its name: new tensors under names that were once handed out are
converted, whatever was called before. The adapter inside, `adapter.adapter`, is pure.

Automodel is not imported. Once it is, by whoever loads, its loader takes an adapter that is made for one of its own.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fmoe.checkpoint import adapter as adapter_of
from fmoe.entrance import held
from fmoe.layout.adapter import Adapter
from fmoe.layout.eager.running import pattern
from fmoe.lowrank.targets import told
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError

HOME = "nemo_automodel.components.checkpoint.state_dict_adapter"
LEGACY = "0.18.1"
"""The PEFT release whose wrapper form is that of `legacy_paramwrapper_layout`."""
EXTRA = r".*_extra_state.*"
"""Names that the loader leaves out of its comparisons."""


class StateDictAdapter:
    """to_hf / from_hf of one model, `fmoe.adapter(model_type, config, system="automodel")`, whose native names are the
    loader's own beyond experts too; and a note of what lies in the model already.

    config: a Transformers config or a dict with its fields, or the directory of a checkpoint, whose layout is then the
    one that `to_hf` writes; its `model_type` names the family. moe_config: not needed, kept. backend: an object whose
    `experts` and `dispatcher` say how the model stores its experts: "te" and "mok" store them otherwise than they name
    them, so nothing is read in place. dtype: merged experts become it, None leaves theirs. choices: as `fmoe.adapter`.

    Raises AdapterError for an unknown family or choice, and in each method as `fmoe.Adapter`'s.
    Source: NeMo Automodel, checkpoint.state_dict_adapter.StateDictAdapter (methods and their arguments).

    >>> config = {"model_type": "per_expert"}
    >>> adapter = StateDictAdapter(config, dtype=None)
    >>> native = {"model.layers.0.mlp.experts.down_projs": torch.zeros(2, 3, 4).mT.contiguous().mT}
    >>> native["model.layers.0.mlp.experts.gate_and_up_projs"] = torch.zeros(2, 4, 6)
    >>> read = {name: tensor.fill_(7) for name, tensor in adapter.to_hf(native).items()}
    >>> adapter.from_hf(read), len(adapter.view_loaded_native_keys), *(float(t.mean()) for t in native.values())
    ({}, 2, 7.0, 7.0)
    """

    def __init__(
        self,
        config: Any,
        moe_config: Any = None,
        backend: Any = None,
        dtype: torch.dtype | None = torch.bfloat16,
        **choices: Any,
    ) -> None:
        self.config, self.moe_config, self.backend, self.dtype = config, moe_config, backend, dtype
        given = choices | {"system": "automodel"} | ({} if dtype is None else {"dtype": dtype})
        if isinstance(config, str | Path):
            self.adapter: Adapter = adapter_of(config, **given)
        else:
            named = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
            if not isinstance(named, str):
                raise AdapterError(f"config.model_type is {named!r}, expected the name of a family")
            self.adapter = adapter_of(named, config, **given)
        self.view_loaded_native_keys: frozenset[str] = frozenset()
        self._lent: list[Lent] = []
        if HOME in sys.modules:
            sys.modules[HOME].StateDictAdapter.register(type(self))

    @property
    def supports_write_through_checkpoint_load(self) -> bool:
        """May a checkpoint be read straight into the model? Not where it is decoded, or stored under other names."""
        raw = self.adapter.config or {}
        aliased = getattr(self.backend, "experts", None) != "te" and getattr(self.backend, "dispatcher", None) != "mok"
        return aliased and not raw.get("quantization_config")

    @property
    def supports_low_memory_dcp_load(self) -> bool:
        """May torch.distributed.checkpoint fill the tensors of `to_hf`, with no whole checkpoint beside the model?"""
        return self.supports_write_through_checkpoint_load

    @property
    def checkpoint_key_aliases(self) -> dict[str, str]:
        """Name now -> older name: none, since names that a family once had are layouts of its adapter."""
        return {}

    def get_hf_state_dict_keys(self, state_dict: Mapping[str, Any]) -> list[str]:
        """The names that `to_hf` would give these tensors. Nothing is lent."""
        empty = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in _tensors(state_dict).items()}
        return list(self.adapter.to_hf(empty))

    def iter_checkpoint_load_parts(self, model_state_dict: Mapping[str, Any], device_mesh: Any = None) -> None:
        """None: a checkpoint is read as a whole, `fmoe.dcp.load` reads a quantised one tensor by tensor."""

    def map_peft_target_module_to_hf(self, name: str, *, v4_compatible: bool = False) -> str:
        """The name of a module that is LoRA's target, as Hugging Face's model has it: the same."""
        return name

    def to_hf(
        self,
        state_dict: Mapping[str, Any],
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The HF tensors of native ones: views of them wherever strides allow, unless quantised.

        quantization: with the codes and scales of the family's format, real ones. v4_compatible=True writes LoRA for
        each expert alone. Other keywords of the loader are of no consequence. The views are this call's: it forgets
        what was lent before.
        """
        adapter, left_out = self._writing(kwargs), pattern(exclude_key_regex or "$^")
        # what is left out need not be a tensor: Transformer Engine's `_extra_state` is a file or None
        state_dict = {n: t for n, t in state_dict.items() if isinstance(t, Tensor) or not left_out.match(n)}
        out = adapter.to_hf(state_dict, exclude_key_regex, quantization or None)
        asked = kwargs.get("for_checkpoint_load", True)
        direct = asked and self.supports_write_through_checkpoint_load and not quantization
        self._lent = self._lend(adapter, state_dict, out) if direct else []
        return out

    def from_hf(self, hf_state_dict: Mapping[str, Any], device_mesh: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The native tensors of HF ones, but for the modules whose HF tensors all are what `to_hf` has lent.

        Those are `view_loaded_native_keys` until the next call. device_mesh: keep this rank's experts, as DTensors.
        """
        at = lambda name, memory: name in hf_state_dict and Memory.of(hf_state_dict[name]) == memory
        placed = [block for block in self._lent if all(at(*item) for item in block.memories)]
        self.view_loaded_native_keys = frozenset(name for block in placed for name in block.natives)
        done = {name for block in placed for name, _ in block.memories}
        rest = {name: t for name, t in hf_state_dict.items() if name not in done}
        return self.adapter.from_hf(rest, device_mesh) if rest else {}

    def convert_single_tensor_to_hf(self, fqn: str, tensor: Any, **kwargs: Any) -> list[tuple[str, Any]]:
        """[(HF name, HF tensor), ...] of one native tensor. Keywords as in `to_hf`; nothing is lent."""
        known = {n: kwargs[n] for n in ("exclude_key_regex", "quantization") if kwargs.get(n)}
        return self._writing(kwargs).convert_single_tensor_to_hf(fqn, tensor, **known)

    def _writing(self, kwargs: Mapping[str, Any]) -> Adapter:
        open_choices = {name for stage in self.adapter.stages for name in stage.choices()}
        if kwargs.get("v4_compatible") and "lora" in open_choices:
            return self.adapter.choose(lora="per-expert")
        return told(self.adapter, LEGACY, None) if kwargs.get("legacy_paramwrapper_layout") else self.adapter

    def _lend(self, adapter: Adapter, native: Mapping[str, Any], out: Mapping[str, Any]) -> list["Lent"]:
        """The blocks whose storage is wholly out under HF names. What passes unchanged comes back as it is."""
        blocks, changed = dict[str, Lent | None](), set[str]()
        for sources, targets in adapter._to_hf_plan(native, None, {}).units():
            memories = tuple((n, Memory.of(out[n])) for n in targets if n in out)
            parts = {native[n] if not is_dtensor(native[n]) else native[n].to_local() for n in sources}
            size = sum(memory.numel() for _, memory in memories)
            whole = {m.storage for _, m in memories} == {Memory.of(t).storage for t in parts}
            lent = len(sources) == 1 and whole and size == sum(t.numel() for t in parts)
            lent = lent and not any(t.is_meta for t in parts)
            block = sources[0].rpartition(".")[0]
            changed |= {block} if sources != targets else set()
            known = blocks.get(block, Lent((), ()))
            blocks[block] = Lent((*known.natives, *sources), (*known.memories, *memories)) if lent and known else None
        return [lent for block, lent in blocks.items() if lent is not None and block in changed]


class Lent(NamedTuple):
    """The native tensors of a module, and where in their storage the HF tensors lie that they are made of."""

    natives: tuple[str, ...]
    memories: "tuple[tuple[str, Memory], ...]"


class Memory(tuple[Any, ...]):
    """Where a tensor lies: (storage, offset, shape, stride). It keeps nothing alive, and no address comes back."""

    @classmethod
    def of(cls, tensor: Tensor) -> "Memory":
        """Of a tensor, of a DTensor's part on this rank."""
        t = _local(tensor)
        return cls((StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.shape, t.stride()))

    @property
    def storage(self) -> Any:
        return self[0]

    def numel(self) -> int:
        return self[2].numel()


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {n: t for n, t in state_dict.items() if isinstance(t, Tensor)}


def _local(t: Any) -> Tensor:
    return t.to_local() if is_dtensor(t) else t


held(globals(), "StateDictAdapter")
