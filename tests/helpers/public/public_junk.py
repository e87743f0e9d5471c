"""What nobody means, and where some of it is meant after all: each with its reason."""

import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy
import torch

from fmoe.entrance.fitting import misfit


class Some:
    """A class of somebody's."""


def _nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype
        return torch.nested.nested_tensor([torch.ones(1, 7), torch.ones(2, 7)])


JUNK: dict[str, Any] = {
    "None": None,
    "3": 3,
    "-1": -1,
    "2**63": 2**63,
    "1.5": 1.5,
    "nan": float("nan"),
    "True": True,
    "x": "x",
    "''": "",
    "(": "(",
    "bytes": b"x",
    "[]": [],
    "{}": {},
    "object": object(),
    "array": numpy.ones((2, 7)),
    "nested": [[1, "a"], [None]],
    "class": Some,
    "function": lambda *args: None,
    "module": torch.nn.Linear(2, 2),
    "tensor": torch.ones(2, 7, dtype=torch.int8),
    "path": Path("x"),
    "long": "x" * 5000,
    "words": ["fp8"],
    "set": {1},
    "numbers": {1: 2},
    "10**30": 10**30,
    "-10**30": -(10**30),
    "10**5000": 10**5000,
    "False": False,
    "int64": numpy.int64(3),
    "float32-nan": numpy.float32("nan"),
    "0d-array": numpy.array(3),
    "0d": torch.tensor(3),
    "0d-nan": torch.tensor(float("nan")),
    "0d-meta": torch.tensor(3, device="meta"),
    "0d-bool": torch.tensor(True),
    "meta": torch.ones(2, 7, device="meta"),
    "sparse": torch.ones(2, 7).to_sparse(),
    "complex": torch.ones(2, 7, dtype=torch.complex64),
    "fp8": torch.ones(2, 7).to(torch.float8_e4m3fn),
    "nested-tensor": _nested(),
}
WORDS, COUNTS = "x '' ( long", "3 2**63 10**30 10**5000 int64 0d 0d-array"
NUMBERS = "3 -1 2**63 1.5 10**30 -10**30 int64 0d"
ANY_INT = COUNTS + " -1 -10**30"
COUNT = "3 int64 0d 0d-array"
ANY_TENSOR = "tensor 0d 0d-nan 0d-meta 0d-bool meta sparse complex fp8 nested-tensor"
TENSORS = [n for n, value in JUNK.items() if isinstance(value, torch.Tensor)]
PARTS = {n: JUNK[n] for n in ("None", "3", "x", "array", *TENSORS)}
"""What is put in the place of one tensor of several that are given together."""

