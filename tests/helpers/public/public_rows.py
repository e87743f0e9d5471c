"""One valid call of everything about checkpoints and layouts: dotted name -> its arguments, tiny."""

from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch

import fmoe

E, D, I = 3, 4, 3
CONFIG = tiny.QWEN3
HF = {n: t for n, t in tiny._qwen3(False).items() if n != "model.scalar"}
NATIVE = fmoe.adapter("qwen3_moe", CONFIG).from_hf(HF)
ADAPTER = fmoe.adapter("qwen3_moe", CONFIG)
BLOCK = "model.layers.0.mlp.experts."
DOWN = BLOCK + "down_projs"
FEW = {n: t for n, t in NATIVE.items() if n.startswith(BLOCK)}
RULE = fmoe.rule("w.{e} [d]", "w [e d]")
W = {"w": torch.eye(2)}
WS = {"w.0": torch.ones(2), "w.1": torch.zeros(2)}
SPECS = {n: fmoe.TensorSpec((2,), torch.float32) for n in WS}
LORA = fmoe.lora.init(FEW, 2)
LORA_CONFIG = fmoe.lora.LoraConfig(r=2)
FAMILY = fmoe.families.FAMILIES["mixtral"]
SYSTEM = fmoe.systems.SYSTEMS["torchtitan"]


