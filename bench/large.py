"""A conversion of 1.3 TB by 1, 8 and 64 ranks, on paper: counted bytes and requests over measured and assumed rates.

    python bench/large.py > bench/large.md

Counted: DeepSeek-V3 in bf16 as sparse files, planned and cut into jobs by the real engine; every rank's share by the
real rule. Measured: what this repository's results say one process does. Assumed: what a machine, its link, a bucket
and a file system give, in PLACES. Nothing of 1.3 TB was run.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from hf_synthetic import DEEPSEEK_V3_CONFIG, deepseek_v3_keys

from fmoe import TensorSpec
from fmoe.checkpoint import open_checkpoint
from fmoe.checkpoint.files.header import FIRST
from fmoe.checkpoint.files.writer import Layout, shard
from fmoe.checkpoint.open import adapter_of, plan_from
from fmoe.checkpoint.remote.address import PIECE
from fmoe.checkpoint.remote.ranks import share
from fmoe.checkpoint.stream.boxes import Job, bundled
from fmoe.checkpoint.stream.engine import BUNDLE, Engine

RESULTS = Path(__file__).parent / "results"
RANKS = (1, 8, 64)


@dataclass(frozen=True)
class Place:
    """GB/s. machine: ranks of one. link, disk_write: of each machine; all_: of what all share; 0: no bound."""

    what: str
    machine: int
    link: float
    disk_write: float
    all_read: float
    all_write: float


PLACES = (
    Place("one machine, from a disk of 6 GB/s to one of 2.5 GB/s", 64, 0, 2.5, 6, 0),
    Place("machines of 8 ranks and 100 Gb/s, on a file system of 40 GB/s", 8, 12, 0, 40, 40),
    Place("machines of 1 rank and 25 Gb/s, from a bucket of 25 GB/s to that file system", 1, 3, 0, 25, 40),
    Place("the same, from a source of 200 MB/s in all", 1, 3, 0, 0.2, 40),
)


def write(path: Path) -> None:
    path.mkdir()
    specs = {n: TensorSpec(*spec) for n, spec in deepseek_v3_keys().items()}
    layout = Layout.of(specs, shard(specs, 8_600_000_000), {})
    for file, (head, size) in layout.heads.items():
        with open(path / file, "wb") as out:
            out.write(head)
            out.truncate(size)
    (path / "model.safetensors.index.json").write_text(layout.index or "")
    (path / "config.json").write_text(json.dumps(DEEPSEEK_V3_CONFIG))


def counted() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model")
        source = open_checkpoint(Path(folder) / "model")
        plan = plan_from(source, adapter_of(source))
        layout = Layout.of(plan.targets, shard(plan.targets, 5_000_000_000), {})
        parts = {n: (Path(folder) / f"{file}.part", layout.starts[n]) for n, file in layout.files.items()}
        engine = Engine(source, plan, parts)
        far = list(bundled((i for i in engine.items if isinstance(i, Job)), BUNDLE))
    sizes = [item.nbytes for item in engine.items]
    found: dict[str, Any] = {"bytes": plan.nbytes, "names": len(source.specs), "in": len(source.stamps)}
    found |= {"out": len(layout.heads), "jobs": len(sizes), "far": len(far), "largest": max(sizes)}
    found["requests"] = sum(max(1, -(-job.nbytes // PIECE)) for job in far)
    for ranks in RANKS:
        cut = share(sizes, ranks)
        loads = [sum(sizes[i] for i in part) for part in cut]
        writers: dict[Path, int] = {}
        for part in cut:
            for path in engine.files(part):
                writers[path] = writers.get(path, 0) + 1
        found[ranks] = {"most": max(loads), "over": max(loads) * ranks / plan.nbytes, "writers": max(writers.values())}
    return found


def rates() -> dict[str, float]:
    rows = json.loads((RESULTS / "convert_memory.json").read_text())
    row = next(r for r in rows if r["what"] == "fmoe to native (transposes)")
    planned = json.loads((RESULTS / "plan.json").read_text())[0]
    remote = json.loads((RESULTS / "remote.json").read_text())
    web = next(r for r in remote if r["what"] == "a server")
    return {
        "arrange": row["bytes"] / row["seconds"] / 1e9,
        "start": planned["plan"],
        "web": web["bytes"] / web["seconds"] / 1e9,
    }


def bounds(place: Place, ranks: int, found: dict[str, Any], rate: dict[str, float]) -> dict[str, float]:
    """Seconds that each resource alone takes."""
    machines, size, most = max(1, ranks // place.machine), found["bytes"] / 1e9, found[ranks]["most"] / 1e9
    here = min(ranks, place.machine)
    taken = {"arranging (2 cores a rank)": most / rate["arrange"], "the source": size / place.all_read}
    taken |= {"the target": size / place.all_write} if place.all_write else {}
    taken |= {"the links": 2 * most * here / place.link} if place.link else {}
    taken |= {"the disks": size / machines / place.disk_write} if place.disk_write else {}
    return taken


def page(found: dict[str, Any], rate: dict[str, float]) -> str:
    told = {n: v for n, v in found.items() if isinstance(n, str)} | rate
    told |= {"tb": found["bytes"] / 1e12, "first": FIRST // 1024, "mb": found["largest"] / 2**20}
    told |= {"asked": 3 * 64 * found["in"], "share": 3 * 64 * found["in"] / found["requests"]}
    told |= {"headers": 64 * found["in"] * FIRST / found["bytes"]}
    lines = [INTRO.format(**told), "| ranks | most bytes of one, GB | over the mean | ranks that write one file |"]
    lines += ["|---|---|---|---|"]
    for ranks in RANKS:
        row = found[ranks]
        lines.append(f"| {ranks} | {row['most'] / 1e9:.1f} | {row['over']:.4f} | {row['writers']} |")
    lines += [BETWEEN, "| where | ranks | minutes | bound by | then by |", "|---|---|---|---|---|"]
    for place in PLACES:
        for ranks in RANKS:
            taken = bounds(place, ranks, found, rate)
            (first, a), (second, b) = sorted(taken.items(), key=lambda item: -item[1])[:2]
            minutes = (a + rate["start"]) / 60
            lines.append(f"| {place.what} | {ranks} | {minutes:.1f} | {first} | {second} ({b / 60:.1f}) |")
    slow = {f"slow{ranks}": found["bytes"] / ranks / rate["web"] / 60e9 for ranks in RANKS}
    return "\n".join([*lines, AFTER.format(**slow)])


INTRO = """# 1.3 TB by 8 and 64 ranks, on paper