# dotted name(argument), with wildcards -> what is meant there, and why
MEANT: dict[str, tuple[str, str]] = {
    "*(because)": (WORDS, "a reason in any words"),
    "*.validate_dtensor_expert_sharding(tensor_name)": (WORDS, "what messages say"),
    "*.same(what)": (WORDS, "what messages say"),
    "*Adapter(moe)": (WORDS, "why nobody knows its config"),
    "fmoe.either(name)": (WORDS, "a choice of any name"),
    "fmoe.alias(of)": (WORDS, "a tensor of any name"),
    "fmoe.drop(pattern)": (WORDS, "a tensor of any name"),
    "fmoe.keep(pattern)": (WORDS, "a tensor of any name"),
    "fmoe.rename(*)": ("''", "no prefix"),
    "*.resolve(names)": (WORDS + " words", "names, and the letters of a text are some"),
    "*convert_single_tensor_to_hf(fqn)": (WORDS, "a tensor of any name"),
    "*(exclude_key_regex)": ("x '' long", "a regular expression"),
    "*convert_single_tensor_to_hf(tensor)": ("tensor meta complex fp8", "a tensor"),
    "fmoe.adapter(path_or_model_type)": ("[]", "no rules"),
    "*.convert(dst)": (WORDS + " path", "a place to write"),
    "*convert(dst)": (WORDS + " path", "a place to write"),
    "*save(path)": (WORDS + " path", "a place to write"),
    "*.get_hf_storage_reader(path)": (WORDS, "torch looks when it reads"),
    "*torchtitan.StateDictAdapter(hf_assets_path)": (WORDS + " path", "where an index may be"),
    "*(max_shard_size)": (COUNTS, "bytes"),
    "*(bandwidth)": (COUNTS, "bytes a second"),
    "*(threads)": (COUNT + " 0d-array", "threads"),
    "*(progress)": ("class function module", "functions of the user's: what they raise is theirs"),
    "*(backend)": ("class function", "functions of the user's: what they raise is theirs"),
    "fmoe.moe(backend)": ("class function module", "functions of the user's: what they raise is theirs"),
    "fmoe.experts(backend)": ("class function module", "functions of the user's: what they raise is theirs"),
    "*.GroupedExpertsTE(backend)": ("*", "the seed's argument: it is te"),
    "*StateDictAdapter(backend)": ("*", "the loader's argument, kept for it"),
    "*StateDictAdapter(moe_config)": ("*", "the loader's argument, kept for it"),
    "*StateDictAdapter(model_args)": ("*", "the loader's argument, kept for it"),
    "*.iter_checkpoint_load_parts(device_mesh)": ("*", "the loader's argument: there is no part"),
    "*.is_dtensor(tensor)": ("*", "a question about anything"),
    "*.MoEConfig(score_func)": (WORDS, "a router of somebody's own"),
    "*.MoEConfig(latent_norm)": ("''", "none"),
    "*.MoEConfig(n_activated_experts)": ("3", "as many as there are"),
    "*.MoEConfig(*limit)": (NUMBERS + " True False", "a number"),
    "*.MoEConfig(*scale)": (NUMBERS + " True False", "a number"),
    "*.MoEConfig(activation_alpha)": (NUMBERS + " True False", "a number"),
    "*.MoEConfig(norm_offset)": (NUMBERS + " True False", "a number"),
    "*.MoEConfig(*_eps)": ("3 2**63 1.5 10**30 True False", "a number from 0 on"),
    "*.MoEConfig(*_min)": ("3 2**63 1.5 10**30 True False", "a number from 0 on"),
    "*.MoEConfig(*_jitter)": ("3 2**63 1.5 10**30 True False", "a number from 0 on"),
    "*.MoEConfig(*softcap)": ("3 2**63 1.5 10**30 True False", "a number from 0 on"),
    "*.MoEConfig(*_coeff)": ("3 2**63 1.5 10**30 True False", "a number from 0 on"),
    "*.MoEConfig(*_factor)": ("3 2**63 1.5 10**30 True False", "a number from 0 on"),
    "*.MoEConfig(*)": ("3", "a count"),
    "*.MoEConfig(dtype)": ("None", "bf16"),
    "*.choose(quantization)": ("None True False", "as the checkpoint, and quantised"),
    "*.merge(weights)": ("None", "the mean"),
    "*.from_hf(device_mesh)": ("None", "no mesh"),
    "*.rule(e)": ("3", "a size"),
    "*.alias(r)": ("3 set numbers", "a size, or some numbers"),
    "*.LoraConfig(r)": ("3", "a rank"),
    "*.lora.init(r)": ("3", "a rank"),
    "*(lora_alpha)": (NUMBERS, "a factor"),
    "*.lora.*(scale)": (NUMBERS, "a factor"),
    "*.lora.*(base)": (WORDS, "the name of a model"),
    "*.LoraConfig*(key)": (WORDS, "any module"),
    "*.LoraConfig(peft_version)": (WORDS, "what wrote it"),
    "*.LoraConfig(target_parameters)": ("words", "names"),
    "*.LoraConfig(target_modules)": (WORDS + " words", "a regular expression, or names"),
    "*.is_lora(name)": (WORDS, "a question about any name"),
    "*.map_peft_target_module_to_hf(name)": (WORDS, "any module"),
    "*.activations.*(p)": (NUMBERS + " nan True False float32-nan 0d-array 0d-nan 0d-bool", "what multiplies"),
    "*.activations.*(*)": (NUMBERS, "a number"),
    "*.relu2(u)": (ANY_TENSOR, "of whole numbers too"),
    "*(*routing.mask)": ("None", "no token is masked"),
    "*.losses.*(routed.counts)": ("*", "losses count themselves"),
    "*.attach(y)": ("0d-nan meta", "floats of any shape"),
    "*.attach(loss)": ("0d-nan", "a loss: that it is NaN is seen"),
    "*.attach(scale)": (NUMBERS, "a factor"),
    "*(rate)": (NUMBERS, "a factor"),
    "*(init_std)": ("3 2**63 1.5 10**30 int64 0d", "a number from 0 on"),
    "*(indices)": ("tensor", "experts of each token, as many as one likes"),
    "*.routing.drop(capacity)": (COUNTS, "a count"),
    "*(top_k)": (COUNTS, "a count"),
    "*(counts)": ("tensor fp8", "counts by layer"),
    "*(n_experts)": (COUNT, "a count"),
    "*.load_balance_metrics(aux_losses)": ("numbers", "a loss of layer 1"),
    "*.expert_range(*)": (COUNTS, "a count"),
    "*.should_load_expert_for_rank(expert_id)": (ANY_INT, "a question about any number"),
    "*.create_dtensor_from_local(rank)": (ANY_INT, "the seed's argument: its value is not used"),
    "*.sharding.*tensor)": (ANY_TENSOR, "a plain tensor"),
    "*.sharding.*(weight)": (ANY_TENSOR, "a plain tensor"),
    "*.draw.*(ranks)": (COUNTS, "a count"),
    "*.deepep(api)": (WORDS, "a group of one rank moves nothing"),
    "*.deepep(max_tokens)": (ANY_INT, "a group of one rank moves nothing"),
    "*.replicate(times)": ("3", "a count"),
    "*.Family(*)": (WORDS + " words", "data of a family: a reader says what is wrong"),
    "*.System(*)": (WORDS + " words", "data of a system: a reader says what is wrong"),
    "*.System.*(names)": ("words", "a question about any names"),
    "*.System.*(model_type)": (WORDS, "a question about any name"),
    "*.family_checkpoints(model_type)": (WORDS, "a strategy looks when it draws"),
    "*.testing.*(max_axes)": (ANY_INT, "a strategy looks when it draws"),
    "*.testing.*(seed)": ("3 -1 2**63 int64 0d 0d-array", "a seed"),
    "*.by_einops(e)": (ANY_INT, "sizes that names say are theirs"),
    "*.register(name)": (WORDS, "any name"),
}


