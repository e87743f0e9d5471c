"""What a directory is: Hugging Face's, ours, or another system's, by files and names; and the adapters in between."""

import re
from collections.abc import Mapping
from itertools import product
from os.path import exists, isfile
from pathlib import Path
from typing import Any

import torch

from fmoe import systems
from fmoe.checkpoint.files.containers.foreign import Foreign
from fmoe.checkpoint.files.containers.mp_rank import UNTRUSTED
from fmoe.checkpoint.files.containers.source import container_of, open_foreign
from fmoe.checkpoint.files.directory import NATIVE, Checkpoint, open_checkpoint
from fmoe.checkpoint.files.strict import parse
from fmoe.checkpoint.open import adapter_of, layers_fit, plan_from
from fmoe.checkpoint.remote.address import Address, Where, place
from fmoe.checkpoint.whole import gaps_of
from fmoe.codecs.config import quantization_of
from fmoe.codecs.formats import FORMATS
from fmoe.families import family
from fmoe.families.complete import Gaps, gaps
from fmoe.folding import meant
from fmoe.layout.adapter import Adapter
from fmoe.layout.pipeline import Plan
from fmoe.layout.proved.suspects import QUANTISED
from fmoe.systems import SYSTEMS
from fmoe.types import EXPERT_TENSORS, AdapterError, Problem, brief

CODES = {f.stored for f in FORMATS.values()} | {torch.uint32}  # which MLX views MXFP4 as
WEIGHT = re.compile(r"(weight|_projs|blocks|_packed)$")  # and not a scale, which stays beside what is decoded
MATRICES = EXPERT_TENSORS[:2]  # the names that no Hugging Face checkpoint has
NO_CONFIG = "has no Hugging Face config. Fix: config=, or --config DIR_OR_JSON"


def of_systems(src: Where | str, to: str, config: Any, from_: str | None, own: bool = False) -> bool:
    """Whether another system is on either side. own: rules of one's own read the source, and know of none."""
    place(src)
    for name, said in (("to", to), ("from_", from_)):
        if not isinstance(said, str) and (said is not None or name == "to"):
            raise AdapterError(f"{name}={brief(said)}: expected the name of a layout or a system")
    if own and to not in SYSTEMS and from_ not in SYSTEMS:
        return False
    there = not isinstance(src, Address) and "://" not in str(src)
    if to in SYSTEMS or from_ in SYSTEMS or config is not None or there and container_of(Path(src)):
        return True
    if not there or not Path(src).is_dir() or exists(Path(src) / NATIVE) or not isfile(Path(src) / "config.json"):
        return False
    try:
        return side(open_checkpoint(src)) in SYSTEMS
    except AdapterError:
        return False


def config_of(config: Any) -> dict[str, Any] | None:
    """A config from a dict, a Transformers config, a JSON file or the directory that holds one."""
    if config is None or isinstance(config, Mapping):
        return None if config is None else dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if not isinstance(config, str | Path):
        raise AdapterError(f"config={brief(config)}: expected a dict, a Transformers config, a file or its directory")
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        return parse(path.read_bytes(), infinite=True)
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(f"{path} is no config: {error}") from None


def open_source(
    src: Where | str, config: Any = None, own: bool = False, trust_pickle: bool = False, from_: str | None = None
) -> Checkpoint:
    """The checkpoint of a directory in any container that is read, with its own config or the one given.

    own: rules of one's own read it: as `open_checkpoint` has it. trust_pickle: whole training states too. from_: the
    system that it is said to be of, whose own directories have no config.
    """
    place(src)
    given = config_of(config)
    path = Path(str(src))
    if "://" in str(src) or not container_of(path):
        theirs = isinstance(from_, str) and from_ in SYSTEMS
        if theirs and given is None and path.is_dir() and not isfile(path / "config.json"):
            raise AdapterError(f"{path} {NO_CONFIG}")
        return open_checkpoint(src, given, own=own)
    if container_of(path) == "mp_rank" and not trust_pickle:
        raise AdapterError(f"{path} {UNTRUSTED}")
    if given is None:
        beside = [p for p in (path, path.parent) if isfile(p / "config.json")]
        if not beside:
            raise AdapterError(f"{path} {NO_CONFIG}")
        given = config_of(beside[0])
    return open_foreign(path, given or {})


def ours_alone(path: Where | str, verb: str) -> None:
    """Raises AdapterError for another system's files, which a command does not read: convert them first."""
    if "://" not in str(path) and (container := container_of(Path(str(path)))):
        try:
            here = side(open_source(path))
        except AdapterError:  # no config, or names of several systems
            here = ""
        raise AdapterError(others(path, f"{here}'s" if here in SYSTEMS else f"in {container} files", verb))


def others(path: object, whose: str, verb: str) -> str:
    return f"{path} is {whose}. Fix: fmoe convert {path} HF --to hf, then {verb} that"


def side(source: Checkpoint, from_: str | None = None) -> str:
    """What a source is: "native", "hf" or a system, by its names. Raises AdapterError where several fit."""
    if from_ is not None:
        if not isinstance(from_, str) or from_ not in ("hf", "native", *SYSTEMS):
            told = f"{', '.join(SYSTEMS)}{meant(from_, ('hf', 'native', *SYSTEMS))}"
            raise AdapterError(f"from {from_!r}: expected hf, native or one of {told}")
        return from_
    if source.native:
        return "native"
    container = source.container if isinstance(source, Foreign) else "safetensors"
    if container in ("gguf", "mp_rank"):
        return {"mp_rank": "megatron"}.get(container, container)
    fits = [s.name for s in SYSTEMS.values() if s.marks(source.specs, source.model_type)]
    fits = [n for n in fits if (container == "dcp") == (SYSTEMS[n].container == "dcp")] or fits
    if len(fits) > 1:
        raise AdapterError(f"{source.path} may be {' or '.join(fits)}. Fix: from_=, or --from SYSTEM")
    stacked = any(n.rpartition(".")[2] in MATRICES for n in source.specs)
    return fits[0] if fits else "automodel" if stacked else "hf"  # our names without our fmoe.json: a trainer's


