"""What a user writes: rules, keeps, drops, aliases and renames, each an adapter of its own, joined by `|` and `>>`."""

from collections.abc import Iterable, Mapping

from fmoe.entrance import held
from fmoe.layout.adapter import Adapter
from fmoe.layout.entries import Drop, Either, Entry, Keep, Together, rules_of
from fmoe.layout.notation import Rule, interned
from fmoe.layout.spelled.alias import Alias, Copies
from fmoe.layout.spelled.bounds import size
from fmoe.layout.spelled.parsing import parse
from fmoe.layout.table import Table
from fmoe.types import AdapterError, brief


def rule(hf: str, native: str, **bounds: int | Iterable[int]) -> Adapter:
    """hf <-> native: tensors whose names and axes stand in this relation, as an adapter of one rule.

    A name captured in braces on both sides indexes the relation; captured on one side only, it is an axis on the other.
    `(g i)` concatenates, `(i g)` interleaves, `(q|k|v)` joins unequal parts of `{p=q|k|v}` `[p d]`, `1` is an axis of
    size 1. One letter is a number, a word is text: `{pre}` at the start is any prefix, `{rest}` at the end any tail.
    `{k=l+61}` is a number shifted by 61; `{k=e+E}` by the size of e, where a second tower's experts follow the first's.
    bounds: `e=8` (0 to 7), `l=range(3, 61)` (the values allowed). Raises AdapterError where it is no bijection.

    >>> print(rule("{pre}experts.{e}.{g=gate|up}.weight [i d]", "{pre}experts.gate_and_up_projs [e d (g i)]", e=8))
    {pre}experts.{e}.{g=gate|up}.weight [i d]  <->  {pre}experts.gate_and_up_projs [e d (g i)]   where e < 8
    """
    found = interned(parse(hf), parse(native))
    if unknown := bounds.keys() - found.letters:
        raise AdapterError(f"rule {found} has no letter {', '.join(sorted(unknown))} to bound")
    return Adapter((Table((found.bind(bounds),)),))


def keep(pattern: str) -> Adapter:
    """x <-> x: names that match and that no rule claims pass unchanged. `{rest}` alone is every name.

    A name that looks like an expert's, or like part of a quantised tensor, is not kept unless the pattern spells it.

    >>> import torch
    >>> (rule("a [d]", "b [d]") | keep("{rest}")).from_hf({"a": torch.zeros(1), "c": torch.ones(1)})
    {'b': tensor([0.]), 'c': tensor([1.])}
    """
    return Adapter((Table((Keep(parse(pattern)),)),))


def drop(pattern: str, *, because: str) -> Adapter:
    """x -> nothing: HF names with no native counterpart. Such an adapter is not lossless.

    >>> drop("{pre}rotary_emb.inv_freq", because="recomputed from the config").lossless
    False
    """
    return Adapter((Table((Drop(parse(pattern), because),)),))


def alias(name: str, *, of: str, **bounds: int | Iterable[int]) -> Adapter:
    """A HF name that may hold the same tensor as another: checked equal and merged; written back if it was found.

    With captures, as many names: a letter of both indexes the relation, one of `name` alone counts the copies and is
    bounded (bounds: as in `rule`). All of them are there, or none.

    >>> import torch
    >>> tied = alias("head", of="embed") | keep("{rest}")
    >>> embed = torch.zeros(1)
    >>> tied.from_hf({"head": embed, "embed": embed})
    {'embed': tensor([0.])}
    >>> tied.resolve(["head", "embed"]).to_hf({"embed": embed}).keys()
    dict_keys(['embed', 'head'])
    >>> norms = alias("rank_{r:02}.norm", of="rank_00.norm", r=range(1, 3)) | keep("{rest}")
    >>> norms.from_hf({f"rank_0{r}.norm": embed for r in range(3)})
    {'rank_00.norm': tensor([0.])}
    """
    made: Alias | Copies = Alias(name, of)
    if "{" in name + of:
        made = Copies(parse(name), parse(of), tuple((n, size(n, v)) for n, v in sorted(bounds.items())))
    if unknown := bounds.keys() - (made.name.captures if isinstance(made, Copies) else {}):
        raise AdapterError(f"{made}: no letter {', '.join(sorted(unknown))} to bound")
    return Adapter((Table((Either(name, (("absent", ()), ("present", (made,)))),)),))


def either(name: str, quantized: str | None = None, **options: Adapter) -> Adapter:
    """One of several tables, settled by the names that are there or by `choose(name=...)`; the first is published.

    quantized: the option in which quantised tensors are published, where that is not the first. Raises AdapterError
    for options that are no tables of rules.

    >>> import torch
    >>> adapter = either("layout", apart=rule("w.{e} [d]", "w [e d]"), fused=rule("w [e d]", "w [e d]"))
    >>> native = {"w": torch.ones(2, 1)}
    >>> list(adapter.to_hf(native)), list(adapter.choose(layout="fused").to_hf(native))
    (['w.0', 'w.1'], ['w'])
    """
    return Adapter((Table((Either(name, tuple((k, _entries(a)) for k, a in options.items()), quantized),)),))