def is_meant(call: str, argument: str, junk: str, hint: Any) -> bool:
    """Whether a call may return: nothing where None may stand, yes, what is empty, and what MEANT says."""
    if junk in ("None", "True", "False", "[]", "{}") and hint is not Any and not misfit(JUNK[junk], hint):
        return True
    if junk in ("None", "{}") and argument in ("config", "layout"):
        return True  # not given
    told = f"{call}({argument})"
    return any(junk in what.split() or what == "*" for name, (what, _) in MEANT.items() if fnmatchcase(told, name))


# what stands in a message for an argument, where it is not its name
STANDS: dict[str, str] = {
    "": "config.json",
    "path_or_model_type": "rules of your own",
    "name": "alias",
    "hf native": "rule ",
    "params lora native": "a key that is|parameter|experts|nothing stands below|matri|proj",
    "specs hf_state_dict state_dict names": "a key that is",
    "groups weights": "layers ",
    "order keep": "ids are|layers |would have",
    "config said": "peft_type|upcycle",
    "backend": "has no experts",
    "token_mask": "routing.mask",
    "tensor": "shape",
    "dims": "mesh",
}


def stands_for(argument: str) -> str:
    """A pattern of what may stand for an argument in a message."""
    return "|".join([argument.strip("*") or "$^", STANDS[""], *(p for n, p in STANDS.items() if argument in n.split())])


Calls = dict[str, Callable[..., Any]]
