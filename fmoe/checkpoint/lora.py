"""PEFT's directories: adapter_model.safetensors and adapter_config.json, as native LoRA matrices and back."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.directory import Checkpoint, read_header
from fmoe.checkpoint.files.strict import read
from fmoe.checkpoint.files.weights import ADAPTER, JOURNAL, instead, no_model
from fmoe.checkpoint.files.writer import Layout
from fmoe.checkpoint.open import adapter as adapter_at
from fmoe.checkpoint.open import hf_names
from fmoe.checkpoint.remote.address import place
from fmoe.checkpoint.remote.targets import here
from fmoe.checkpoint.staging.few import written
from fmoe.checkpoint.stream.written import write_at
from fmoe.checkpoint.which import open_ours
from fmoe.families import opened
from fmoe.families.spelling import adapted, alike
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import as_adapter
from fmoe.layout.claims import some
from fmoe.layout.eager.kinds import unwritable
from fmoe.layout.notation import Rule
from fmoe.lowrank.config import LoraConfig
from fmoe.lowrank.halves import pared, whole
from fmoe.lowrank.lacking import lacking
from fmoe.lowrank.matrices import attention, is_copy, matrices, with_fixes
from fmoe.lowrank.said import config_of
from fmoe.lowrank.scales import Scales
from fmoe.lowrank.sorting import WRAPPED
from fmoe.lowrank.stage import LoraTable, is_lora
from fmoe.lowrank.targets import ranked, scales_of, told
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError, Params, Problem, TensorSpec, bits

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
STAMP = "automodel_peft_config.json"
"""Where NeMo Automodel says which PEFT its directory is like; its adapter_config.json has no `peft_version`."""
FORMER = ("adapter_model.bin", STAMP)
"""Other files of an adapter that is replaced: PEFT's older ones, and what would be read beside the new ones."""
LIKE = {"peft-0.18": "0.18.1", "peft-0.19.1": "0.19.1"}


class Tuned(NamedTuple):
    """What a PEFT directory holds: native LoRA matrices, its config, and the adapter that gives the same files back."""

    params: dict[str, Tensor]
    config: LoraConfig
    adapter: Adapter

    @property
    def scales(self) -> Scales:
        """alpha / r of every matrix A, by its name; how gate and up lie in its B; and which native weight it adapts."""
        same = partial(alike, self.adapter.config or {})
        return scales_of(self.params, self.config, self.adapter, opened(self.adapter), same)

    def __repr__(self) -> str:
        r, alpha = self.config.r, self.config.lora_alpha
        return f"Tuned({len(self.params)} tensors, r={r}, lora_alpha={alpha}, {self.adapter!r})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def load(path: Path | str, base: "Adapter | str | Path | None" = None, config: Any = None) -> Tuned:
    """The native LoRA matrices of a PEFT directory, in either form, with names below PEFT's `base_model.model.`.

    base: the model that it adapts: its directory, its model_type (with its config), or its adapter; by default the
    directory that adapter_config.json names. Which matrix is A follows its `peft_version`, or the stamp that NeMo
    Automodel leaves beside it, what a lone wrapper wraps its `target_parameters`, how B is packed its `lora_B_layout`.
    Raises AdapterError with every problem: matrices that the config targets and the file lacks, foreign ones, ranks
    other than the config's, settings that two matrices cannot express.
    What should be there is known by the names of the base's files; without them by its class; without that by other
    layers. A tower that is lost as a whole is not missed, nor are all experts one by one under a target as "up_proj":
    other modules meet it.

    >>> import fmoe, tempfile, torch
    >>> made = fmoe.lora.init({"layers.0.mlp.experts.down_projs": torch.ones(2, 3, 4)}, r=2)
    >>> base = fmoe.adapter("qwen3_moe", {"num_experts": 2, "hidden_size": 4, "moe_intermediate_size": 3})
    >>> with tempfile.TemporaryDirectory() as path:
    ...     _ = fmoe.lora.save(made, path, base, lora_alpha=4)
    ...     tuned = fmoe.lora.load(path, base)
    >>> tuned.scales, tuned.config.target_parameters
    ({'base_model.model.layers.0.mlp.experts.lora_down_A': 2.0}, ('layers.0.mlp.experts.down_proj',))
    """
    place(path)
    path = Path(path)
    if (path / JOURNAL).exists():
        raise AdapterError(f"{path} is unfinished: {JOURNAL} tells of a save that was interrupted. Fix: save it again")
    said = _stamped(LoraConfig.read(_json(path / CONFIG)), path / STAMP)
    base, names = said.base if base is None else base, None
    if isinstance(base, Adapter):
        if config is not None:
            raise AdapterError("lora.load: config is given beside an adapter, which has its own. Fix: leave it out")
    else:
        if base is not None:
            place(base)
        if base is None or config is None and not Path(base).is_dir():
            found = f"{path / CONFIG} names the model {base!r}, which is no directory here"
            raise AdapterError(f"{found}: pass base=, a directory, an adapter, or a model_type with its config")
        names = hf_names(open_ours(base, "open")) if Path(base).is_dir() else None
        base = adapter_at(base, config)
    base = _as(base, said)
    header = read_header(path / WEIGHTS, f"is not there{instead(os.listdir(path))}")
    files = dict.fromkeys(header.specs, WEIGHTS)
    source = Checkpoint(path, {}, header.specs, files, header.offsets, {WEIGHTS: header.stamp})
    tensors = source.read(files)
    if alone := tuple(n for n in tensors if not is_lora(n) and not is_copy(n, tensors)):
        text = f"{some(alone)}: no matrix A or B, expected those alone. Fix: merge it with PEFT (merge_and_unload)"
        raise AdapterError([Problem(text, alone)])
    if problems := [*attention(tensors)]:
        raise AdapterError(problems)
    with with_fixes():
        adapter = base.resolve(tensors)
        params = _native(adapter, tensors, said)
    if problems := lacking(params, said, adapter, names):
        raise AdapterError(problems)
    return Tuned(params, said, adapter)