`python bench/large.py > bench/large.md`. Nothing of this size was run: bytes, jobs and requests are counted by the real
planner and engine on sparse files, rates of one process are measured on small conversions, all else is assumed.

**Counted.** DeepSeek-V3 in bf16, {tb:.2f} TB: {names:,} tensors in {in:,} files become {out:,} files, by {jobs:,} jobs
of at most {mb:.0f} MiB. From another machine these ask for every byte once, in {requests:,} requests of at most 16 MiB.
Beside them every rank reads every header ({first} kB are asked for), and the tags of all files twice: with 64 ranks
that is {asked:,} requests more, {share:.0%} of the others, and {headers:.2%} of the bytes.

**Measured.** Reading, arranging and writing in memory: {arrange:.2f} GB/s a process with two cores (`convert_memory`).
Start, imports, headers and plan: {start:.1f} s of one core, the same on every rank (`plan`). One process, from a web
server that takes its part of the same two cores: {web:.2f} GB/s (`remote`).

Shares are runs of jobs in the order of the source's files:
"""
BETWEEN = """
Reading, arranging and writing overlap, so that a conversion takes what its slowest part takes, and the start:
"""
AFTER = """
One rank is bound by its own two cores. On one machine, a few ranks reach what its disk or its link takes, and more
ranks there change nothing. 8 machines are still bound by their cores, 64 by the bucket or the file system, which is
where a conversion should be. A slow source bounds everything, whatever the ranks. Were no process faster with a bucket
than with that web server on its own busy cores, 8 ranks would take {slow8:.0f} minutes and 64 {slow64:.1f}.

Left out: writers that meet in one file of a parallel file system (at the border of two shares only), a bucket that
slows down whoever asks often, the first rank's wait for the disk and its renames at the end (an fsync for each
file), and a machine slower than the others, which shares by bytes do not know of.
"""


if __name__ == "__main__":
    print(page(counted(), rates()), end="")
