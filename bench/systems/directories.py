"""Directories of other systems: fmoe from one to another against cp, and against torch's own dcp.load of the whole.

    python bench/systems/directories.py --gb 4 --rounds 2 --folder /dev/shm --json bench/results/systems.json

As `convert.py`: rounds are interleaved with cp, times are medians of what a process measures of itself, nothing waits
for the disk, which is idle when a method begins. One source after the other is written by fmoe, measured and taken
away, so that it lies in the page cache: three times the size is all it takes. memory: the peak of anonymous
memory over what the imports took. A row's `needed` is the bytes that it must read: of all experts, or of a range.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import report_convert  # noqa: E402
from convert import child, measure, source  # noqa: E402
from methods import METHODS, cp, method  # noqa: E402

KIND = "qwen3_moe"
METHODS.clear()
METHODS["cp"] = cp
SOURCE: dict[str, str] = {}
"""What each method reads."""


def made(src: Path, to: str) -> Path:
    """The same model in another system's directory: made once, before anything is measured."""
    import fmoe

    there = src.with_name(f"{src.name}-{to}")
    if not there.exists():
        fmoe.convert(src, there, to, fsync=False, **({"like": like(src)} if to == "gguf" else {}))
    return there


def like(src: Path) -> Path:
    """A GGUF with the tensors of this model and next to no metadata: its data are a hole."""
    import fmoe
    from fmoe.checkpoint.files.containers.gguf import CODES, TYPES, File, Info
    from fmoe.checkpoint.files.containers.gguf_written import Like, gguf_layout
    from fmoe.checkpoint.files.disk import Stamp

    checkpoint = fmoe.checkpoint.open_checkpoint(src)
    specs = fmoe.adapter(KIND, checkpoint.config, system="gguf").plan(checkpoint.specs).targets
    infos = {n: Info(s.shape, TYPES[CODES["BF16"]], 0, s.nbytes) for n, s in specs.items()}
    ((head, size),) = gguf_layout(specs, Like([File(src, Stamp(), {}, infos, 32)])).heads.values()
    path = src.with_name("like.gguf")
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def row(name: str, here: str, to: str, **how: Any) -> None:
    def run(src: Path, dst: Path) -> None:
        import fmoe

        more = {"like": src.with_name("like.gguf")} if to == "gguf" else {}
        fmoe.convert(made(src, here) if here != "hf" else src, dst, to, fsync=False, **how, **more)

    METHODS[name], SOURCE[name] = run, here


row("HF to torchtitan (moves)", "hf", "torchtitan")
row("torchtitan to HF (moves)", "torchtitan", "hf")
row("HF to torch_dist (moves)", "hf", "megatron_dist")
row("torch_dist to HF (moves)", "megatron_dist", "hf")
row("torch_dist to torchtitan (moves)", "megatron_dist", "torchtitan")
row("HF to GGUF (moves)", "hf", "gguf")
row("GGUF to HF (moves)", "gguf", "hf")
row("HF to native (transposes)", "hf", "native")
row("torchtitan to native (transposes)", "torchtitan", "native")
row("native to torch_dist (transposes)", "native", "megatron_dist")
row("HF to MaxText (transposes)", "hf", "maxtext")
row("MaxText to HF (transposes)", "maxtext", "hf")
row("experts 1 of 8 of torchtitan to native", "torchtitan", "native", e=range(16, 32))
row("experts 1 of 8 of torch_dist to native", "megatron_dist", "native", e=range(16, 32))
row("experts 1 of 8 of GGUF to native", "gguf", "native", e=range(16, 32))


@method("torch: dcp.load of the whole (to memory)")
def whole(src: Path, dst: Path) -> object:
    import torch
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(str(made(src, "torchtitan")))
    found = reader.read_metadata().state_dict_metadata
    state = {n: torch.empty(t.size, dtype=t.properties.dtype) for n, t in found.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@method("torch: dcp.load, to_hf, save_file")
def by_hand(src: Path, dst: Path) -> None:
    from safetensors.torch import save_file

    import fmoe

    state = whole(src, dst)
    config = json.loads((src / "config.json").read_text())
    dst.mkdir()
    tensors = fmoe.adapter(KIND, config, system="torchtitan").to_hf(state)
    save_file({n: t.contiguous() for n, t in tensors.items()}, dst / "model.safetensors")


SOURCE |= {name: "torchtitan" for name in METHODS if name.startswith("torch: ")}


def needed(src: Path, name: str) -> int:
    """Bytes of the tensors that a row has to read."""
    import fmoe

    checkpoint = fmoe.checkpoint.open_checkpoint(src)
    part = "1 of 8" in name
    return sum(s.nbytes // (8 if part and ".experts." in n else 1) for n, s in checkpoint.specs.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; it needs three times the size")
    parser.add_argument("--only", default="", help="methods with this in their name, and cp")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]), Path(args.child[2]))
        return
    asked = [n for n in SOURCE if args.only in n]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="fmoe-bench-") as folder:
        src = Path(folder) / "src"
        size = source(KIND, args.gb, src)
        like(src)
        for here in dict.fromkeys(SOURCE[n] for n in asked):
            there = made(src, here) if here != "hf" else None
            names = ["cp", *(n for n in asked if SOURCE[n] == here)]
            rounds = [{name: measure(name, src, __file__) for name in names} for _ in range(args.rounds)]
            rows = report_convert.rows(KIND, size, rounds)
            found += [{**line, "needed": needed(src, line["what"])} for line in rows[bool(found) :]]
            if there is not None:
                shutil.rmtree(there)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    report_convert.show(found)


if __name__ == "__main__":
    main()
