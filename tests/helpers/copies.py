"""Plans carried out in two ways: by the letter of their copies, one at a time in memory, and by the engine, in files.

made = by_copies(plan, tensors)                         # asserts that every element is written exactly once
made, engine = by_engine(plan, tensors, folder, 64)     # the same of bytes, in jobs of at most about 64 of them
"""

import os
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fmoe.checkpoint import Checkpoint
from fmoe.checkpoint.files import disk
from fmoe.checkpoint.stream.engine import Engine
from fmoe.checkpoint.stream.flow import flow
from fmoe.layout.axes import Copy
from fmoe.layout.pipeline import Plan
from fmoe.types import TensorSpec, bits

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in the order of its shape, as integers of their size."""
    return bits(tensor).clone().view(WORDS[tensor.dtype.itemsize])


def apply(copy: Copy, source: Tensor, target: Tensor) -> None:
    """One copy between flat tensors, as the definition of `Copy` has it."""
    there = target.as_strided(copy.shape, copy.target_strides, copy.target_offset)
    there.copy_(source.as_strided(copy.shape, copy.source_strides, copy.source_offset))


def by_copies(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plan's targets, by its flow; asserts that each element of each comes out of it exactly once."""
    found = flow(plan)
    given = {n: words(t) for n, t in tensors.items()}
    out = {n: torch.zeros(spec.numel, dtype=WORDS[spec.dtype.itemsize]) for n, spec in plan.targets.items()}
    times = {n: torch.zeros(spec.numel, dtype=torch.int64) for n, spec in plan.targets.items()}
    used = {step for _, step in found.moves}
    made = {}
    for i, step in enumerate(found.steps):
        assert (i in used) == bool(step.specs), "a step that nobody takes from is carried out"
        inputs = {n: torch.zeros(spec.numel, dtype=WORDS[spec.dtype.itemsize]) for n, spec in step.specs.items()}
        for name, copies in step.gather.items():
            for copy in copies:
                apply(copy, given[copy.source], inputs[name])
        values = {n: t.view(step.specs[n].dtype).reshape(step.specs[n].shape) for n, t in inputs.items()}
        if i in used:
            made[i] = {n: words(t) for n, t in step.change(values).items()}
    for copy, number in found.moves:
        assert copy.dtype == plan.targets[copy.target].dtype
        apply(copy, given[copy.source] if number is None else made[number][copy.source], out[copy.target])
        count = torch.ones((), dtype=torch.int64).expand(copy.shape)
        times[copy.target].as_strided(copy.shape, copy.target_strides, copy.target_offset).add_(count)
    for sources, targets in found.units:
        for name, tensor in plan.run({n: tensors[n] for n in sources}, targets).items():
            out[name].copy_(words(tensor))
            times[name] += 1
    wrong = {n: count.tolist() for n, count in times.items() if not bool((count == 1).all())}
    assert not wrong, f"not written exactly once: {wrong}"
    specs = plan.targets
    return {n: t.view(specs[n].dtype).reshape(specs[n].shape) for n, t in out.items()}


def lay(tensors: Mapping[str, Tensor], folder: Path, shift: int = 0, files: int = 2) -> Checkpoint:
    """Tensors in files of nothing but their bytes, each `shift` bytes behind the one before: no header, no config."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {n: f"{i % files}.safetensors" for i, n in enumerate(tensors)}
    offsets, stamps = {}, {}
    for file in sorted(set(where.values())):
        with open(folder / file, "wb") as out:
            for name in (n for n in tensors if where[n] == file):
                out.write(b"\xee" * shift)
                offsets[name] = out.tell()
                out.write(bits(tensors[name]).numpy().tobytes())
        with open(folder / file, "rb") as opened:
            stamps[file] = disk.Stamp.of(opened.fileno())
    specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    return Checkpoint(folder, {}, specs, where, offsets, stamps)


def by_engine(
    plan: Plan, tensors: Mapping[str, Tensor], folder: Path, limit: int, threads: int = 1, shift: int = 0
) -> tuple[dict[str, Tensor], Engine]:
    """The plan's targets, read back from files; asserts that every byte is written exactly once, and none beside."""
    source = lay(tensors, folder / "in", shift)
    starts, ends = dict[str, tuple[Path, int]](), dict[Path, int]()
    for i, (name, spec) in enumerate(plan.targets.items()):
        path = folder / f"{i % 2}.out"
        starts[name] = path, ends.get(path, 0) + shift
        ends[path] = starts[name][1] + spec.nbytes
    for poison in (b"\x00", b"\xff"):  # what is not written shows as one of them
        for path, size in ends.items():
            path.write_bytes(poison * size)
        engine = Engine(source, plan, starts, limit)
        order = list(engine.items)
        random.Random(limit).shuffle(order)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(engine.run, order))
        made = {}
        for name, spec in plan.targets.items():
            path, at = starts[name]
            data = path.read_bytes()
            assert data[at - shift : at] == poison * shift, f"written before {name}"
            data = bytearray(data[at : at + spec.nbytes])
            raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            made[name] = raw.view(spec.dtype).reshape(spec.shape)
        assert engine.written == plan.nbytes == sum(item.nbytes for item in engine.items)
        assert all(os.path.getsize(path) == size for path, size in ends.items())
    return made, engine
