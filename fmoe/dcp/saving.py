"""Native parameters of many ranks as one checkpoint: every rank writes the boxes it holds into files made for all."""

import hashlib
import os
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fmoe.checkpoint.files.disk import naming
from fmoe.checkpoint.remote.targets import here
from fmoe.checkpoint.save import Job, prepare
from fmoe.checkpoint.staging.journal import ONCE
from fmoe.checkpoint.staging.room import check_space, replaced
from fmoe.checkpoint.staging.staging import staging
from fmoe.checkpoint.stream.written import write_at
from fmoe.codecs.survival import Survival, told
from fmoe.dcp.boxes import alive, first_of_copies, pieces, run_starts, surfacing
from fmoe.families.kind import Family
from fmoe.layout.adapter import Adapter
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError, Params, bits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Written(int):
    """How many bytes a rank wrote. notes: what else one should know, as in `fmoe.Report`."""

    notes: tuple[str, ...] = ()


def save(
    params: Params,
    path: Path | str,
    adapter: Adapter | Family | None = None,
    layout: Literal["hf", "native"] = "hf",
    max_shard_size: int | str = "5GB",
    *,
    force: bool = False,
    fsync: bool = True,
    process_group: "ProcessGroup | None" = None,
    quantization: bool | None = None,
) -> Written:
    """path = to_hf(params), as `fmoe.save`, of DTensors too: one checkpoint, with its index, whatever the mesh.

    Returns the bytes that this rank wrote, an int with the notes of `fmoe.save`'s report. The first rank makes the
    files and gives them their names in the end, every rank writes into them the boxes that it holds, and of what
    several ranks hold the first of them: path is the same directory for all ranks, and no tensor is gathered. All ranks
    of the process group call this, with the same names and shapes.

    quantization: as in `fmoe.save`. Raises AdapterError, on all ranks, where the parameters do not convert, path may
    not be written to, any rank cannot write, or what was changed since it was decoded would be lost in codes; path is
    then as it was.

    >>> import fmoe, tempfile, torch
    >>> adapter, block = fmoe.adapter("per_expert", {"model_type": "per_expert"}), "model.layers.0.mlp.experts"
    >>> params = {f"{block}.gate_and_up_projs": torch.ones(4, 2, 6), f"{block}.down_projs": torch.ones(4, 3, 2)}
    >>> with tempfile.TemporaryDirectory() as path:
    ...     fmoe.dcp.save(params, path, adapter), len(fmoe.load(path))
    (288, 2)
    """
    with ExitStack() as stack, alive(process_group), surfacing(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ")
        planner = _Planner(params, here(path, "parameters"), adapter, layout, max_shard_size, quantization=quantization)
        writer = _Writer(planner, stack, force, fsync)
        dcp.save({}, storage_writer=writer, planner=planner, process_group=process_group)
    return writer.done


class _Planner(SavePlanner):
    """What every rank would write. DCP's own plan stays empty: boxes are found as they are written."""

    job: Job
    first = False

    def __init__(self, params: Params, path: Path, *how: Any, quantization: bool | None):
        self.params, self.path, self.how, self.quantization = params, path, how, quantization
        self.survived: list[Survival] = []

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.first = is_coordinator

    def create_local_plan(self) -> SavePlan:
        how: Any = dict(sharded=True, quantization=self.quantization, survived=self.survived.append)
        self.job = prepare(self.params, self.path, *self.how, **how)
        told = f"{sorted(self.job.plan.targets.items())}{self.job.files.files}"
        return SavePlan([], planner_data=hashlib.sha256(told.encode()).hexdigest())

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        odd = [rank for rank, plan in enumerate(all_plans) if plan.planner_data != all_plans[0].planner_data]
        if odd:
            raise AdapterError(f"ranks {odd} hold other names, shapes or dtypes than rank 0: expected the same on all")
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        raise NotImplementedError("the writer takes tensors from the job")


class _Writer(dcp.StorageWriter):
    """done: the bytes that this rank wrote."""

    def __init__(self, planner: _Planner, stack: ExitStack, force: bool, fsync: bool):
        self.planner, self.stack, self.force, self.fsync = planner, stack, force, fsync
        self.done = Written(0)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        job, path = self.planner.job, self.planner.path
        claim = lambda: replaced(path, None, self.force, bystanders=True)
        claim()
        check_space(path, sum(size for _, size in job.files.heads.values()))
        self.stage = self.stack.enter_context(staging(path, ONCE, claim, fsync=self.fsync, resumable=False))
        self.stage.begin(job.files.heads, job.small)
        parts = {file: str(self.stage.part(file)) for file in job.files.heads}
        gone = job.former(path, self.stage.old)
        return [replace(plan, storage_data=(parts, gone)) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        job, params = self.planner.job, self.planner.params
        files, gone = plan.storage_data
        parts, nbytes = {file: Path(part) for file, part in files.items()}, 0
        for sources, targets in job.plan.units():
            mine = self.planner.first or any(is_dtensor(params[n]) for n in sources)
            made = job.plan.run({n: params[n] for n in sources}, targets) if mine else {}
            for name, tensor in made.items():
                if not is_dtensor(tensor) or first_of_copies(tensor):
                    nbytes += _write(parts[job.files.files[name]], job.files.starts[name], tensor)
        self.done = Written(nbytes)
        self.done.notes = (*job.notes, *told(self.planner.survived), *gone)
        for part in parts.values() if self.fsync else ():
            with naming(part), open(part, "rb") as file:
                os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for name, text in self.planner.job.small.items():
            self.stage.fill(name, text.encode())
        self.stage.publish()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _write(part: Path, start: int, tensor: Any) -> int:
    """This rank's boxes of a tensor, into the file where it begins at start; how many bytes they are."""
    nbytes = 0
    with open(part, "r+b", buffering=0) as out:
        for offsets, _, piece in pieces(tensor):
            starts, length = run_starts(tensor.shape, offsets, piece.shape)
            data, n = bits(piece.cpu()), length * piece.element_size()
            for i, at in enumerate(starts if n else ()):
                write_at(part, out.fileno(), data[i * n : (i + 1) * n], start + at * piece.element_size())
            nbytes += data.numel()
    return nbytes
