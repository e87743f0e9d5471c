"""Which files of a directory are the checkpoint, as Transformers decides it, and which lie beside it.

`model.safetensors` if it is there, whatever an index says; else the shards that `model.safetensors.index.json` names.
Where there is neither, which Transformers does not read, all safetensors files whose name bears no other purpose.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fmoe.checkpoint.files.header import PICKLE
from fmoe.checkpoint.remote.address import Address, Where
from fmoe.layout.claims import some
from fmoe.types import AdapterError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NATIVE = "fmoe.json"
JOURNAL = "fmoe.journal"
LEASE = "fmoe.lease"
SUMS = "fmoe.sha256"
OUT = "model.gguf"
METADATA = ".metadata"
TREE = "_METADATA"
ARRAYS = "params.params."
OPENS = (INDEX, NATIVE, METADATA, TREE)
"""What says which files a checkpoint consists of: it comes last, and goes first."""
ADAPTER = "adapter_config.json"
UNFINISHED = (".part", ".incomplete")
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
WEIGHTS = {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".part"} | PICKLES
FOLDERS = {"original", "metal", "additional_chat_templates", "chat_templates", "custom_generate"}
FOLDERS |= {"onnx", "openvino", "coreml"}
"""Folders that model repositories have: what lies in them is part of the model."""

_SHARD = re.compile(r"(.*-)(\d{5})(-of-(\d{5})\.safetensors)")
_OTHER = re.compile(r"(.*[^a-z])?(adapter|consolidated|optimizer|optim|scheduler|ema|training|rng)(?![a-z]).*")
_CODE = "modeling|modular|configuration|tokenization|tokenizer|processing|processor|image_processing|image_processor"
_TOKENIZERS = re.compile(r"(\w+_)?tokenizer(_\d+)?")
"""Folders of a processor's further tokenizers, by the names of its attributes."""
MODULES, _MODULE = "modules.json", re.compile(r"\d+_[A-Z]\w*")
"""What sentence-transformers writes: which modules follow the model, and a folder for each, as 1_Pooling."""
_MODEL = re.compile(r"(pytorch_model|tf_model|flax_model)\b.*\.(bin|h5|msgpack|json)|adapter_(config\.json|model\..*)")
"""What, beside safetensors files, Transformers would read as a model that lies where one is saved."""
_KINDS = re.compile(
    rf"({_CODE}|video_processing|video_processor|feature_extraction|generation)_.*\.py"
    r"|config\.json|params\.json|tekken\.json|special_tokens_map\.json|added_tokens\.json|chat_template.*"
    rf"|{MODULES}|config_sentence_transformers\.json|configuration\.json"
    r"|.*_config\.json|.*\.index\.json|(tokenizer|vocab).*\.json|(vocab|merges|dict)\.txt|.*\.jinja"
    r"|.*\.(model|tiktoken|spm|bpe|codes)"
)


def weights_among(there: Iterable[str]) -> list[str]:
    """Files of weights whose name bears no other purpose, such as an adapter's or an optimizer's.

    >>> weights_among(["adapter_model.bin", "config.json", "model.safetensors", "optimizer.pt"])
    ['model.safetensors']
    """
    kept = {".safetensors", *PICKLES}
    return [n for n in there if Path(n).suffix in kept and not _OTHER.fullmatch(Path(n).stem)]


def no_model(path: Path) -> None:
    """Raises AdapterError for a directory that is a model's own, where a first adapter would be loaded over it."""
    there = sorted(os.listdir(path)) if path.is_dir() else []
    said, held = [n for n in ("config.json", NATIVE) if n in there], weights_among(there)
    if said and held and not any(n == ADAPTER or n.startswith("adapter_model.") for n in there):
        found = f"{path} is a model's own directory: found {some([*said, *held])}"
        why = "expected an adapter's, since Transformers loads what lies there with the adapter over it"
        raise AdapterError(f"{found}, {why}. Fix: a directory of its own, as {str(path / 'adapter')!r}")


def of_a_model(path: Where, there: Iterable[str]) -> None:
    """Raises AdapterError where a directory by its names holds a LoRA adapter alone, or is not finished."""
    there = list(there)
    if JOURNAL in there:
        raise AdapterError(f"{path} is unfinished: {JOURNAL} tells of a conversion that was interrupted; run it again")
    if ADAPTER in there and not {INDEX, NATIVE} & {*there} and not weights_among(there):
        away = isinstance(path, Address)  # LoRA is read from folders
        read = "download it, fmoe.lora.load(DIR, BASE)" if away else f"fmoe.lora.load({str(path)!r}, BASE)"
        fix = f"{read} reads it, and fmoe.lora.merge puts it into the base's weights"
        raise AdapterError(f"{path} is a LoRA adapter, as {ADAPTER} tells, expected a model. Fix: {fix}")


