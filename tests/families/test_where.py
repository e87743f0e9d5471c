"""A tensor that some layers have is missed alone where the config says that a layer has it: every class."""

import copy

import hf
import hf_zoo as zoo
import known_names
import known_where
import pytest
from known_numbers import changed

from fmoe.families import FAMILIES
from fmoe.families.complete import gaps
from fmoe.families.known import known, nearest
from fmoe.families.numbered import by_stack
from fmoe.families.sparse import WAYS
from fmoe.families.where import settled


def by_layer(name):
    """Whether a list or a layer's number decides, and not flags alone."""
    (form, *_) = known()[known_names.family_type(name)]["forms"]
    return any(
        c[0] not in ("on", "off") for rules in form["where"].values() for r in rules for way in r[0] for c in way
    )


NAMES = [n for n in (*hf.MODELS, *zoo.MODELS) if by_layer(n)]


def cases(name):
    """Configs with more layers, with the lists that its class makes for them, and with lists turned round."""
    cls, config = known_names.base(name)
    longer = [*known_where.longer(config, known_names.text_of)]
    yield from (config, longer[0], *longer[-1:])
    for field, value in known_names.text_of(config).to_dict().items():
        if isinstance(value, list) and len({*map(str, value)}) > 1:
            _, other = known_names.base(name)
            setattr(known_names.text_of(other), field, value[::-1])
            try:
                yield type(other).from_dict(other.to_dict())  # what follows from the list, follows anew
            except Exception:  # the config's own checks
                continue


def without(config, fields):
    """What a config says but for these fields of its text model; None: its class then makes another model of it."""
    said, text = config.to_dict(), known_names.text_of(config).to_dict()
    ours = said["text_config"] if known_names.text_of(config) is not config else said
    for field in fields:
        ours.pop(field, None)
    try:
        made = known_names.text_of(type(config).from_dict(copy.deepcopy(said))).to_dict()
    except Exception:  # the config's own checks
        return None
    return said if all(made.get(f) == text.get(f) for f in fields) else None


@pytest.mark.parametrize("name", NAMES)
def test_what_the_config_gives_a_layer_is_missed_alone_and_nothing_else_is(name):
    cls, _ = known_names.base(name)
    kind, lost = FAMILIES[known_names.family_type(name)], 0
    for config in cases(name):
        config.architectures = [cls.__name__]
        try:
            names = known_names.sized(cls, config, name, True)
        except Exception:  # Transformers builds no such model
            continue
        said = config.to_dict()
        assert gaps(kind, said, names).problems == []
        lists = {f for f, v in known_names.text_of(config).to_dict().items() if isinstance(v, list)} - {"architectures"}
        for less in (without(config, [f]) for f in lists):
            assert less is None or gaps(kind, less, names).problems == []
        stacks = by_stack(names)
        form = nearest(said, stacks)[0]
        for stack, layers in stacks.items():
            for l, held in list(layers.items())[:3] if stack in form["where"] else ():
                told = settled(form["where"][stack], {**said, **said.get("text_config", {})}, l, held)
                for n in (n for n, there in told.items() if there):
                    gone = f"{stack}.{l}.{n}" if stack else n
                    problems = gaps(kind, said, [m for m in names if m != gone]).problems
                    assert any(gone in p.keys for p in problems), gone
                    lost += 1
    assert lost


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_a_model_of_a_config_that_does_not_say_which_layers_have_experts_is_whole(name):
    """Three layers: as many as some classes make without experts where nothing is said."""
    cls, config = known_names.base(name)
    made = known_where.of_class(config, known_names.text_of, 3)
    fields = {*WAYS, "expert_layer_offset", "moe_layer_end_index"}.intersection(
        known_names.text_of(config).to_dict() if made else ()
    )
    built = {}
    for left_out in [[f] for f in sorted(fields)] + [sorted(fields)] * (len(fields) > 1):
        given = made.to_dict()
        ours = given["text_config"] if known_names.text_of(made) is not made else given
        for field in left_out:
            del ours[field]
        given["architectures"] = [cls.__name__]
        try:
            read = type(made).from_dict(copy.deepcopy(given))
            if (same := repr(read)) not in built:
                built[same] = known_names.sized(cls, read, name, True)
        except Exception:  # Transformers builds no such model
            continue
        assert gaps(FAMILIES[known_names.family_type(name)], given, built[same]).problems == [], left_out


