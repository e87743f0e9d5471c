"""An adapter in the shape of torchtitan's `BaseStateDictAdapter`: pure, and open to a model's own names.

adapter = StateDictAdapter(model_args, hf_assets_path, names=W123 | ...)
hf = adapter.to_hf(model.state_dict())
dcp.load(hf, storage_reader=adapter.get_hf_storage_reader(path))
model.load_state_dict(adapter.from_hf(hf), strict=False)
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmoe.checkpoint import adapter as adapter_of
from fmoe.checkpoint.files.origin import weight_map
from fmoe.checkpoint.files.strict import read
from fmoe.entrance import held
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import keep, rule
from fmoe.types import AdapterError

if TYPE_CHECKING:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"-(\d+)-of-\d+\.")
W123 = (
    rule("model.layers.{l}.mlp.experts.gate_and_up_projs [e d (g i)]", "layers.{l}.moe.experts.{g=w1|w3} [e i d]")
    | rule("model.layers.{l}.mlp.experts.down_projs [e i d]", "layers.{l}.moe.experts.w2 [e d i]")
    | keep("{rest}")
)
"""torchtitan's names of expert weights, after any adapter whose native ones lie at `model.layers.{l}.mlp.experts`."""


class StateDictAdapter:
    """to_hf / from_hf of one model, its shards by name, and a reader of its files.

    model_args: not needed, kept. hf_assets_path: a directory with config.json, for the family, and where there is one
    the index of safetensors files, for `fqn_to_index_mapping` (HF name -> number of its file; None without an index).
    adapter: another than `fmoe.adapter(hf_assets_path)`. names: from fmoe's native names to the model's; as
    `fmoe.rename`s, or `W123` for experts. No method keeps anything or writes to an argument.

    Raises AdapterError where the directory does not say which family it is, and in each method as `fmoe.Adapter`'s.
    Source: torchtitan, protocols.state_dict_adapter.BaseStateDictAdapter (names, arguments).

    >>> import torch
    >>> adapter = StateDictAdapter(adapter=adapter_of("per_expert", {"model_type": "per_expert"}), names=W123)
    >>> w1, w2, w3 = torch.ones(2, 3, 4), torch.zeros(2, 4, 3), torch.ones(2, 3, 4)
    >>> hf = adapter.to_hf({f"layers.0.moe.experts.w{i}": w for i, w in enumerate((w1, w2, w3), 1)})
    >>> len(hf), list(hf["model.layers.0.mlp.experts.1.gate_proj.weight"].shape)
    (6, [3, 4])
    """

    def __init__(
        self,
        model_args: Any = None,
        hf_assets_path: str | Path | None = None,
        *,
        adapter: Adapter | None = None,
        names: Adapter | None = None,
    ) -> None:
        if adapter is None and hf_assets_path is None:
            raise AdapterError("which family? expected hf_assets_path or adapter")
        self.model_args, self.hf_assets_path = model_args, hf_assets_path
        found = adapter or family_of(Path(str(hf_assets_path)))
        self.adapter = found if names is None else found >> names
        self.fqn_to_index_mapping = None if hf_assets_path is None else files_of(Path(hf_assets_path) / INDEX)

    def to_hf(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """HF tensors: views of the model's wherever strides allow, so that what is read into them is loaded."""
        return self.adapter.to_hf(state_dict)

    def from_hf(self, hf_state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The model's tensors, all of them: where HF ones are `to_hf`'s views, no byte of an aggregated one moves."""
        return self.adapter.from_hf(hf_state_dict)

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> "HuggingFaceStorageReader":
        """torch's reader of the safetensors files of a directory; from_quantized: the one that decodes FP8 blocks."""
        from torch.distributed.checkpoint import HuggingFaceStorageReader
        from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

        return QuantizedHuggingFaceStorageReader(path) if from_quantized else HuggingFaceStorageReader(path)


def family_of(path: Path) -> Adapter:
    """The adapter of a directory: of its files where there are any, of its config.json alone otherwise."""
    if any(path.glob("*.safetensors")):
        return adapter_of(path)
    config = read(path / "config.json", "is not there: expected the checkpoint's config", infinite=True)[0]
    return adapter_of(str(config.get("model_type")), config)


def files_of(index: Path) -> dict[str, int] | None:
    """HF name -> the number of its file, as an index says; None where there is no index.

    Raises AdapterError for a file without a number.
    """
    if not os.path.lexists(index):
        return None
    out: dict[str, int] = {}
    for name, file in weight_map(index, read(index)[0]).items():
        number = SHARD.search(file)
        if number is None:
            raise AdapterError(f"{index}: {name!r} lies in {file!r}, expected a number as in model-00001-of-00002")
        out[name] = int(number[1])
    return out


held(globals(), "StateDictAdapter")
