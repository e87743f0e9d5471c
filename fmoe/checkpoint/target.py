"""What a directory of another system consists of: its layout, its config, and the small files that go along."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmoe.checkpoint.files.containers.gguf_files import SUFFIX
from fmoe.checkpoint.files.containers.gguf_written import Like, gguf_layout
from fmoe.checkpoint.files.containers.gguf_written import like as like_of
from fmoe.checkpoint.files.containers.orbax_written import orbax_layout
from fmoe.checkpoint.files.containers.written import dcp_layout
from fmoe.checkpoint.files.directory import INDEX, Checkpoint
from fmoe.checkpoint.files.disk import content, write_at
from fmoe.checkpoint.files.weights import ADAPTER, OUT
from fmoe.checkpoint.files.writer import Layout, shard
from fmoe.checkpoint.staging.unfinished import Staging
from fmoe.checkpoint.told import listing
from fmoe.checkpoint.whole import json_of
from fmoe.codecs.config import FIELDS, QUANTS, coded, decoded
from fmoe.codecs.quantised import Quantised
from fmoe.families import family
from fmoe.layout.adapter import Adapter
from fmoe.layout.grouping import Specs
from fmoe.layout.pipeline import Plan
from fmoe.systems import SYSTEMS
from fmoe.types import AdapterError

ALONG = (".json", ".txt", ".model", ".jinja")
KEPT_OUT = ("metadata.json", "common.pt", "latest_checkpointed_iteration.txt")


def model_of(to: str, dst: Path, given: Path | str | None) -> Like | None:
    """The GGUF file whose metadata a new one takes."""
    if to != "gguf":
        if given is not None:
            raise AdapterError(f"like={str(given)!r} with to={to!r}: expected to='gguf', which takes its metadata")
        return None
    if dst.suffix == SUFFIX:
        raise AdapterError(f"{dst}: name the directory to write, in which {OUT} will lie")
    return like_of(given)


def layout_of(plan: Plan, of: Specs, to: str, most: int, model: Like | None) -> tuple[Layout, dict[str, bytes]]:
    """The files to write, known from specs alone: what holds tensors, and the small ones.

    of: the tensors, which Orbax's container cuts into what the plan makes.
    """
    container = SYSTEMS[to].container if to in SYSTEMS else "safetensors"
    if container == "orbax":
        return orbax_layout(of, plan.targets)
    if model is not None:
        return gguf_layout(plan.targets, model), {}
    if container == "dcp":
        return dcp_layout(plan.targets, most, megatron=to == "megatron_dist")
    layout = Layout.of(plan.targets, shard(plan.targets, most), {})
    return layout, {INDEX: layout.index.encode()} if layout.index else {}


def config_of(source: Checkpoint, to: str, there: Adapter, plan: Plan) -> dict[str, Any]:
    """The source's config; it says of the tensors whether they are quantised, and how.

    Of a system's decoded weights it keeps that for the way back, under a name that no other reader looks at.
    """
    if to in SYSTEMS:
        last = next((s for s in reversed(there.stages) if isinstance(s, Quantised)), None)
        return source.config if last is None or last.keep else decoded(source.config)
    stages = family(source.model_type).adapter(source.config).stages if to == "hf" else ()
    codec = next((s for s in stages if isinstance(s, Quantised)), None)
    return coded(source.config) if codec is None else listing(source.config, Adapter((codec,)), plan.targets)


def beside(
    source: Checkpoint, small: Mapping[str, bytes], layout: Layout, config: Mapping[str, Any]
) -> dict[str, bytes]:
    """config.json, with which the directory can go back, and the other small files of the source, but no adapter's."""
    made = {"config.json": json_of(config)}
    out = {*KEPT_OUT, ADAPTER} if any(field in config for field in FIELDS) else {*KEPT_OUT, ADAPTER, *QUANTS}
    for path in source.others():
        name = str(path)
        if name not in {*small, *layout.heads, *made, *out} and path.suffix in ALONG:
            made[name] = content(source.path / name)
    return made


def framed(stage: Staging, layout: Layout) -> None:
    """What is known of the files before their data, written."""
    for file, pieces in getattr(layout, "frames", {}).items():
        part = stage.part(file)
        with open(part, "r+b", buffering=0) as out:
            for at, data in pieces:
                write_at(part, out.fileno(), memoryview(data), at)