OTHER = [("jamba", dict(num_experts=1, num_experts_per_tok=1)), ("switch_transformers", dict(num_layers=1))]
OTHER += [(name, dict(num_dense_layers=1)) for name in ("afmoe", "lfm2_moe")]
OTHER += [("hy_v3", dict(num_shared_experts=0)), ("nllb-moe", dict(decoder_layers=4))]
OTHER += [("nllb-moe", dict(decoder_layers=6, decoder_sparse_step=3)), ("jamba", dict(attn_layer_offset=0))]
OTHER += [("gemma4_text", dict(hidden_size_per_layer_input=8)), ("gemma4_text", dict(attention_k_eq_v=True))]
OTHER += [("inkling2_text", dict(num_hidden_layers=1))]
OTHER += [("granitemoehybrid", dict(num_local_experts=0)), ("qwen3_moe", dict(num_experts=0))]


@pytest.mark.parametrize(("name", "said"), OTHER)
def test_a_class_with_another_number_is_whole(name, said):
    """What was refused though Transformers itself had written it."""
    cls, config = known_names.base(name)
    config.architectures = [cls.__name__]
    config = changed(config, said)  # lists for each layer with the number of layers: no class reads others
    names = known_names.sized(cls, config, name, True)
    assert gaps(FAMILIES[known_names.family_type(name)], config.to_dict(), names).problems == []


NONE = dict(first_k_dense_replace=9, num_dense_layers=9, moe_layer_start_index=9, mlp_only_layers=[0, 1, 2])
NONE |= dict(mlp_layer_types=["dense"] * 2, encoder_sparse_step=0, decoder_sparse_step=0, expert_layer_offset=9)
NONE |= dict(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, enable_moe_block=False)


def numbered(name):
    """Stacks of a class that are not its text model's."""
    forms = known()[known_names.family_type(name)]["forms"]
    return {s for f in forms for s in (*f["stacks"], *(s for t in f["towers"].values() for s in t["stacks"]))}


@pytest.mark.parametrize(
    "name", [n for n in (*hf.MODELS, *zoo.MODELS) if len(numbered(n)) > 1 or n in ("jamba", "longcat_flash")]
)
def test_a_model_without_any_expert_is_whole_whatever_else_is_numbered(name):
    """No layer with experts, fewer layers than something else has parts, or no layer at all."""
    cls, config = known_names.base(name)
    text = known_names.text_of(config).to_dict()
    for less in ({f: v for f, v in NONE.items() if f in text}, {f: 1 for f in known_where.COUNTS if f in text}):
        given = config.to_dict() | {"architectures": [cls.__name__]}
        ours = given["text_config"] if known_names.text_of(config) is not config else given
        ours |= less | {f: v[:1] for f, v in ours.items() if isinstance(v, list) and "num_hidden_layers" in less}
        try:
            names = known_names.sized(cls, type(config).from_dict(copy.deepcopy(given)), name, True)
        except Exception:  # Transformers builds no such model
            continue
        assert gaps(FAMILIES[given["model_type"]], given, names).problems == []


SAID = [
    ("jamba", "attn_layer_offset", 0),
    ("nllb-moe", "decoder_sparse_step", 3),
    ("nllb-moe", "encoder_sparse_step", 4),
]
SAID += [("gemma4_text", "hidden_size_per_layer_input", 8), ("jamba", "attn_layer_offset", -1)]


@pytest.mark.parametrize(("name", "field", "value"), SAID)
def test_a_number_that_says_of_layers_what_they_do_not_have_is_missed(name, field, value):
    cls, config = known_names.base(name)
    config.architectures = [cls.__name__]
    names = known_names.sized(cls, config, name, True)
    problems = gaps(FAMILIES[known_names.family_type(name)], config.to_dict() | {field: value}, names).problems
    assert any(f"{field} {value}" in p.text for p in problems)


def unset(name):
    """Fields that are null where a class has other tensors."""
    (form, *_) = known()[known_names.family_type(name)]["forms"]
    return {c[1] for rules in form["where"].values() for r in rules for way in r[0] for c in way if c[0] == "set"}


@pytest.mark.parametrize("name", [n for n in NAMES if unset(n)])
def test_a_field_that_is_null_where_tensors_are_of_its_number_is_told_and_the_other_way_round(name):
    cls, config = known_names.base(name)
    config.architectures = [cls.__name__]
    kind, said = FAMILIES[known_names.family_type(name)], config.to_dict()
    names = known_names.sized(cls, config, name, True)
    for field in unset(name):
        path = "text_config" if known_names.text_of(config) is not config else ""
        ours = said[path] if path else said
        other = None if ours[field] is not None else 8
        changed_to = {**ours, field: other}
        assert gaps(kind, {**said, path: changed_to} if path else changed_to, names).problems, field


def test_experts_beside_a_config_that_counts_none_are_a_problem():
    cls, config = known_names.base("qwen3_moe")
    config.architectures = [cls.__name__]
    names = known_names.sized(cls, config, "qwen3_moe", True)
    problems = gaps(FAMILIES["qwen3_moe"], config.to_dict() | {"num_experts": 0}, names).problems
    assert any("experts, and config.json counts 0: expected none" in p.text for p in problems)
