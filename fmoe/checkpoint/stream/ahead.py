"""What a job will read of files on another machine, fetched before it begins, in few requests."""

from collections.abc import Iterator

from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.remote.address import Address
from fmoe.checkpoint.remote.spans import Fetched, Span
from fmoe.checkpoint.stream.arrange import frame
from fmoe.checkpoint.stream.boxes import Box, Job, Place, box_of
from fmoe.checkpoint.stream.flow import Flow


def fetched(job: Job, source: Checkpoint, flow: Flow) -> dict[str, Fetched]:
    """By file; nothing where the files are of this machine."""
    spans: dict[str, list[Span]] = {}
    if isinstance(source.path, Address):
        for b in (*(b for b in job.boxes if b.source.step is None), *_gathered(job, source, flow)):
            runs, size, _ = frame(b.shape, b.strides, b.item)
            spans.setdefault(b.source.name, []).extend((b.at + i, b.at + i + size) for i in runs)
        return {file: Fetched(source.path / file, wanted) for file, wanted in spans.items()}
    return {}


def _gathered(job: Job, source: Checkpoint, flow: Flow) -> Iterator[Box]:
    """What the steps of a job take."""
    for step in (flow.steps[i] for i in job.steps):
        for name in step.specs:
            for copy in step.gather[name]:
                place = Place(source.files[copy.source])
                yield box_of(copy, place, source.offsets[copy.source], Place(name, 0), 0)
