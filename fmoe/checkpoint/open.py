"""`fmoe.adapter`: by directory, by model type and config, or from your own rules."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fmoe.adapter import Adapter
from fmoe.build import table
from fmoe.checkpoint.files import Checkpoint, open_checkpoint
from fmoe.families import FAMILIES, family
from fmoe.types import AdapterError


def adapter(path_or_model_type: "str | Path | Iterable[Adapter]", config: Any = None, **choices: Any) -> Adapter:
    """The adapter of a checkpoint directory, of a `model_type` with its config, or of your own rules side by side.

    A directory is resolved: `to_hf` gives back the layout that is there. A model type is open: `from_hf` settles the
    layout for each call, `to_hf` writes the published one. config: a dict with Hugging Face's field names or a
    Transformers config; without one, sizes are taken from the tensors. choices: `dtype=` casts merged experts, the
    others name a layout, as `layout="fused"`. Raises AdapterError for an unknown family, choice or directory.

    >>> config = {"num_experts": 2, "hidden_size": 4, "moe_intermediate_size": 3, "num_experts_per_tok": 1}
    >>> adapter("qwen3_moe", config).moe_config.n_routed_experts
    2
    """
    if isinstance(path_or_model_type, str) and path_or_model_type in FAMILIES:
        return family(path_or_model_type).adapter(config, **choices)
    if isinstance(path_or_model_type, str | Path):
        if not Path(path_or_model_type).is_dir():
            known = ", ".join(sorted(FAMILIES))
            raise AdapterError(f"{str(path_or_model_type)!r} is neither a directory nor a model type ({known})")
        return adapter_of(open_checkpoint(path_or_model_type), config, **choices)
    if isinstance(path_or_model_type, Adapter):
        path_or_model_type = [path_or_model_type]
    if choices or config is not None:
        raise AdapterError("rules of your own take no config and no choices: bind their letters in `rule`")
    return table(path_or_model_type)


def adapter_of(checkpoint: Checkpoint, config: Any = None, **choices: Any) -> Adapter:
    """The adapter of an open checkpoint, its alternatives settled by the names of its HF tensors, or its origin's."""
    try:
        made = family(checkpoint.model_type).adapter(checkpoint.config if config is None else config, **choices)
    except AdapterError:
        raise
    except ValueError as error:  # a size or a dtype that is none
        raise AdapterError(f"{checkpoint.path / 'config.json'}: {error}") from None
    return made.resolve(hf_names(checkpoint))


def hf_names(checkpoint: Checkpoint) -> Iterable[str]:
    """The names of its HF tensors; of a native one, of those that it was made from."""
    return checkpoint.origin["weight_map"] if checkpoint.origin else checkpoint.specs
