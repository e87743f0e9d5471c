"""What a flag of the config denies though it is there is told: every class, every flag that the data knows of."""

import hf
import hf_zoo as zoo
import known_names
import pytest

from fmoe.families import FAMILIES
from fmoe.families.complete import gaps
from fmoe.families.known import known

NAMES = [*hf.MODELS, *zoo.MODELS]
DROPS = "Transformers drops"


def flags(name):
    """Fields that alone decide over names of the published form's layers or root, and their values: on, off."""
    (form, *_) = known()[known_names.family_type(name)]["forms"]
    alone = (way[0] for rules in form["where"].values() for r in rules for way in r[0] if len(r[0]) == len(way) == 1)
    return sorted({(c[1], c[0] == "on") for c in alone if c[0] in ("on", "off") and "." not in c[1]})


def with_each(name):
    """For each flag that decides over tensors of the class: (config, tensors) with it on, and with it off."""
    for field, on in flags(name):
        cls, config = known_names.base(name)
        config.architectures, both = [cls.__name__], []
        if type(known_names.text_of(config).to_dict().get(field)) is not bool:
            continue
        for value in (on, not on):
            setattr(known_names.text_of(config), field, value)
            try:
                both.append((config.to_dict(), known_names.sized(cls, config, name, True)))
            except Exception:  # Transformers builds no such model
                break
        if len(both) == 2 and both[0][1].keys() - both[1][1].keys():
            yield field, *both


@pytest.mark.parametrize("name", [n for n in NAMES if flags(n)])
def test_what_a_flag_denies_is_told_and_what_it_gives_is_not(name):
    kind = FAMILIES[known_names.family_type(name)]
    notes = lambda config, tensors: [n for n in gaps(kind, config, tensors).notes if DROPS in n]
    for field, (given, more), (denied, fewer) in with_each(name):
        assert not notes(given, more) and not notes(denied, fewer)
        assert any(f"has {field} " in n for n in notes(denied, more)), field
        config, text = known_names.base(name)[1], denied.get("text_config") or denied
        default = known_names.text_of(type(config)()).to_dict().get(field)
        if text is denied and "" not in {s for f in known()[denied["model_type"]]["forms"] for s in f["where"]}:
            assert any(f"has {field} " in n for n in notes(denied, {f"lm.{n}": t for n, t in more.items()})), field
        for silent in (None, "left out") if bool(default) == bool(text[field]) else (None,) * (not text[field]):
            text[field] = silent
            if silent:
                del text[field]
            assert any(field in n for n in notes(denied, more)), (field, silent)