def _as(adapter: Adapter, said: LoraConfig) -> Adapter:
    """The adapter, open but for what a config says of its LoRA tensors: r too, where no pattern can be of experts."""
    experts = {*re.findall(r"\w+", " ".join(map(str, (*said.target_parameters, *_singly(adapter)))))}
    beside = lambda pattern: bool(re.fullmatch(r"[\w.]+", pattern)) and pattern.rpartition(".")[2] not in experts
    rank = said.r if all(map(beside, said.rank_pattern)) else None
    return told(adapter, said.peft_version, said.target_parameters, rank, grouped=said.grouped)


def _native(adapter: Adapter, tensors: Mapping[str, Tensor], said: LoraConfig) -> dict[str, Tensor]:
    """The native matrices of a file's. Raises AdapterError for what is no A and B of a pair."""
    params = adapter.from_hf(whole(_singly(adapter), tensors, said))
    list(matrices(params))
    return params


def _singly(adapter: Adapter) -> tuple[Rule, ...]:
    """The rules of experts one by one."""
    return next((s.forms.per_expert for s in adapter.stages if isinstance(s, LoraTable) and s.forms.per_expert), ())


def _stamped(said: LoraConfig, path: Path) -> LoraConfig:
    """The config, its release the one that the stamp of a directory of Automodel names, if there is one."""
    layout = _json(path).get("paramwrapper_layout") if os.path.lexists(path) else None
    if layout is None:
        return said
    if layout not in LIKE:
        raise AdapterError(f"{path}: paramwrapper_layout is {layout!r}, expected {' or '.join(map(repr, LIKE))}")
    return replace(said, peft_version=LIKE[layout])


