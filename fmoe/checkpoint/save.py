"""Native parameters as a directory: shards and an index that Transformers and fmoe read."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fmoe.checkpoint.files.directory import DTYPES, INDEX, NATIVE
from fmoe.checkpoint.files.origin import origin_text
from fmoe.checkpoint.files.strict import read
from fmoe.checkpoint.files.writer import Layout, shard
from fmoe.checkpoint.open import adapter as adapter_at
from fmoe.checkpoint.open import as_own
from fmoe.checkpoint.remote.targets import here
from fmoe.checkpoint.report import Progress, Report
from fmoe.checkpoint.sides import unnamed_choices
from fmoe.checkpoint.staging.beside import of_the_former, removed
from fmoe.checkpoint.staging.journal import ONCE
from fmoe.checkpoint.staging.room import check_space, replaced, size_of
from fmoe.checkpoint.staging.staging import staging
from fmoe.checkpoint.staging.whose import alike, one_model, otherwise, unknown
from fmoe.checkpoint.stream.carry import in_order, pool
from fmoe.checkpoint.stream.written import write_at
from fmoe.checkpoint.told import listing, unread
from fmoe.checkpoint.whole import as_they_are, json_of, narrowed, no_part, read_again, whole_saved
from fmoe.codecs.cast import wider_than_said
from fmoe.codecs.survival import Survival, telling, told
from fmoe.families.kind import Family
from fmoe.layout.adapter import Adapter
from fmoe.layout.eager.kinds import unwritable
from fmoe.layout.pipeline import Plan
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError, Params, Problem, bits

CONFIG = "config.json"
NEEDED = f"no {CONFIG}, of which an adapter of your own knows nothing: fmoe.load(..., adapter=) reads it as it is"


def save(
    params: Params,
    path: Path | str,
    adapter: Adapter | Family | None = None,
    layout: Literal["hf", "native"] = "hf",
    max_shard_size: int | str = "5GB",
    *,
    force: bool = False,
    fsync: bool = True,
    threads: int | None = None,
    progress: Progress = lambda done, of: None,
    quantization: bool | None = None,
    **axis_ranges: range,
) -> Report:
    """path = to_hf(params) as safetensors files of at most max_shard_size, with their index; atomic and deterministic.

    layout: "native" writes params as they are; `fmoe.convert` and `fmoe.load` read both. adapter: as `fmoe.adapter`
    gave it, whose config is written as config.json where path has none; without one, that of path's config.json.
    force: replace the checkpoint that path holds: weights of any kind, and the LoRA adapter that Transformers would put
    onto them; the notes name what is gone. Config, tokenizer and all other files stay in any case; where they may be
    another model's, the notes name them too.
    axis_ranges: which experts these parameters hold, as `e=range(16, 32)`, if not all, in layout "native": `fmoe.load`
    gives them back.
    quantization: as in `Adapter.to_hf`; config.json says what is written. Of weights that were changed since they were
    decoded, as by a merge, and become codes again, the report's notes say how much of the change survives, and
    AdapterError where next to nothing does: quantization=False writes them as they are.

    Raises AdapterError before anything is written where the parameters do not convert, lack a tensor that the config's
    model has (`fmoe.load` would refuse them), or path may not be written to.

    >>> import fmoe, tempfile, torch
    >>> adapter = fmoe.rule("layers.{l}.w.{e} [i d]", "layers.{l}.w [e d i]") | fmoe.keep("{rest}")
    >>> with tempfile.TemporaryDirectory() as path:
    ...     report = fmoe.save({"layers.0.w": torch.ones(2, 3, 4), "norm": torch.ones(3)}, path, adapter)
    ...     sorted(file.name for file in Path(path).iterdir()), report.made, report.written
    (['model.safetensors'], 3, 108)
    """
    path = here(path, "parameters")
    claim = lambda: replaced(path, None, force, bystanders=True)
    survived: list[Survival] = []
    how: Any = dict(claim=claim, quantization=quantization, survived=survived.append)
    job = prepare(params, path, adapter, layout, max_shard_size, axis_ranges, **how)
    adapter, plan, files, small, found, _ = job
    check_space(path, sum(size for _, size in files.heads.values()))
    done, of = 0, plan.nbytes
    progress(0, of)
    with staging(path, ONCE, claim, fsync=fsync, resumable=False) as stage:
        stage.begin(files.heads, small)
        parts = {n: stage.part(file) for n, file in files.files.items()}

        def write(unit: tuple[list[str], list[str]]) -> int:
            made = plan.run({n: params[n] for n in unit[0]}, unit[1])
            for name, tensor in made.items():
                with open(parts[name], "r+b", buffering=0) as out:
                    write_at(parts[name], out.fileno(), bits(tensor.cpu()), files.starts[name])
            return sum(t.nbytes for t in made.values())

        with pool(threads) as executor:
            for _, nbytes in in_order(executor, write, plan.units(), ahead=4):
                done += nbytes
                progress(done, of)
        notes = (*found, *told(survived), *job.former(path, stage.old))
        for name, text in small.items():
            stage.fill(name, text.encode())
        stage.publish()
    kind = str((adapter.config or {}).get("model_type", ""))
    nbytes = sum(tensor.nbytes for tensor in params.values())
    counts = len(params), nbytes, len(plan.targets), adapter, len(files.heads), 0, done
    return Report(str(path), kind, *counts, notes=notes)


class Job(NamedTuple):
    """What is to be written: the plan's targets, laid out in files, and small files beside them; notes on it.

    own: the config that is there is this model's, so that what lies beside it is too.
    """

    adapter: Adapter
    plan: Plan
    files: Layout
    small: dict[str, str]
    notes: tuple[str, ...]
    own: bool

    def former(self, path: Path, replaced: Iterable[str]) -> list[str]:
        """Notes on what goes of the model that was there, and, where it was another, on what stays of it."""
        written = {*self.files.heads, *self.small}
        return (removed if self.own else partial(of_the_former, path))(replaced, written)


def prepare(
    params: Params,
    path: Path,
    adapter: Adapter | Family | None,
    layout: str,
    max_shard_size: int | str,
    axis_ranges: Mapping[str, range] | None = None,
    *,
    claim: Callable[[], object] = lambda: None,
    sharded: bool = False,
    quantization: bool | None = None,
    survived: Callable[[Survival], None] | None = None,
) -> Job:
    """All that `save` does before it writes. Raises AdapterError; claim, once parameters may be fit, may do so too."""
    if layout not in ("hf", "native"):
        raise AdapterError(f"layout={layout!r}: expected 'hf' or 'native'")
    if not isinstance(params, Mapping):
        raise AdapterError(f"a {type(params).__name__}, expected a dict of names to tensors")
    if problems := [problem for n, t in params.items() for problem in _unfit(n, t, sharded)]:
        raise AdapterError(problems)
    adapter = _adapter(path, adapter)
    ranges = narrowed(str((adapter.config or {}).get("model_type")), adapter.config or {}, axis_ranges or {})
    if layout == "hf":
        no_part(path, ranges)
    adapter = adapter if quantization is None else adapter.choose(quantization=quantization)
    adapter = telling(adapter, survived)
    claim()
    hf = adapter._to_hf_plan(params, None, ranges)
    back = adapter._plan(hf.targets, ranges, frozenset(ranges))  # and what is written can be read
    plan = hf if layout == "hf" else as_they_are(params, back.targets, quantization)
    files = Layout.of(plan.targets, shard(plan.targets, size_of(max_shard_size)), {})
    small = {INDEX: files.index} if files.index else {}
    if layout == "native":
        small[NATIVE] = _origin(hf, size_of(max_shard_size), ranges, unnamed_choices(adapter, [*hf.targets]))
    there = _config(path)
    config = adapter.config if there is None else there
    notes = [*hf.notes]
    if config is None:
        notes.append(NEEDED)
    else:
        one_model(path / CONFIG, config, adapter.config or {})
        notes += unknown(path / CONFIG, config, adapter.config or {})
        notes += otherwise(path / CONFIG, there, adapter.config)
        agreed = listing(config, adapter.inverse, hf.targets)
        notes += whole_saved(path, config, adapter, hf.targets, ranges)
        if layout == "hf":
            read_again(agreed, adapter.config or {}, hf.targets)
            fresh = back.targets.keys() - params.keys()  # scales that no parameter carries
            notes += unread(agreed, adapter.config or {}, hf.targets) if fresh else []
            notes += wider_than_said(hf.targets, agreed)
        if agreed != there:
            small[CONFIG] = json_of(agreed).decode()
    return Job(adapter, plan, files, small, tuple(notes), alike(there, adapter.config))


def _config(path: Path) -> dict[str, Any] | None:
    """The config that is there, and stays. Raises AdapterError for a config.json that nobody reads."""
    return read(path / CONFIG, infinite=True)[0] if os.path.lexists(path / CONFIG) else None


def _unfit(name: str, tensor: Any, sharded: bool) -> Iterator[Problem]:
    """What keeps a parameter from being written."""
    if is_dtensor(tensor) and not sharded:
        yield Problem(f"{name!r} is a DTensor: save what `full_tensor()` gives, or call fmoe.dcp.save", (name,))
    elif is_dtensor(tensor) and any(p.is_partial() for p in tensor.placements):
        yield Problem(f"{name!r} is {tensor.placements}: expected no sum still to be made", (name,))
    elif isinstance(tensor, Tensor) and tensor.is_meta:
        yield Problem(f"{name!r} is on the device meta: expected a tensor with values", (name,))
    elif isinstance(tensor, Tensor) and tensor.dtype not in DTYPES.values():
        yield Problem(f"{name!r} is {tensor.dtype}, which safetensors has no code for: cast it", (name,))
    elif isinstance(tensor, Tensor) and not is_dtensor(tensor) and (why := unwritable(tensor)):
        yield Problem(f"{name!r} {why}", (name,))


def _adapter(path: Path, adapter: Adapter | Family | None) -> Adapter:
    adapter = None if adapter is None else as_own(adapter)
    if isinstance(adapter, Family):
        return adapter.adapter(_config(path))
    if adapter is not None:
        return adapter
    if (config := _config(path)) is None:
        raise AdapterError(f"which family? pass adapter=fmoe.adapter(...), or put a {CONFIG} into {path}")
    return adapter_at(str(config.get("model_type")), config)


def _origin(hf: Plan, most: int, ranges: Mapping[str, range], choices: Mapping[str, Any]) -> str:
    """What the native directory would have been made from."""
    files = Layout.of(hf.targets, shard(hf.targets, most), {})
    plain = dict.fromkeys(files.heads, {"format": "pt"})
    return origin_text(files.files, hf.nbytes, files.index, {**choices, **ranges}, plain).decode()
