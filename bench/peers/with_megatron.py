"""Megatron-Core beside ours: `dist_checkpointing.load` reads what fmoe wrote, and fmoe reads what it saved.

python bench/peers/with_megatron.py     where megatron-core is installed; one gloo rank, on a CPU
"""

import os
import tempfile
from pathlib import Path

import torch
from models import MODELS, directory, files, same

import fmoe


def main() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29877")}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    import megatron.core
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if not torch.cuda.is_available():
        torch.cuda.synchronize, torch.cuda.current_device = lambda *_: None, lambda: "cpu"  # saving asks both
    parallel_state.initialize_model_parallel(1, 1)
    of = ShardedTensor.from_rank_offsets
    for name in MODELS:
        for specs in ("te", "local"):
            with tempfile.TemporaryDirectory() as out:
                config, tensors = directory(name, Path(out) / "hf")
                adapter = fmoe.adapter(config["model_type"], config, system="megatron_dist", specs=specs)
                want = {n: t.contiguous() for n, t in adapter.from_hf(tensors).items()}
                fmoe.convert(f"{out}/hf", f"{out}/ours", to="megatron_dist", specs=specs)
                asked = {n: of(n, torch.zeros_like(t)) for n, t in want.items()}
                found = dist_checkpointing.load(asked, f"{out}/ours", strict="log_all")
                same({n: found[n] for n in want}, want)
                theirs = Path(out, "theirs")
                theirs.mkdir()
                dist_checkpointing.save({n: of(n, t) for n, t in want.items()} | {"iteration": 3}, str(theirs))
                fmoe.convert(theirs, f"{out}/back", to="hf", config=config)
                same(files(Path(out, "back")), tensors)
            print(f"{name}, specs={specs}: equal, with megatron-core {megatron.core.__version__}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
