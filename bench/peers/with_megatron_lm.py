"""Megatron-LM beside ours: the mp_rank_* that its own `save_checkpoint` writes, from ranks of every cut, on a CPU.

    PYTHONPATH=MEGATRON-LM:. python bench/peers/with_megatron_lm.py     where its requirements are installed

The same ranks save themselves twice, as mp_rank_* and as torch_dist, whose cuts Megatron-Core itself resolves. What
fmoe makes of the two is the same, tensor by tensor.
"""

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing as mp
from models import files, same

import fmoe

CONFIG = dict(
    model_type="qwen3_moe", num_hidden_layers=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, vocab_size=96, norm_topk_prob=True,
    architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16",
)  # fmt: skip
SAID = """--num-layers 4 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--kv-channels 8 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --train-iters 1 --lr 1e-3
--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16 --ffn-hidden-size 64 --swiglu --disable-bias-linear
--qk-layernorm --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights
--transformer-impl local --use-cpu-initialization --tokenizer-type NullTokenizer --vocab-size 95 --mock-data
--make-vocab-size-divisible-by 32 --distributed-backend gloo --no-save-optim --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion --no-persist-layer-norm --bf16 --save-interval 1"""
CUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2)]


def rank(number: int, cut: tuple[int, int, int], out: str, port: int) -> None:
    tp, pp, ep = cut
    world = tp * pp * ep
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(number), "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(world)}
    sys.argv = ["x", *SAID.split(), "--global-batch-size", str(world), "--save", out, "--ckpt-format", "torch"]
    sys.argv += ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    sys.argv += ["--expert-model-parallel-size", str(ep)]
    sys.argv += ["--sequence-parallel"] if tp > 1 else []
    torch.distributed.init_process_group("gloo", rank=number, world_size=world)
    cuda: Any = torch.cuda
    if not cuda.is_available():  # what it asks of one
        cuda.synchronize, cuda.set_device, cuda.current_device = (lambda *_: None), (lambda *_: None), (lambda: "cpu")
        cuda.get_device_capability, cuda.device_count = (lambda *_: (9, 0)), (lambda: 1)
        cuda.get_rng_state = lambda *_: torch.get_rng_state()
        cuda.get_device_properties = lambda *_: SimpleNamespace(major=10, minor=0)
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.global_vars import set_global_variables

    args = parse_args()
    validate_args(args)
    set_global_variables(args, build_tokenizer=False)
    args.padded_vocab_size = 96
    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
    tensor_parallel.random.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1 + parallel_state.get_pipeline_model_parallel_rank())
    spec = get_gpt_layer_local_spec(4, False, qk_layernorm=True)
    stage, config = parallel_state.get_pipeline_model_parallel_rank(), core_transformer_config_from_args(args)
    config.sequence_parallel = False  # asked for beside experts; torch's own norms know none, and nothing runs here
    model = GPTModel(
        config, spec, 96, 16, pre_process=stage == 0, post_process=stage == pp - 1,
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
    ).bfloat16()  # fmt: skip
    save_checkpoint(7, [model], None, None, 0)
    there = Path(out, "dist")
    if number == 0:
        there.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(there))
    torch.distributed.destroy_process_group()


def main() -> None:
    for i, cut in enumerate(CUTS):
        with tempfile.TemporaryDirectory() as out:
            tp, pp, ep = cut
            mp.spawn(rank, (cut, out, 29900 + i), nprocs=tp * pp * ep)
            fmoe.convert(f"{out}/dist", f"{out}/want", to="hf", config=CONFIG)
            fmoe.convert(out, f"{out}/hf", to="hf", config=CONFIG, trust_pickle=True)
            want = files(Path(out, "want"))
            same(files(Path(out, "hf")), want)
            print(f"tensor, pipeline, expert ranks {cut}: {len(want)} tensors, equal")


if __name__ == "__main__":
    main()