class Chosen(NamedTuple):
    """files: those that hold the tensors. indexed: whether the index that is there speaks of them."""

    files: list[str]
    indexed: bool


def chosen(path: Where, there: Iterable[str], mapped: Mapping[str, str] | None, config: Mapping[str, Any]) -> Chosen:
    """The files of the checkpoint among those in a directory. mapped: the index's weight_map, if there is one.

    Raises AdapterError where that cannot be told, or some of N shards are missing.
    """
    named = config.get("transformers_weights")
    if named not in (None, SINGLE, INDEX):
        raise AdapterError(f"{path / 'config.json'} has transformers_weights {named!r}: name the file {SINGLE}")
    there = sorted(there)
    if SINGLE in there and (mapped is None or set(mapped.values()) != {SINGLE}):
        return Chosen([SINGLE], False)
    if mapped is not None:
        return Chosen(sorted(set(mapped.values())), True)
    files = [n for n in there if n.endswith(".safetensors")]
    if odd := next((n for n in files if not n.isprintable()), None):
        raise AdapterError(f"{path} has a file named {odd!r}: rename it")
    shards = [n for n in files if (m := _SHARD.fullmatch(n)) and m[1] == "model-"]
    found = shards or [n for n in files if not _OTHER.fullmatch(n.removesuffix(".safetensors"))]
    if files and not found:
        raise AdapterError(f"{path} has no {SINGLE} and no {INDEX}, but {some(files)}, which is no model by its name")
    for file in found:
        _sound(path, file, files)
    return Chosen(found, False)


def _sound(path: Where, file: str, files: Iterable[str]) -> None:
    if shard := _SHARD.fullmatch(file):
        stem, _, end, count = shard.groups()
        wanted = (f"{stem}{i + 1:05d}{end}" for i in range(int(count)))
        if missing := next((n for n in wanted if n not in files), None):
            raise AdapterError(f"{path / missing} is not there, and {file} is: download it, or {INDEX}")


def holds(name: str) -> bool:
    """Whether a file of this name is what a checkpoint cannot be without."""
    return name.endswith((".safetensors", ".distcp")) or name in OPENS


def checkpoints(names: Iterable[str]) -> set[str]:
    """Those of a folder's files that make it one that may be replaced: weights, what opens them, and an adapter's.

    >>> sorted(checkpoints(["adapter_model.bin", "cat.jpg", "pytorch_model.bin", "tokenizer.json"]))
    ['adapter_model.bin', 'pytorch_model.bin']
    """
    names = list(names)
    alone = sum(n.endswith(".gguf") for n in names) == 1
    return {n for n in names if holds(n) or _MODEL.match(n) or n == OUT and alone}


def unfinished(name: str) -> bool:
    """Whether a file of this name is in the making, or tells of such."""
    return name.endswith(UNFINISHED) or name.startswith((JOURNAL, LEASE))


def instead(there: Iterable[str]) -> str:
    """What a directory without weights has in their place."""
    pickles = [n for n in there if Path(n).suffix in PICKLES]
    return f", but {some(pickles)}: {PICKLE}" if pickles else ""


def former(path: Path, code: Iterable[str] = ()) -> set[str]:
    """What a model in this directory consists of, as `of_model` has it."""
    folders = {entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)}
    names = [name for name in os.listdir(path) if name not in folders]
    for folder in filter(_folders(names), folders):
        names += [p.relative_to(path).as_posix() for p in (path / folder).rglob("*") if not p.is_dir()]
    return of_model([*names, *(n for n in code if "/" in n)], code)


def _folders(names: Collection[str]) -> Callable[[str], bool]:
    """Which folders beside files of these names are a model's."""
    numbered = lambda folder: MODULES in names and bool(_MODULE.fullmatch(folder))
    arrays = lambda folder: TREE in names and folder.startswith(ARRAYS)
    return lambda n: n in FOLDERS or bool(_TOKENIZERS.fullmatch(n)) or numbered(n) or arrays(n)


def of_model(names: Iterable[str], code: Iterable[str] = ()) -> set[str]:
    """Those of a folder's files that are its model's: weights of every kind, and what else Transformers would read.

    code: names of its remote code besides the usual ones. Folders with a purpose of their own are left alone.

    >>> sorted(of_model(["model.safetensors", "config.json", "photo.jpg", "onnx/a", "mine/a"]))
    ['config.json', 'model.safetensors', 'onnx/a']
    """
    names, weights = list(names), WEIGHTS - {".part"}
    named = {*code, NATIVE, SUMS, *(["metadata.json"] if METADATA in names else [])}  # the last is Megatron's
    here = lambda n: holds(n) or Path(n).suffix in weights or n in named or bool(_KINDS.fullmatch(n))
    below = _folders(names)
    return {n for n in names if n in named or (below(n.partition("/")[0]) if "/" in n else here(n))}