def rename(old: str, new: str) -> Adapter:
    """old <-> new, and every other name unchanged: a prefix that ends in a dot, or a whole name or path.

    Both may have captures: `rename("{pre}self_attn.{rest}", "{pre}attention.{rest}")` is of a module in the middle of
    names. A rename that matches nothing is a note of the plan.

    >>> import torch
    >>> rename("model.", "policy.").from_hf({"model.a": torch.zeros(1), "b": torch.zeros(1)}).keys()
    dict_keys(['b', 'policy.a'])
    """
    for name in (old, new):
        if not isinstance(name, str):
            raise AdapterError(f"rename: {brief(name)} is no name, expected text")
    if bool(old and new) and old.endswith(".") != new.endswith("."):
        told = f"rename: {old!r} <-> {new!r}: one ends in a dot and the other does not"
        raise AdapterError(f"{told}. Fix: {old.rstrip('.') + '.'!r} <-> {new.rstrip('.') + '.'!r}, of a prefix")
    if "[" in old + new or "{rest}" in old + new or old.endswith("}") or new.endswith("}"):
        return rule(old, new) | keep("{rest}")
    if old.endswith(".") or not (old and new):
        return rule(old + "{rest}", new + "{rest}") | keep("{rest}")
    return rule(old, new) | rule(old + ".{rest}", new + ".{rest}") | keep("{rest}")


def together(*adapters: Adapter) -> Adapter:
    """Rules whose HF tensors come together: a layer that has one must have all.

    Raises AdapterError for rules that do not count the same layers: each has the same captures on both of its sides.

    >>> import torch
    >>> layer = together(rule("{l}.up [i d]", "{l}.w [i d]"), rule("{l}.down [d i]", "{l}.v [d i]"))
    >>> layer.from_hf({"0.up": torch.zeros(2, 3)})
    Traceback (most recent call last):
    fmoe.types.AdapterError: missing '0.down', which must stand beside '0.up'. Fix: give both
    """
    entries = [e for a in adapters for e in _entries(a)]
    if other := [e for e in entries if not isinstance(e, Rule | Together)]:
        raise AdapterError(f"only rules can come together, not: {'; '.join(map(str, other))}")
    rules = tuple(rules_of(entries))
    index = lambda rule: {n: len(rule.source.captures[n].choices) for n in rule.shared}
    if unlike := [rule for rule in rules if index(rule) != index(rules[0])]:
        told = " and ".join(f"{list(rule.shared)} of {rule}" for rule in (rules[0], unlike[0]))
        raise AdapterError(f"rules that come together have the same captures on both sides, found {told}")
    return Adapter((Table((Together(rules),)),))


def table(adapters: Iterable[Adapter]) -> Adapter:
    """All of them side by side, in one table."""
    if isinstance(adapters, Mapping) or not isinstance(adapters, Iterable):
        named = adapters.get("model_type") if isinstance(adapters, Mapping) else getattr(adapters, "model_type", None)
        if named or isinstance(adapters, Mapping):
            raise AdapterError(f"a config goes second: fmoe.adapter({named or 'qwen3_moe'!r}, config)")
        raise AdapterError(f"{brief(adapters)}: expected a directory, a model type, or rules of your own")
    return Adapter((Table(tuple(dict.fromkeys(e for a in adapters for e in _entries(a)))),))


def as_adapter(found: object, name: str = "adapter", also: str = "") -> Adapter:
    """`found`, if it is an adapter. Raises AdapterError, which says what the argument `name` is instead.

    >>> as_adapter({}, "trainer")
    Traceback (most recent call last):
        ...
    fmoe.types.AdapterError: trainer= is a dict, expected an fmoe.Adapter, as fmoe.adapter(...) gives it
    """
    if isinstance(found, Adapter):
        return found
    kind = type(found).__name__
    told = f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
    raise AdapterError(f"{name}= is {told}, expected an fmoe.Adapter, as fmoe.{also or 'adapter(...) gives it'}")


def _entries(adapter: Adapter) -> tuple[Entry, ...]:
    if not isinstance(adapter, Adapter):
        raise AdapterError(f"{brief(adapter)} is no adapter: expected what rule, keep, drop, alias or either return")
    if len(adapter.stages) > 1 or not all(isinstance(s, Table) for s in adapter.stages):
        raise AdapterError(f"only a single table can stand here, not:\n{adapter}")
    return tuple(e for s in adapter.stages if isinstance(s, Table) for e in s.entries)


held(
    globals(),
    "rule keep drop alias either rename together Adapter.__init__",
    late="".join(f"Adapter.{n} " for n in "plan from_hf to_hf convert_single_tensor_to_hf iter_hf views".split()),
    where="fmoe",
)
