"""The documentation: Markdown pages in this folder, each run as a doctest. `python -m fmoe.docs OUT` makes a site.

index       what there is, and where to begin
notation    a rule, form by form
compose     your own transforms, and how to test them
experts     experts as a pure function: grad, vmap, ensembles, per-sample gradients; backends
research    what researchers ask next: per-sample gradients, router replay, surgery, upcycling
systems     other trainers, engines and formats: what verified them, and a model there and back
train       load, train, export; Transformers
lora        LoRA on experts: train, PEFT and back, merge
backends    one backend in place of another, with a parity check; your own
sync        a trainer's weights to an engine's names, each rank its own experts
quantised   FP8, MXFP8, MXFP4, INT4: decode, keep, write
parallel    expert parallelism, FSDP2, distributed checkpoints, weight synchronisation
refused     what is refused, the error as printed, and why; written by the tests
glossary, faq, comparison
"""

import tempfile
from functools import cache
from pathlib import Path

_HELD: list[tempfile.TemporaryDirectory[str]] = []  # temporary folders, gone when the process ends


@cache
def example() -> str:
    """The path of a small Qwen3-MoE checkpoint as Hugging Face lays it out, written to a temporary folder.

    2 layers, 8 experts one by one, 2 a token, 64 wide, float32.

    >>> import fmoe
    >>> fmoe.inspect(example())["model_type"]
    'qwen3_moe'
    """
    from fmoe.cli.demo import write

    _HELD.append(tempfile.TemporaryDirectory(prefix="fmoe-docs-"))
    path = Path(_HELD[-1].name) / "hf"
    write(path)
    return str(path)
