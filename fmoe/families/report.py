"""A look-out: what the libraries that are installed here have, and fmoe lacks or no longer matches.

python -m fmoe.families.report
"""

import re
from collections.abc import Iterator
from importlib import import_module, metadata, util
from pathlib import Path

from fmoe.codecs.formats import FORMATS
from fmoe.families import FAMILIES, NO_FAMILY
from fmoe.families.known import known

EXPERTS = re.compile(r"^class \w*(Experts|[a-z]MoE|[a-z]Moe|MoeBlock|MoEBlock)\(", re.M)
TYPES = re.compile(r'^    model_type = "([\w-]+)"', re.M)
PEFT = range(18, 22)
"""Minor versions 0.x of PEFT whose files are read and written as tests compare them."""
ROWS = {
    "dense": (),
    "float-quantized": ("fp8 side tensor", "fp8 side channel", "fp8 side blocks"),
    "int-quantized": ("int8 channel",),
    "mixed-precision": (),
    "mxfp4-pack-quantized": ("mxfp4 packed",),
    "mxfp8-quantized": ("mxfp8 side",),
    "naive-quantized": ("fp8 side channel", "int8 channel"),
    "nvfp4-pack-quantized": ("nvfp4 packed",),
    "pack-quantized": ("int4 pack", "int8 pack"),
}
"""compressed-tensors' formats, and the rows of fmoe's table that read them; of mixed ones each tensor has its own."""
UNREAD = ("marlin-24", "mxfp6-pack-quantized", "sparse-24-bitmask", "sparse-bitmask")
"""Those that fmoe refuses by name."""

SINCE_5_24 = frozenset({"hy_v4_vl", "hy_v4_vl_text", "inkling2_loop", "inkling2_loop_text", "lara_mini"})
"""What an earlier Transformers does not have yet."""
FOLDERS = {
    "hunyuan_image3": "hunyuan_image_3_moe",
    "ling_v2": "bailing_moe_v2",
    "nemotron_omni": "nemotron_h_omni",
    "nemotron_v3": "nemotron_h",
}
"""Automodel's names for families that have others here."""
DENSE = ("bagel", "llava_onevision", "mistral3", "mistral3_vlm", "muse_glimmer", "qwen2_5_omni")
"""Automodel's models that have an adapter and no experts."""


def transformers_models() -> Iterator[str]:
    """Model types of the installed Transformers that have experts and no family, and classes that are there no more."""
    models = _folder("transformers", "models")
    here: set[str] = set()
    for path in sorted(models.glob("*/configuration_*.py")) if models else ():
        types = set(TYPES.findall(path.read_text()))
        here |= types
        modelling = path.with_name(path.name.replace("configuration", "modeling"))
        if modelling.is_file() and EXPERTS.search(modelling.read_text()) and not types & {*FAMILIES, *NO_FAMILY}:
            yield f"model types {', '.join(sorted(types))} have experts and no family"
    if models:
        later = SINCE_5_24 if "lara_mini" not in here else frozenset()
        gone = sorted({*known()} - here - later)
        yield from (f"{name}: known to fmoe, and gone from Transformers" for name in gone)


def automodel_models() -> Iterator[str]:
    """Models of the installed Automodel, by the name of their folder, that no family's name begins with."""
    models = _folder("nemo_automodel", "components/models")
    for path in sorted(models.glob("*/state_dict_adapter.py")) if models else ():
        name = FOLDERS.get(path.parent.name, path.parent.name)
        if name not in DENSE and not any(
            known_type.startswith(name) or name.startswith(known_type) for known_type in FAMILIES
        ):
            yield f"{name} has a state dict adapter and no family of that name"


def peft_forms() -> Iterator[str]:
    """PEFT's version, where it is not one that tests compare with."""
    minor = int(metadata.version("peft").split(".")[1])
    if minor not in PEFT:
        yield f"0.{minor}: adapters are compared with 0.{PEFT[0]} to 0.{PEFT[-1]}"


def compressed_formats() -> Iterator[str]:
    """Formats of the installed compressed-tensors that fmoe's table does not read, and which rows it lacks."""
    for found in import_module("compressed_tensors").CompressionFormat:
        if found.value in UNREAD:
            yield f"format {found.value}: not decoded, refused by its name"
        elif found.value not in ROWS:
            yield f"format {found.value}: unknown"
        elif lacking := [row for row in ROWS[found.value] if row not in FORMATS]:
            yield f"format {found.value}: no row {', '.join(lacking)}"


LOOKS = {
    "transformers": transformers_models,
    "nemo_automodel": automodel_models,
    "peft": peft_forms,
    "compressed_tensors": compressed_formats,
}


def report() -> dict[str, list[str]]:
    """Library with its version -> what fmoe lacks of it; a library that is not installed is one line that says so."""
    found: dict[str, list[str]] = {}
    for name, look in LOOKS.items():
        if util.find_spec(name) is None:
            found[name] = ["not installed: not looked at"]
        else:
            found[f"{name} {metadata.version(name.replace('_', '-'))}"] = list(look())
    return found


def _folder(package: str, inside: str) -> Path | None:
    spec = util.find_spec(package)
    return Path(str(spec.origin)).parent / inside if spec and spec.origin else None


if __name__ == "__main__":
    for library, lines in report().items():
        print(library)
        for line in lines or ["nothing is missing"]:
            print(f"  {line}")
