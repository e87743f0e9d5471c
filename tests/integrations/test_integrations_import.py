"""L0: `import fmoe` costs little beside torch, and nothing at the edge is imported before it is asked for."""

import statistics
import subprocess
import sys

EDGES = (
    "transformers",
    "peft",
    "accelerate",
    "transformer_engine",
    "deep_ep",
    "torchao",
    "huggingface_hub",
    "datasets",
)
TIMED = """
import time
a = time.process_time()
import torch
b = time.process_time()
import fmoe
c = time.process_time()
print((c - a) / (b - a))
"""
CORE = """
import sys, tempfile, warnings
warnings.simplefilter("ignore")
import torch
import fmoe
def asked(): return [m for m in %r if m in sys.modules]
assert not asked(), asked()
config = fmoe.MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=4, dtype="float32")
params = {"gate_and_up_projs": torch.randn(4, 8, 8, requires_grad=True), "down_projs": torch.randn(4, 4, 8)}
routing = fmoe.Routing(torch.tensor([[0, 3]] * 5), torch.rand(5, 2))
for backend in (None, "loop", "torch_mm"):
    fmoe.experts(params, torch.randn(5, 8), routing, config, backend=backend).sum().backward()
fmoe.moe({"gate.weight": torch.randn(4, 8)} | {f"experts.{n}": p for n, p in params.items()}, torch.ones(1, 8), config)
layer = fmoe.nn.GroupedExperts(config)
hf = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 8}
hf |= {"moe_intermediate_size": 4, "num_hidden_layers": 1}
adapter = fmoe.adapter("qwen3_moe", hf)
native = {f"model.layers.0.mlp.experts.{n}": p.detach() for n, p in layer.named_parameters()}
assert adapter.from_hf(adapter.to_hf(native)).keys() == native.keys()
with tempfile.TemporaryDirectory() as path:
    fmoe.save(native, path, adapter)
    fmoe.load(path), fmoe.inspect(path), fmoe.verify(path)
fmoe.families, fmoe.integrations, fmoe.patch
from fmoe.integrations import automodel, bindings, gates, patch, peft, torchtitan, transformers
assert not asked(), asked()
try:
    fmoe.experts(params, torch.randn(5, 8), routing, config, backend="te")
except ImportError:
    pass
assert not {"transformers", "peft"} & set(asked()), asked()
"""


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_L0_importing_fmoe_takes_less_than_half_as_long_again_as_torch() -> None:
    """Time of the processor, within one process: what else the machine does falls on both alike."""
    seen: list[float] = []
    for _ in range(3):
        seen += [float(python(TIMED)) for _ in range(3)]
        if statistics.median(seen) < 1.5:
            return
    raise AssertionError(f"import fmoe takes {statistics.median(seen):.2f} times import torch, expected < 1.5: {seen}")


def test_L0_nothing_at_the_edge_is_imported_unasked() -> None:
    python(CORE % (EDGES,))