def save(
    params: Params,
    path: Path | str,
    adapter: Adapter,
    config: LoraConfig | None = None,
    *,
    lora_alpha: float = 32,
    base: str | None = None,
    force: bool = False,
) -> LoraConfig:
    """path = adapter_model.safetensors and adapter_config.json of native LoRA matrices, for PEFT and for `load`.

    adapter: the model's, as `fmoe.adapter` gives it: `lora=` and `peft_version=` there say in which form. config: what
    adapter_config.json shall say; without one, it is made: every wrapped parameter by its full name, the rank that most
    have, others in rank_pattern, and lora_alpha, so that each scale is lora_alpha / r as in `fmoe.experts`. Where the
    base's class does not tell whether matrices adapt a module or a parameter, or where that is a stack of no experts, a
    config has to be given. base: the model's path or hub name. Names get PEFT's `base_model.model.` where they lack it,
    and are those of the model in memory, unless a config says its own. force: replace the adapter that is there; never
    a model: in its own directory Transformers would load the adapter over it.
    Returns the config. Raises AdapterError before anything is written.

    >>> import fmoe, fmoe.docs, tempfile
    >>> adapter, lora = fmoe.adapter(fmoe.docs.example()), fmoe.lora.init(fmoe.load(fmoe.docs.example()), r=4)
    >>> with tempfile.TemporaryDirectory() as path:
    ...     save(lora, path, adapter, lora_alpha=8).r
    4
    """
    path, adapter = here(path, "adapters"), as_adapter(adapter)
    if not isinstance(params, Mapping):
        raise AdapterError(f"a {type(params).__name__}, expected a dict of names to tensors")
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        found = "a file" if path.exists() else "a link to nowhere"
        raise AdapterError(f"{path} is {found}, expected a directory for {WEIGHTS} and {CONFIG}")
    no_model(path)
    if other := [n for n in params if not (is_lora(n) or n.startswith(WRAPPED))]:
        raise AdapterError(
            [Problem(f"{some(other)}: no LoRA tensors; save the model's weights by fmoe.save", (*other,))]
        )
    if foreign := [n for n, t in params.items() if not isinstance(t, Tensor)]:
        kind = type(params[foreign[0]]).__name__
        raise AdapterError([Problem(f"{some(foreign)}: {kind}, expected tensors", (*foreign,))])
    bare = {n.removeprefix(WRAPPED): t for n, t in params.items()}
    params = {WRAPPED + (n if config is not None else alike(adapter.config or {}, n)[-1]): t for n, t in bare.items()}
    if odd := [n for n, t in params.items() if is_dtensor(t) or t.is_meta]:
        where = "a DTensor: save what `full_tensor()` gives" if is_dtensor(params[odd[0]]) else "on the device meta"
        raise AdapterError([Problem(f"{some(odd)}: {where}, expected plain tensors with values", (*odd,))])
    if told := [Problem(f"{n!r} {why}", (n,)) for n, t in params.items() if (why := unwritable(t))]:
        raise AdapterError(told)
    adapter = ranked(adapter, params) if config is None else _as(adapter, config)
    tensors = adapter.to_hf(params)
    if config is None:
        config = config_of(params, adapter, lora_alpha, base, partial(adapted, adapter.config or {}))
    elif base is not None:
        config = replace(config, base=base)
    back, tensors = _as(adapter, config), pared(_singly(adapter), tensors, config)
    _native(back, tensors, config)  # what is written can be read
    if problems := lacking(params, config, back.resolve(tensors)):
        raise AdapterError(problems)
    text = json.dumps(config.json(), indent=2) + "\n"
    put = {WEIGHTS: lambda part: _saved(tensors, part), CONFIG: lambda part: part.write_text(text)}
    written(path, put, force, FORMER)
    return config


def _saved(tensors: Params, path: Path) -> None:
    """As the safetensors library writes it, which tells no error of the system by its number, nor clears away."""
    layout = Layout.of(
        {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()}, dict.fromkeys(tensors, ""), {}
    )
    with open(path, "wb", buffering=0) as out:
        disk.write_at(path, out.fileno(), memoryview(layout.heads[""][0]), 0)
        for name, tensor in tensors.items():
            write_at(path, out.fileno(), bits(tensor.cpu()), layout.starts[name])


def _json(path: Path) -> dict[str, Any]:
    return read(path, "is missing: a PEFT directory has one", infinite=True)[0]
