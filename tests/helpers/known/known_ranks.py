"""How many dimensions a model's tensors have: run as a program, this writes fmoe/families/ranks.json.

`known_ranks.py [NAME ...]`. Kept is what `sizes.json` does not show: there the last dimension is one of known size.
"""

import sys
from itertools import product
from pathlib import Path

import hf
import hf_zoo as zoo
import known_names

import fmoe
from fmoe.families.known import text_stack
from fmoe.families.numbered import by_stack
from fmoe.families.sizes import known_sizes
from fmoe.families.surplus import template

FILE = Path(fmoe.families.__file__).with_name("ranks.json")


def seen(name: str) -> dict[str, int]:
    """A name as in `sizes.json`, as in files and in memory -> the most dimensions that one has."""
    alike, made = known_names.family_type(name), dict[str, int]()
    names = [n for n in (*hf.MODELS, *zoo.MODELS) if known_names.family_type(n) == alike]
    for n, original in product(names, (True, False)):
        cls, config = known_names.base(n)
        told = config.to_dict() | {"architectures": [cls.__name__]}
        try:
            native = known_names.sized(cls, config, n, original)
        except fmoe.AdapterError:  # LongCat in memory, which is refused
            continue
        main = text_stack(told, by_stack(native))
        for at, spec in ((template(t, main), spec) for t, spec in native.items()):
            made[at] = max(len(spec.shape), made.get(at, 0))
    return made


def ranks(name: str) -> dict[str, int | None]:
    """Those of names whose last dimension is none of known size; None of those that no model of the type has."""
    known, found = dict[str, int](), seen(name)
    for at, k in (each for dims in known_sizes().get(known_names.family_type(name), {}).values() for each in dims):
        if k >= 0 and "=" not in at:
            known[at] = max(k + 1, known.get(at, 0))
    return {at: found.get(at) for at, rank in known.items() if found.get(at) != rank}


if __name__ == "__main__":
    known_names.rewrite(FILE, lambda name, was: ranks(name), sys.argv[1:])