def adapters(source: Checkpoint, here: str, to: str, lossy: bool, **choices: Any) -> tuple[Adapter, Adapter]:
    """Hugging Face -> the source's side, and the source's side -> the target's."""
    if here == to:
        fix = ". Fix: from_=, or --from SYSTEM, where it is another system's"
        raise AdapterError(f"{source.path} is {to} already{fix}")
    own = {n: v for n, v in choices.items() if n in ("quantized", "dtype")}
    if to == "hf" and own.get("quantized") == "decode" and packed(source, here):
        fix = "Fix: quantized='keep', and then convert once more, to='hf' with dtype='bfloat16'"
        raise AdapterError(f"{source.path} holds codes, which go to Hugging Face's layout as they are. {fix}")
    back = _back(source, here, lossy, own)
    names = source.specs if here == "hf" else back.plan(source.specs).targets
    if to == "hf":
        layouts = {n: v for n, v in choices.items() if n not in own}
        return back.inverse, back.choose(**layouts) if layouts else back
    made = (
        family(source.model_type).adapter(source.config, **choices)
        if to == "native"
        else systems.adapter(to, source.model_type, source.config, lossy=lossy, **choices)
    )
    return back.inverse, back >> made.resolve(names)


def plan_between(source: Checkpoint, to: str, there: Adapter, **ranges: range) -> Plan:
    """`plan_from`; where only codes and scales are in a system's way, the error says how they become numbers."""
    try:
        return plan_from(source, there, **ranges)
    except AdapterError as error:
        codes = lambda n: QUANTISED.search(n) or n.endswith(("_blocks", "_scales"))
        if to not in SYSTEMS or not any(map(codes, error.keys)):
            raise
        how = (quantization_of(source.config) or {}).get("quant_method", "codes and scales")
        fix = f"Fix: fmoe convert {source.path} BF16 --to hf --dtype bfloat16, then BF16"
        fix += ", or quantized='keep'" * (source.model_type in SYSTEMS[to].kept)
        found = f"{to}'s tables take decoded weights: found codes and scales, expected floats"
        text = f"{source.path} is quantised with {how}, and {found}. {fix}"
        raise AdapterError([Problem(text, error.keys)]) from None


def gaps_between(source: Checkpoint, here: str, adapter: Adapter) -> Gaps:
    """What a source on either side of another system lacks. adapter: Hugging Face -> the source's side."""
    hf = source.specs if here == "hf" else adapter.inverse.plan(source.specs).targets
    if here == "native":
        return gaps_of(source, source.specs, hf)
    kind = family(source.model_type)
    return gaps(kind, source.config, kind.adapter(source.config).resolve(hf).plan(hf).targets)


def whole_between(source: Checkpoint, here: str, adapter: Adapter, fix: str = "") -> Gaps:
    """The same; raises AdapterError where anything is missing."""
    found = gaps_between(source, here, adapter)
    if found.problems:
        text = f"{source.path} is not whole: download what is missing, or mend config.json{fix}"
        raise AdapterError([*found.problems, text])
    return found


def forth(source: Checkpoint, from_: str | None = None, **choices: Any) -> tuple[Adapter, Adapter]:
    """The adapter of a source, and what takes it to the other side: Hugging Face's, of a system's; of HF's, ours."""
    here = "hf" if "adapter" in choices else side(source, from_)
    if here in SYSTEMS:
        back = _back(source, here, False, choices)
        return back.inverse, back
    made = adapter_of(source, **choices)
    return made, made.inverse if source.native else made


def _back(source: Checkpoint, here: str, lossy: bool, own: dict[str, Any]) -> Adapter:
    """The source's side -> Hugging Face, its forms settled by names; of a system's choices those that fit."""
    if here == "hf":
        layers_fit(Path(str(source.path)) / "config.json", source.config, source.specs)
        return Adapter()
    if here == "native":
        return adapter_of(source, **own).inverse
    system, problem = SYSTEMS[here], None
    lead = source.lead if isinstance(source, Foreign) else Adapter()
    names = lead.plan(source.specs).targets if lead.stages else source.specs
    own = own | {"quantized": "keep"} if packed(source, here) else own
    options = {n: o for n, o in system.choices.items() if o}
    for chosen in product(*options.values()):
        try:
            made = system.adapter(
                source.model_type, source.config, lossy=lossy, **own, **dict(zip(options, chosen, strict=True))
            )
            back = made.inverse.resolve(names)
            back.plan(names)
            return lead >> back if lead.stages else back
        except AdapterError as error:
            problem = problem or error
    raise problem or AdapterError(f"{here}: no table")


def packed(source: Checkpoint, here: str) -> bool:
    """Whether a source of a system that can hold them holds codes and scales, which its table moves as they are."""
    can = here in SYSTEMS and SYSTEMS[here].keeps(source.model_type)
    return can and any(spec.dtype in CODES and WEIGHT.search(name) for name, spec in source.specs.items())