@cache
def source() -> Path:
    """A checkpoint of a few kB."""
    import tempfile

    folder = tempfile.mkdtemp(prefix="fmoe-public-")
    return tiny.lay(tiny.bases()["qwen3_moe"], Path(folder) / "source")


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """out: a fresh directory to write in."""
    opened = fmoe.checkpoint.open_checkpoint(source())
    to = out / "made"
    found: dict[str, dict[str, Any]] = {
        "Adapter": dict(stages=()),
        "Adapter.resolve": dict(self=RULE, names=["w.0"]),
        "Adapter.choose": dict(self=ADAPTER, quantization=False),
        "Adapter.plan": dict(self=RULE, specs=SPECS, e=range(2)),
        "Adapter.from_hf": dict(self=RULE, hf_state_dict=WS, e=range(2)),
        "Adapter.to_hf": dict(self=RULE, state_dict=W, e=range(2)),
        "Adapter.convert_single_tensor_to_hf": dict(self=RULE, fqn="w", tensor=W["w"], e=range(2)),
        "Adapter.iter_hf": dict(self=RULE, params=W, e=range(2)),
        "Adapter.views": dict(self=RULE, native=W, e=range(2)),
        "adapter": dict(path_or_model_type="qwen3_moe", config=CONFIG, layout="per_expert"),
        "alias": dict(name="head{r}", of="embed", r=2),
        "drop": dict(pattern="a", because="a test"),
        "either": dict(name="layout", a=RULE, b=fmoe.rule("w [e d]", "w [e d]")),
        "keep": dict(pattern="a"),
        "rename": dict(old="a.", new="b."),
        "rule": dict(hf="w.{e} [d]", native="w [e d]", e=2),
        "together": {"*": (RULE,)},
        "subtree": dict(params=FEW, prefix=BLOCK),
        "convert": dict(src=source(), dst=to, fsync=False),
        "inspect": dict(path=source()),
        "load": dict(path=source(), e=range(2)),
        "save": dict(params=NATIVE, path=to, adapter=ADAPTER, fsync=False),
        "verify": dict(path=source()),
        "checkpoint.adapter_of": dict(checkpoint=opened),
        "checkpoint.diff": dict(one=source(), other=source()),
        "checkpoint.open_checkpoint": dict(path=source()),
        "checkpoint.plan_from": dict(source=opened, there=ADAPTER, e=range(2)),
        "dcp.Planner": dict(params=NATIVE, adapter=ADAPTER),
        "dcp.load": dict(params=fmoe.load(source()), path=source()),
        "dcp.save": dict(params=NATIVE, path=to, adapter=ADAPTER, fsync=False),
        "draw.checkpoint": dict(path=source()),
        "draw.layout": dict(adapter=ADAPTER),
        "draw.load": dict(counts=torch.ones(2, 3)),
        "draw.save": dict(figure=fmoe.draw.load(torch.ones(1, 2)), path=out / "figure.svg"),
        "families.Family": dict(model_types=("one",), rules=FAMILY.rules, fields=FAMILY.fields),
        "families.Family.adapter": dict(self=FAMILY, config=None),
        "families.Family.values": dict(self=FAMILY, config=dict(num_local_experts=2)),
        "families.family": dict(model_type="mixtral"),
        "families.register": dict(family=FAMILY),
        "lora.LoraConfig": dict(r=2),
        "lora.LoraConfig.read": dict(said=LORA_CONFIG.json()),
        "lora.LoraConfig.rank": dict(self=LORA_CONFIG, key="a"),
        "lora.LoraConfig.wraps": dict(self=LORA_CONFIG, key="a"),
        "lora.LoraConfig.scale": dict(self=LORA_CONFIG, key="a"),
        "lora.even": dict(lora=LORA, scale=1.0),
        "lora.init": dict(params=FEW, r=2),
        "lora.is_lora": dict(name="a"),
        "lora.lift": dict(lora=LORA),
        "lora.load": dict(path=_tuned(), base=ADAPTER),
        "lora.merge": dict(params=FEW, lora=LORA, scale=1.0),
        "lora.save": dict(params=LORA, path=to, adapter=ADAPTER),
        "lora.unmerge": dict(params=FEW, lora=LORA, scale=1.0),
        "surgery.layers": dict(native=NATIVE),
        "surgery.merge": dict(native=NATIVE, config=CONFIG, groups=[[0], [1, 2]]),
        "surgery.permute": dict(native=NATIVE, config=CONFIG, order=[2, 1, 0]),
        "surgery.replicate": dict(native=NATIVE, config=CONFIG, times=2),
        "surgery.select": dict(native=NATIVE, config=CONFIG, keep=[0, 2]),
        "surgery.upcycle": _upcycled(),
        "sync.bridge": dict(trainer=RULE, engine=RULE),
        "sync.stream": dict(trainer=RULE, engine=RULE, params=W, e=range(1)),
        "systems.System": dict(name="a", tables={}, container="c", verified="v", source="s"),
        "systems.System.knows": dict(self=SYSTEM, model_type="mixtral"),
        "systems.System.keeps": dict(self=SYSTEM, model_type="mixtral"),
        "systems.System.marks": dict(self=SYSTEM, names=["a"], model_type="mixtral"),
        "systems.System.marked": dict(self=SYSTEM, names=["a"]),
        "systems.System.seen": dict(self=SYSTEM, names=["a"]),
        "systems.System.adapter": dict(self=SYSTEM, model_type="qwen3_moe", config=CONFIG),
        "systems.adapter": dict(name="torchtitan", model_type="qwen3_moe", config=CONFIG),
        "testing.assert_laws": dict(adapter=RULE, specs=SPECS),
        "testing.by_einops": dict(adapter=RULE, hf=WS, e=2),
        "testing.checkpoints": dict(adapter=RULE),
        "testing.family_checkpoints": dict(model_type="mixtral"),
        "testing.rules": dict(max_axes=3),
        "testing.same": dict(a=W, b=W),
        "testing.tensors": dict(specs=SPECS),
        "integrations.automodel.StateDictAdapter": dict(config=CONFIG),
        "integrations.torchtitan.StateDictAdapter": dict(adapter=RULE),
    }
    automodel = fmoe.integrations.automodel.StateDictAdapter(CONFIG)
    titan = fmoe.integrations.torchtitan.StateDictAdapter(adapter=RULE)
    theirs = {
        "automodel.StateDictAdapter": {
            "get_hf_state_dict_keys": dict(self=automodel, state_dict=FEW),
            "iter_checkpoint_load_parts": dict(self=automodel, model_state_dict=FEW),
            "map_peft_target_module_to_hf": dict(self=automodel, name="a"),
            "to_hf": dict(self=automodel, state_dict=FEW),
            "from_hf": dict(self=automodel, hf_state_dict=HF),
            "convert_single_tensor_to_hf": dict(self=automodel, fqn=DOWN, tensor=FEW[DOWN]),
        },
        "torchtitan.StateDictAdapter": {
            "to_hf": dict(self=titan, state_dict=W),
            "from_hf": dict(self=titan, hf_state_dict=WS),
            "get_hf_storage_reader": dict(self=titan, path=str(source())),
        },
    }
    return found | {f"integrations.{c}.{n}": row for c, methods in theirs.items() for n, row in methods.items()}


@cache
def _tuned() -> Path:
    fmoe.lora.save(LORA, source().parent / "tuned", ADAPTER)
    return source().parent / "tuned"


@cache
def _upcycled() -> dict[str, Any]:
    config = dict(model_type="llama", hidden_size=D, intermediate_size=I, num_hidden_layers=1, num_attention_heads=1)
    shapes = dict(gate_proj=(I, D), up_proj=(I, D), down_proj=(D, I))
    native = {f"model.layers.0.mlp.{n}.weight": torch.ones(s) for n, s in shapes.items()}
    return dict(native=native, config=config, n_experts=2, n_activated=1)
