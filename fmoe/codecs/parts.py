"""Which names of a checkpoint are parts of one quantised tensor, in which format; and what is wrong with them."""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fmoe.codecs.foreign.affine import BITS
from fmoe.codecs.foreign.lists import Lists
from fmoe.codecs.foreign.words import codes_here, codes_there, laid_spec, zeros_here, zeros_there
from fmoe.codecs.format import Format
from fmoe.codecs.formats import UNREAD, UNREAD_OF
from fmoe.codecs.values import E8M0
from fmoe.layout.names import Names
from fmoe.types import Problem, TensorSpec

Specs = Mapping[str, TensorSpec]
Found = tuple[dict[str, "Parts"], list[Problem]]
Fresh = tuple[tuple[str, str | None], ...]  # names of formats, and a regex for what a fresh export writes in them
TURNED = "[i o]"  # the form of scales that a file stores the other way
FIX = "Fix: give both, as they were quantised, or the decoded tensor alone"
ACTIVATION = {0: "_activation_tensor", 1: "_activation_expert"}  # by its number of dimensions


@dataclass(frozen=True)
class Parts:
    """A tensor of this name and shape, in this format; its parts as a file names them, and as they are beside it."""

    name: str
    format: Format
    shape: tuple[int, ...]
    codes: str
    scale: str
    beside: str
    extent: str | None = None
    activation: tuple[str, str] | None = None
    second: tuple[str, str] | None = None
    order: str | None = None
    third: tuple[str, str] | None = None

    @property
    def stored(self) -> list[str]:
        more = (self.second and self.second[0], self.third and self.third[0], self.order)
        return [n for n in (self.codes, self.scale, self.extent, *more) if n]

    @property
    def kept(self) -> list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
        """(name in a file, name beside, shape there, shape here) of all scales."""
        f, grid = self.format, self.format.scale_shape(self.shape)
        made = [(self.scale, self.beside, f.spelled(grid), grid)]
        if self.second:
            made.append((*self.second, f.second_spec(self.shape).shape, f.held_second(self.shape).shape))
        if self.third:
            made.append((*self.third, (), ()))
        if self.order:
            made.append((self.order, self.order, self.shape[-1:], self.shape[-1:]))
        return made

    def here_specs(self, specs: Specs, dtype: torch.dtype | None = None) -> dict[str, TensorSpec]:
        """What the parts of a file are here: codes, or (dtype) what they decode to, under the tensor's name."""
        made = {here: TensorSpec(shape, specs[there].dtype) for there, here, _, shape in self.kept}
        made |= {self.second[1]: self.format.held_second(self.shape)} if self.second else {}
        whole = TensorSpec(self.shape, dtype) if dtype else self.format.kept_spec(self.shape)
        return {self.name: whole} | made

    def there_specs(self, specs: Specs) -> dict[str, TensorSpec]:
        """What the parts are in a file; of a scale that is not there, what a fresh one is."""
        kind = lambda name: specs[name].dtype if name in specs else self.format.scales[0]
        made = {there: TensorSpec(shape, kind(here)) for there, here, shape, _ in self.kept}
        made |= {self.second[0]: self.format.second_spec(self.shape)} if self.second else {}
        made |= {self.third[0]: TensorSpec((), torch.float32)} if self.third else {}
        made |= {self.extent: TensorSpec((len(self.shape),), torch.int64)} if self.extent else {}
        return {self.codes: self.format.file_spec(self.shape)} | made

    def here(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of a file as they are here: codes under the tensor's name, scales beside. Raises AdapterError."""
        f, made = self.format, {}
        for there, here, was, shape in self.kept:
            t = params[there]
            if f.zeros and self.second and there == self.second[0]:
                made[here] = zeros_here(f.zeros, t, self.shape[0], BITS[f.code], unsaid=f.unsaid, name=there)
            elif f.form == TURNED and there == self.scale:
                made[here] = t.mT
            else:
                made[here] = t if was == shape else t.reshape(shape)
        return {self.name: codes_here(f.words, params[self.codes], BITS.get(f.code, 8))} | made

    def there(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `here`."""
        f, made = self.format, {}
        for there, here, shape, was in self.kept:
            t = params[here]
            if f.zeros and self.second and there == self.second[0]:
                made[there] = zeros_there(f.zeros, t, BITS[f.code])
            elif f.form == TURNED and there == self.scale:
                made[there] = t.mT.contiguous()
            else:
                made[there] = t if was == shape else t.reshape(shape)
        return {self.codes: codes_there(f.words, params[self.name], BITS.get(f.code, 8))} | made


def spell(template: str, name: str) -> str | None:
    """The name of a part of the tensor X of this name; None where X has no stem S."""
    if "{X}" in template:
        return template.replace("{X}", name)
    stem, end = ("{S}", ".weight") if "{S}" in template else ("{W}", "_weight")
    return template.replace(stem, name.removesuffix(end)) if name.endswith(end) else None


def read(template: str, name: str) -> str | None:
    """The tensor X whose part bears this name, as far as the name can tell."""
    head, _, tail = template.partition("}")
    if not name.endswith(tail) or len(name) == len(tail):
        return None
    return name[: len(name) - len(tail)] + {"{S": ".weight", "{W": "_weight"}.get(head, "")


def own(template: str) -> bool:
    """Whether a part has a name of its own, which is not the tensor's."""
    return template not in ("{X}", "{S}.weight")


def _eight_bits(dtype: torch.dtype, formats: Iterable[Format]) -> bool:
    small = dtype.is_floating_point and dtype.itemsize == 1 and dtype != E8M0
    return small or dtype == torch.int8 and any(f.stored == torch.int8 for f in formats)


def is_part(template: str, x: str, f: Format, names: Container[str], fresh: Fresh) -> bool:
    """Whether a name that a template reads as a part of x is one: `.scale` is also a word for other things."""
    if f.stack and x not in names:
        return template == "{X}_weight_scale" and f"{x}_weight" not in names
    if template not in ("{S}.scale", "{S}.scales") or spell(f.weight, x) in names:
        return True
    pattern = dict(fresh).get(f.name)
    return pattern is not None and re.fullmatch(pattern, x) is not None


def in_file(specs: Specs, names: Names, formats: tuple[Format, ...], fresh: Fresh, lists: Lists) -> Found:
    """The quantised tensors among a file's names, and the parts that are no part of one."""
    candidates: dict[str, dict[str, Format]] = {}
    by_tail: dict[str, list[tuple[str, Format]]] = {}
    for f in formats:
        for template in (f.scale, f.weight, f.shape, f.second, f.third):
            if template and own(template):
                by_tail.setdefault(template.partition("}")[2], []).append((template, f))
    for name in names.ending(tuple(by_tail)):
        for template, f in (pair for tail, pairs in by_tail.items() if name.endswith(tail) for pair in pairs):
            if (x := read(template, name)) is not None and spell(template, x) == name:
                if is_part(template, x, f, specs, fresh) and not lists.rules_out(x, f.name):
                    candidates.setdefault(x, {})[f.name] = f
    found: dict[str, Parts] = {}
    problems: list[Problem] = []
    for x, fits in candidates.items():
        told = [_stored(x, f, specs) for f in fits.values()]
        made = sorted((t for t in told if isinstance(t, Parts)), key=lambda t: -len(t.stored))
        scales = {m.scale for m in made}
        if not made:
            wrong = [(f, t) for f, t in zip(fits.values(), told, strict=True) if isinstance(t, Problem)]
            kind = lambda part: getattr(specs.get(spell(part, x) or ""), "dtype", None)  # noqa: B023
            far = lambda f: (kind(f.weight) != f.stored, kind(f.scale) not in (None, *f.scales))  # noqa: B023
            problems.append(min(wrong, key=lambda w: (far(w[0]), w[1].keys[0] not in specs))[1])  # noqa: B023
        elif len(scales) > 1:
            problems.append(Problem(f"{x!r} has two scales: {', '.join(map(repr, scales))}", (x, *scales)))
        elif own(made[0].format.weight) and x in specs:
            text = f"{x!r} is there, and beside it {made[0].codes!r} that says it"
            problems.append(Problem(text, (x, made[0].codes)))
        elif odd := [n for t in UNREAD if (n := spell(t, x)) and n in specs and n not in made[0].stored]:
            what = f"{made[0].format.name} with {UNREAD_OF[odd[0].rpartition('.')[2]]}"
            text = f"{odd[0]!r}: {what}, which fmoe does not decode. Fix: quantise {x!r} without"
            problems.append(Problem(text, (odd[0], x)))
        else:
            found[x] = made[0]
    claimed = {spell(t, x) for x in candidates for f in formats for t in (f.weight, f.scale)} | candidates.keys()
    claimed |= {n for p in found.values() for n in p.stored}
    small = {dtype for dtype in {s.dtype for s in specs.values()} if _eight_bits(dtype, formats)}
    for name in [n for n, spec in specs.items() if spec.dtype in small and n not in claimed] if small else ():
        scales_ = dict.fromkeys(s for f in formats if (s := spell(f.scale, name)))
        missing, dtype = next(iter(scales_), name), specs[name].dtype
        problems.append(Problem(f"{name!r} is {dtype} and its scale {missing!r} is missing. {FIX}", (name, missing)))
    return found, problems


def _stored(x: str, f: Format, specs: Specs) -> "Parts | Problem":
    codes, scale = spell(f.weight, x), spell(f.scale, x)
    assert codes and scale
    if codes not in specs:
        return Problem(f"{scale!r} is the scale of {codes!r}, which is missing. {FIX}", (scale, codes))
    if scale not in specs:
        return Problem(f"{codes!r} is {specs[codes].dtype} and its scale {scale!r} is missing. {FIX}", (codes, scale))
    if specs[codes].dtype != f.stored:
        text = f"{scale!r} stands beside {codes!r} in {specs[codes].dtype}, expected {f.stored}"
        return Problem(text, (scale, codes))
    second = spell(f.second, x) if f.second else None
    if second and second not in specs:
        return Problem(
            f"{scale!r} stands without {second!r}, the {'zero points' if f.zeros else 'scale of scales'} of {f.name}",
            (second, scale),
        )
    laid = laid_spec(f.words, specs[codes], f.packed)
    shape = None if laid is None else f.decoded(laid)
    if shape is None:
        return Problem(f"{codes!r} is {list(specs[codes].shape)}, which is no tensor of {f.name}", (codes, scale))
    f = f.named(x).sized(shape, specs[scale].shape)
    if not f.fits(shape):
        return Problem(f"{scale!r} is {list(specs[scale].shape)}, no scales of {codes!r} {list(shape)}", (scale, codes))
    if (third := spell(f.third, x) if f.third else None) and specs.get(third) != TensorSpec((), torch.float32):
        text = f"{third!r} is {specs.get(third, 'missing')}, expected one number in float32 beside {second!r}"
        return Problem(text, (third, codes))
    if second and specs[second] != (wanted_ := f.second_spec(shape)):
        many = f.zeros or wanted_.shape[:1] > (1,)
        what = f"{list(wanted_.shape)} {wanted_.dtype}" if many else "one number in float32"
        return Problem(f"{second!r} is {specs[second]}, expected {what}", (second, scale))
    if specs[scale].shape != f.spelled(f.scale_shape(shape)) or specs[scale].dtype not in f.scales:
        told, kinds = specs[scale], ", ".join(str(d).removeprefix("torch.") for d in f.scales)
        wanted = list(f.spelled(f.scale_shape(shape)))
        text = f"{scale!r} is {list(told.shape)} {told.dtype}, expected {wanted} of {kinds}: "
        return Problem(text + f"one for each block of {codes!r} {list(specs[codes].shape)}", (scale, codes))
    extent = spell(f.shape, x) if f.shape else None
    if extent and specs.get(extent) != TensorSpec((len(shape),), torch.int64):
        text = f"{extent!r} is {specs.get(extent, 'missing')}, expected int64 [{len(shape)}]: the shape of {x!r}"
        return Problem(text, (extent, codes))
    activation = None
    for name in (n for t in f.activation if (n := spell(t, x)) and n in specs):
        rank = len(specs[name].shape)
        if rank not in ACTIVATION or rank and specs[name].shape != shape[:1]:
            text = f"{name!r} is {list(specs[name].shape)}, expected [] or one for each of {shape[0]} experts"
            return Problem(text, (name, codes))
        activation = (name, x + ACTIVATION[rank])
    pair = (second, f"{x}{f.beside}_second") if second else None
    order = spell(f.order, x) if f.order else None
    if order and order in specs and specs[order] != TensorSpec(shape[-1:], torch.int32):
        text = f"{order!r} is {specs[order]}, expected int32 {list(shape[-1:])}: the group of each column of {x!r}"
        return Problem(text, (order, codes))
    last, order = (third, f"{x}{f.beside}_third") if third else None, order if order in specs else None
    return Parts(x, f, shape, codes, scale, x + f.beside, extent, activation, pair, order, last)


def as_named(x: str, f: Format, shape: tuple[int, ...]) -> Parts | None:
    """The parts of a tensor in a format; None where its name has no room for them."""
    codes, scale = spell(f.weight, x), spell(f.scale, x)
    if not codes or not scale:
        return None
    second = spell(f.second, x) if f.second else None
    pair = (second, f"{x}{f.beside}_second") if second else None
    third = (spell(f.third, x) or "", f"{x}{f.beside}_third") if f.third else None
    extent = f.shape and spell(f.shape, x)
    return Parts(x, f, shape, codes, scale, x + f.beside, extent, second=pair, third=third)
