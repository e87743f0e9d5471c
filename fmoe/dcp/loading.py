"""Hugging Face files into native parameters that exist: read items for their views, and a reader that maps files."""

import io
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.files.mapped import Maps, fetch, mapped
from fmoe.checkpoint.load import inputs, unfilled, value
from fmoe.checkpoint.open import adapter_of
from fmoe.checkpoint.remote.address import where
from fmoe.checkpoint.stream.overlaps import overlapping, without_twins
from fmoe.checkpoint.stream.slices import read
from fmoe.checkpoint.which import open_ours
from fmoe.checkpoint.whole import warned, whole
from fmoe.dcp.boxes import alive, pieces, surfacing
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import as_adapter
from fmoe.layout.sharded.placements import indices_of
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError, Params, Problem, TensorSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def load(
    params: Params,
    path: Path | str,
    adapter: Adapter | None = None,
    *,
    process_group: "ProcessGroup | None" = None,
) -> None:
    """params = from_hf(the tensors of path), in place: plain tensors whole, of DTensors this rank's part, on any mesh.

    Every rank reads its own bytes only, straight into the storage of its parameters; what is decoded (FP8) is made in
    memory, one native tensor at a time. All ranks of the process group call this. adapter: as `fmoe.adapter(path)`, or
    one that casts. path: a HF directory, or a native one.

    Raises AdapterError, on all ranks, where parameters and checkpoint do not fit, or any rank cannot read. The first
    rank warns as `fmoe.load` does.

    >>> import fmoe, fmoe.dcp, tempfile
    >>> adapter = fmoe.adapter("per_expert", {"model_type": "per_expert"})
    >>> block = "model.layers.0.mlp.experts"
    >>> params = {f"{block}.gate_and_up_projs": torch.ones(4, 2, 6), f"{block}.down_projs": torch.ones(4, 3, 2)}
    >>> blank = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    >>> with tempfile.TemporaryDirectory() as path:
    ...     _ = fmoe.dcp.save(params, path, adapter)
    ...     fmoe.dcp.load(blank, path)
    >>> all(torch.equal(blank[name], params[name]) for name in params)
    True
    """
    planner, reader = Planner(params, adapter), Reader(path)
    planner.reader = reader
    with alive(process_group), surfacing(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ")
        dcp.load({}, storage_reader=reader, planner=planner, process_group=process_group)
    warned(planner.notes if planner.first else ())


class Planner(LoadPlanner):
    """Read items from HF tensors into views of params: `torch.distributed.checkpoint.load({}, planner=Planner(...))`.

    For any storage reader of whole HF tensors, such as HuggingFaceStorageReader; none of these decodes, so what is
    quantised needs `fmoe.dcp.load`. adapter: needed where it is used so.
    """

    reader: "Reader | None" = None

    def __init__(self, params: Params, adapter: Adapter | None = None):
        self.params, self.adapter = params, None if adapter is None else as_adapter(adapter)
        self.notes: tuple[str, ...] = ()

    def set_up_planner(
        self, state_dict: Mapping[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.first, found = is_coordinator, metadata.state_dict_metadata if metadata else {}
        tensors = {n: t for n, t in found.items() if isinstance(t, TensorStorageMetadata)}
        self.specs = {n: TensorSpec(tuple(t.size), t.properties.dtype) for n, t in tensors.items()}

    def create_local_plan(self) -> LoadPlan:
        adapter = self.adapter
        if self.reader is not None:
            source = self.reader.open(own=adapter is not None and adapter.config is None)
            self.specs = source.specs
            adapter = Adapter() if source.native else adapter or adapter_of(source)
        if adapter is None:
            raise AdapterError("which family? pass adapter=fmoe.adapter(...)")
        self.adapter = adapter = adapter.resolve(self.specs)
        self.plan = adapter.plan(self.specs)
        if self.reader is not None and (source.native or adapter.config is not None):  # else rules of one's own
            self.notes = whole(source, self.plan.targets)
        self.params = without_twins(self.params, self.plan.targets)
        same = None if self.reader is None else lambda name: value(source, self.plan, name, None)
        problems = [*unfilled(self.plan, self.params, "params"), *_sums(self.params), *overlapping(self.params, same)]
        if problems:
            raise AdapterError(problems)
        self.views, self.made = _views(adapter, self.params)
        if self.made and self.reader is None:
            text = f"{', '.join(sorted(self.made)[:3])}: computed from what is stored, not a view of it: fmoe.dcp.load"
            raise AdapterError([Problem(text, tuple(self.made))])
        return LoadPlan([item for n, view in self.views.items() for item in _items(n, view)])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self.views[read_item.dest_index.fqn]
        part = (view.to_local() if is_dtensor(view) else view).detach()
        for dim, (at, n) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, at, n)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AdapterError(f"{read_item.storage_index.fqn!r} is no tensor")


def _sums(params: Params) -> Iterator[Problem]:
    for name, tensor in params.items():
        if is_dtensor(tensor) and any(p.is_partial() for p in tensor.placements):
            yield Problem(f"{name!r} is {tensor.placements}: expected no sum, there is no part of one to load", (name,))


def _views(adapter: Adapter, params: Params) -> tuple[dict[str, Any], set[str]]:
    """The HF tensors that are views of the parameters, and the parameters that are not made of such."""
    back, views, made = adapter._to_hf_plan(params, None, {}), dict[str, Any](), set[str]()
    for sources, targets in back.units():
        try:
            views |= back.run({n: params[n] for n in sources}, targets, views=True)
        except AdapterError:
            made |= set(sources)
    return views, made


def _items(name: str, view: Any) -> Iterator[ReadItem]:
    for offsets, at, part in pieces(view):
        if part.numel():
            yield ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(name),
                dest_offsets=torch.Size(at),
                storage_index=MetadataIndex(name, [0] * part.ndim),
                storage_offsets=torch.Size(offsets),
                lengths=part.shape,
            )


class Reader(dcp.HuggingFaceStorageReader):
    """Reads by mapping, or by ranges from elsewhere: of a tensor's box no bytes beside it."""

    def __init__(self, path: Path | str):
        self.directory = where(path)
        super().__init__(str(path) if isinstance(self.directory, Path) else ".")
        self.source: Checkpoint | None = None

    def open(self, own: bool = False) -> Checkpoint:
        self.source = self.source or open_ours(self.directory, "load", own)
        return self.source

    def read_metadata(self) -> Metadata:  # the planner opens the files: what is wrong with them is then told by it
        return Metadata({}, storage_data={})

    @torch.no_grad()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert isinstance(planner, Planner) and self.source is not None and planner.adapter is not None
        maps = Maps() if isinstance(self.directory, Path) else None
        for item in plan.items:
            name, box = item.storage_index.fqn, partial(_box, item=item)
            if maps is None:
                part = box(read(self.source, [name], {name: box})[name])
            else:
                part = box(mapped(self.source, [name], maps)[name])
                fetch(self.source, name, part, maps)
            planner.resolve_tensor(item).copy_(part)
        self._make(planner, maps)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _make(self, planner: Planner, maps: Maps | None) -> None:
        """The parameters that are computed: of the experts that this rank has, in whole, then cut as they are."""
        assert self.source is not None and planner.adapter is not None
        stacks, ranges = planner.plan.stacks("e"), dict[range | None, set[str]]()
        for name in planner.made:
            ranges.setdefault(_experts(planner.params[name]) if name in stacks else None, set()).add(name)
        for mine, names in ranges.items():
            plan = planner.plan if mine is None else planner.adapter.plan(self.source.specs, e=mine)
            for sources, targets in plan.units():
                if wanted := [n for n in targets if n in names]:
                    made = plan.run(inputs(self.source, plan, sources, maps), wanted)
                    for name in wanted:
                        _fill(planner.params[name], made[name], mine is not None)


def _box(tensor: Tensor, *, item: ReadItem) -> Tensor:
    """The part of a whole tensor that an item asks for."""
    for dim, (at, n) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        tensor = tensor.narrow(dim, at, n)
    return tensor


def _experts(param: Any) -> range | None:
    """The experts of a stack of which this rank has a part, where they are a range and not all."""
    held = indices_of(param)[0] if is_dtensor(param) else ()
    return held if isinstance(held, range) and 0 < len(held) < len(param) else None


def _fill(param: Any, made: Tensor, narrowed: bool) -> None:
    """A parameter, from the whole tensor, or from the experts of it that it has."""
    for dim, held in enumerate(indices_of(param) if is_dtensor(param) else ()):
        if len(held) < param.shape[dim] and not (narrowed and dim == 0):
            made = made.index_select(dim, torch.tensor(held, dtype=torch.int64))
    (param.to_local() if is_dtensor(param) else param).copy_(made)
