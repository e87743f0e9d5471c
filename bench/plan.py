"""Planning a model of 1 T parameters from its headers: time of `fmoe plan` over that of `import torch`; memory.

    python bench/plan.py --json bench/results/plan.json

The model is of DeepSeek-V3's family with Kimi-K2's 384 experts a layer: bf16, one by one, in sparse files. fmoe is
compiled, as where it is installed. Times are of whole processes, user and system, in turns; the ratio is that of each
pair, its median. A plan's memory is what Python has allocated for it when it is done, and at most meanwhile, over the
tensors that it is of.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import fmoe
from fmoe import TensorSpec
from fmoe.checkpoint.files.writer import Layout, shard

EXPERTS = 384


def write(path: Path) -> int:
    """The directory, its tensors holes; how many parameters."""
    from hf_synthetic import DEEPSEEK_V3_CONFIG, deepseek_v3_keys

    path.mkdir()
    specs = {n: TensorSpec(*spec) for n, spec in deepseek_v3_keys(n_routed_experts=EXPERTS).items()}
    layout = Layout.of(specs, shard(specs, 10**10), {})
    for file, (head, size) in layout.heads.items():
        with open(path / file, "wb") as out:
            out.write(head)
            out.truncate(size)
    (path / "model.safetensors.index.json").write_text(layout.index or "")
    (path / "config.json").write_text(json.dumps(DEEPSEEK_V3_CONFIG | {"n_routed_experts": EXPERTS}))
    return sum(spec.numel for spec in specs.values())


def spent(*command: str) -> float:
    """Seconds of the processor."""
    before, nowhere = resource.getrusage(resource.RUSAGE_CHILDREN), subprocess.DEVNULL
    written = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, *command], check=True, stdout=nowhere, stderr=nowhere, env=written)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def memory(path: Path) -> tuple[int, float, float]:
    """(tensors, bytes of a plan per tensor when it is done, at most meanwhile)."""
    from fmoe.checkpoint import open_checkpoint
    from fmoe.checkpoint.open import adapter_of, plan_from

    source = open_checkpoint(path)
    adapter = adapter_of(source)
    tracemalloc.start()
    plan = plan_from(source, adapter)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.targets
    return len(source.specs), held / len(source.specs), most / len(source.specs)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--json", type=Path)
    how = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        parameters = write(path)
        plan, torch = ("-m", "fmoe", "plan", str(path), "--json"), ("-c", "import torch")
        spent(*plan), spent(*torch)
        pairs = [(spent(*plan), spent(*torch)) for _ in range(how.rounds)]
        tensors, held, most = memory(path)
    row: dict[str, Any] = {"parameters": parameters, "tensors": tensors, "rounds": how.rounds, "cores": os.cpu_count()}
    row |= {"plan": median(p for p, _ in pairs), "import torch": median(t for _, t in pairs)}
    row |= {"times": median(p / t for p, t in pairs), "least": min(p / t for p, t in pairs)}
    row |= {"bytes a tensor": held, "at most": most, "fmoe": fmoe.__version__}
    print(row)
    if how.json:
        how.json.write_text(json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()
