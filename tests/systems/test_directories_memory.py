"""Every system's directory, to it and from it: under 100 MB of memory beyond the import, of a larger model."""

import json

import hf
import hf_synthetic as synthetic
import pytest
import torch
from gguf_writer import write
from grown import grown
from orbax_cases import saved

import fmoe
from fmoe.systems import SYSTEMS

MB = 10**6
WIDE = dict(num_experts_per_tok=2, hidden_size=512, moe_intermediate_size=1024, vocab_size=4096)


def qwen3_moe(path):
    hf.write("qwen3_moe", path, torch.bfloat16, "1GB", **WIDE, num_experts=24, mlp_only_layers=[])


def deepseek_v3(path):
    wide = WIDE | dict(n_routed_experts=40, num_nextn_predict_layers=0, n_group=1, topk_group=1)
    config, tensors = synthetic.deepseek_v3(**wide)
    kept = {n: t for n, t in tensors.items() if not n.endswith("shared_head.head.weight")}
    hf.save(config, kept, path, "1GB")


def gpt_oss(path):
    sizes = dict(WIDE, intermediate_size=1024)
    hf.write("gpt_oss", path, torch.bfloat16, "1GB", **sizes, num_local_experts=40)


MODELS = {"qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss}


FIRST = {s.container: s for s in reversed(SYSTEMS.values()) if s.knows("qwen3_moe")}.values()
"""Of each container one system."""
ALL = {name: [s for s in SYSTEMS.values() if name == next(m for m in MODELS if s.knows(m))] for name in MODELS}
CASES = [("qwen3_moe", [s for s in FIRST if s.container == "orbax"])]
"""What holds most, and was over it once; the others' containers go the same way, under `slow`."""
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in (("qwen3_moe", FIRST), *ALL.items())]  # a minute


@pytest.mark.parametrize("name,systems", CASES, ids=["orbax", "each container", *MODELS])
def test_memory_is_bounded_whatever_the_container(name, systems, tmp_path):
    MODELS[name](tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    source = fmoe.checkpoint.open_checkpoint(tmp_path / "hf")
    assert source.nbytes >= 120 * MB
    jobs = []
    for system in systems:
        how = {"fsync": False, "to": system.name}
        if system.container == "gguf":
            specs = fmoe.adapter(name, config, system="gguf").plan(source.specs).targets
            write(tmp_path / "like.gguf", {n: torch.zeros(s.shape, dtype=s.dtype) for n, s in specs.items()})
            how["like"] = str(tmp_path / "like.gguf")
        for choice in [{"scan": False}, {"scan": True}][len(systems) == 1 :] if system.container == "orbax" else [{}]:
            there = tmp_path / f"{system.name}{choice}"
            back = {"fsync": False, "to": "hf", "from_": system.name}
            jobs.append(("convert", tmp_path / "hf", there, how | choice))
            jobs.append(("convert", there, there.with_name(f"{there.name} to hf"), back))
    if len(systems) == 1:  # and as MaxText writes it, compressed
        made = fmoe.adapter(name, config, system="maxtext", scan=True).resolve(source.specs)
        tensors = made.from_hf(source.read(source.specs))
        saved(tmp_path / "compressed", tensors, chunk=lambda shape: [min(5, shape[0]), *shape[1:]])
        (tmp_path / "compressed" / "config.json").write_text(json.dumps(config))
        jobs.append(("convert", tmp_path / "compressed", tmp_path / "compressed to hf", {"fsync": False, "to": "hf"}))
    found = dict(zip([job[2].name for job in jobs], grown(*jobs), strict=True))
    assert max(found.values()) <= 100, found
