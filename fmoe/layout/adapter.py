"""An adapter is a pair of pure functions over Params, `from_hf` and `to_hf`, derived from stages that can be inverted.

    a >> b      a, then b            (a >> b).inverse == b.inverse >> a.inverse
    a | b       side by side         (a | b).inverse == a.inverse | b.inverse
    a.inverse   backwards            a.inverse.inverse == a

An adapter is a value: it remembers no call. Choices left open are settled for each call by the names that it is given.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fmoe.layout.asked import asked, with_zeros
from fmoe.layout.beside import beside, check_parts
from fmoe.layout.eager.html import table_of
from fmoe.layout.eager.running import Views, on_mesh, one, run, specs_of, views_of, without
from fmoe.layout.grouping import Window
from fmoe.layout.names import Names
from fmoe.layout.pipeline import Plan
from fmoe.layout.planning import check_cut, check_ranges, chosen_stages, plan_stages, resolve_stages
from fmoe.layout.stage import Stage
from fmoe.types import AdapterError, MoEConfig, Params

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Adapter:
    """from_hf . to_hf == id and to_hf . from_hf == id, on dicts of tensors (a pair of pure functions).

    stages: applied left to right by `from_hf`. moe: what `moe_config` returns, or why nobody can say. config: Hugging
    Face's, as far as it was given.
    """

    stages: tuple[Stage, ...] = ()
    moe: MoEConfig | str = field(default="no family and config were given", compare=False, repr=False)
    config: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def moe_config(self) -> MoEConfig:
        """The config of the checkpoint's expert layers. Raises AdapterError where family and config do not say it."""
        if isinstance(self.moe, str):
            raise AdapterError(f"moe_config is unknown: {self.moe}")
        return self.moe

    @property
    def inverse(self) -> "Adapter":
        """The two directions swapped: `a.inverse.from_hf` is `a.to_hf`."""
        return replace(self, stages=tuple(stage.inverse for stage in reversed(self.stages)))

    def __rshift__(self, other: "Adapter") -> "Adapter":
        if not isinstance(other, Adapter):
            return NotImplemented
        check_parts(self.stages + other.stages)
        return Adapter(self.stages + other.stages, self._moe(other), self.config or other.config)

    def __or__(self, other: "Adapter") -> "Adapter":
        if not isinstance(other, Adapter):
            return NotImplemented
        check_parts(self.stages + other.stages)
        return Adapter(beside(self.stages, other.stages), self._moe(other), self.config or other.config)

    def _moe(self, other: "Adapter") -> MoEConfig | str:
        return other.moe if isinstance(self.moe, str) else self.moe

    @property
    def lossless(self) -> bool:
        """Whether no stage changes values or drops tensors."""
        return all(stage.lossless for stage in self.stages)

    def __str__(self) -> str:
        return "\n>>\n".join(map(str, self.stages)) or "keep {rest}"

    def __repr__(self) -> str:
        """Family, open choices, number of rules. `print(adapter)` shows the rules."""
        family = (self.config or {}).get("model_type", "")
        choices = {n: o for stage in self.stages for n, o in stage.choices().items() if len(o) > 1}
        count = sum(len(getattr(stage, "rules", list)()) for stage in self.stages)
        told = [family, *(f"{n}={'|'.join(o)}" for n, o in choices.items()), f"{count} rule{'s' * (count != 1)}"]
        return f"Adapter({', '.join(str(t) for t in told if t)})"

    def _repr_html_(self) -> str:
        return table_of(str(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # IPython's, and Hypothesis'
        printer.text(repr(self))

    def resolve(self, names: Iterable[str]) -> "Adapter":
        """The adapter with its alternatives settled by key names, so that `to_hf` emits the layout that was found.

        Raises AdapterError where the names speak for two layouts at once.

        >>> import fmoe
        >>> forms = {"apart": fmoe.rule("w.{e} [d]", "w [e d]"), "fused": fmoe.rule("w [e d]", "w [e d]")}
        >>> print(fmoe.either("layout", **forms).resolve(["w"]))
        w [e d]  <->  w [e d]
        """
        return replace(self, stages=resolve_stages(self.stages, Names(names)))

    def choose(self, **choices: Any) -> "Adapter":
        """The adapter with alternatives settled by hand, as in `choose(layout="fused")`.

        quantization: as in `to_hf`, for good. Raises AdapterError for a choice, or an option, that there is not.

        >>> import fmoe
        >>> fmoe.alias("head", of="embed").choose(head="presnt")
        Traceback (most recent call last):
        fmoe.types.AdapterError: head='presnt': expected one of 'absent', 'present'. Did you mean 'present'?
        """
        return replace(self, stages=chosen_stages(self.stages, choices))

    def plan(self, specs: Mapping[str, Any], **axis_ranges: range) -> Plan:
        """What `from_hf` would do to names, shapes and dtypes, proved bijective; no byte is touched.

        specs: names to `TensorSpec`s or tensors (meta too). axis_ranges: `e=range(0, 16)` reads those experts only.
        Raises AdapterError with every problem found.

        >>> import fmoe, torch
        >>> plan = fmoe.rule("w.{e} [d]", "w [e d]").plan({f"w.{e}": torch.ones(3) for e in range(4)})
        >>> plan.targets, plan.nbytes
        ({'w': TensorSpec(shape=(4, 3), dtype=torch.float32)}, 48)
        """
        return self._plan(specs, axis_ranges)

    def _plan(self, values: Mapping[str, Any], window: Window, local: frozenset[str] = frozenset()) -> Plan:
        check_ranges(self.stages, window)
        stages = tuple(s.see(values) if hasattr(s, "see") else s for s in self.stages)  # what values alone can settle
        with with_zeros(self.moe, specs := specs_of(values)):
            return check_cut(plan_stages(stages, specs, window, local), window.keys() - local)

    # eager

    def from_hf(
        self,
        hf_state_dict: Mapping[str, Any],
        device_mesh: "DeviceMesh | None" = None,
        *,
        copy: bool = False,
        contiguous: bool = False,
        **axis_ranges: range,
    ) -> dict[str, Any]:
        """HF tensors -> native tensors. Pure; views of the inputs wherever strides allow, in HF's storage order.

        device_mesh: keep this rank's experts (and `ep_shard` slice) of plain tensors, as DTensors on the mesh.
        DTensors convert without communication, with or without a mesh: placements follow the axes that they cut.
        copy: always fresh storage. contiguous: native storage order. axis_ranges: only those indices of an axis.
        A dict of TensorSpecs gives TensorSpecs. Raises AdapterError with every problem found, before any data moves.

        >>> import fmoe, torch
        >>> fmoe.rule("w.{e} [d]", "w [e d]").from_hf({"w.1": torch.ones(2), "w.0": torch.zeros(2)})
        {'w': tensor([[0., 0.],
                [1., 1.]])}
        """
        if device_mesh is not None:
            plan = lambda window: self._plan(hf_state_dict, window)
            return on_mesh(plan, hf_state_dict, device_mesh, axis_ranges, copy=copy, contiguous=contiguous)
        return run(self._plan(hf_state_dict, axis_ranges), hf_state_dict, copy=copy, contiguous=contiguous)

    def to_hf(
        self,
        state_dict: Mapping[str, Any],
        exclude_key_regex: str | None = None,
        quantization: bool | None = None,
        *,
        copy: bool = False,
        contiguous: bool = False,
        **axis_ranges: range,
    ) -> dict[str, Any]:
        """Native tensors -> HF tensors, the inverse of `from_hf`. Pure; views of the inputs wherever strides allow.

        exclude_key_regex: leave out HF names that `re.match` it. quantization: None writes quantised what carries the
        scales it was read with; True everything that the family quantises, with real scales; False nothing.
        axis_ranges: which experts these tensors hold (`e=range(16, 32)`), to name them. Other arguments as `from_hf`.
        Of DTensors, placements follow the axes; what lives wholly on one rank is plain there, and absent elsewhere.

        >>> import fmoe, torch
        >>> fmoe.rule("w.{e} [d]", "w [e d]").to_hf({"w": torch.eye(2)}, exclude_key_regex="w.0")
        {'w.1': tensor([0., 1.])}
        """
        plan = self._to_hf_plan(state_dict, quantization, axis_ranges)
        return without(run(plan, state_dict, copy=copy, contiguous=contiguous), exclude_key_regex)

    def convert_single_tensor_to_hf(
        self,
        fqn: str,
        tensor: Any,
        *,
        exclude_key_regex: str | None = None,
        quantization: bool | None = None,
        **axis_ranges: range,
    ) -> list[tuple[str, Any]]:
        """[(HF name, HF tensor), ...] of one native tensor: `to_hf({fqn: tensor})`.

        >>> import fmoe, torch
        >>> fmoe.rule("w.{e} [d]", "w [e d]").convert_single_tensor_to_hf("w", torch.ones(1, 2), e=range(3, 4))
        [('w.3', tensor([1., 1.]))]
        """
        plan = self._to_hf_plan(given := one(fqn, tensor), quantization, axis_ranges)
        return list(without(run(plan, given), exclude_key_regex).items())

    def iter_hf(
        self,
        params: Params,
        *,
        quantization: bool | None = None,
        contiguous: bool = False,
        detach: bool = False,
        **axis_ranges: range,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the items of `to_hf`, lazily, one native tensor at a time: for weight synchronisation.

        In the order of `to_hf`, which the native names alone settle: native tensors sorted by their first HF name,
        numbers by value, and of each its HF tensors expert by expert. So ranks can broadcast what they iterate.
        contiguous: fresh memory where a tensor is a strided view, as NCCL and IPC ask. detach: without their graphs.

        >>> import fmoe, torch
        >>> native = {"w": torch.eye(2), "v": torch.ones(1, 2)}
        >>> adapter = fmoe.rule("w.{e} [d]", "w [e d]") | fmoe.rule("v.{e} [d]", "v [e d]")
        >>> [(name, tensor.tolist()) for name, tensor in adapter.iter_hf(native)]
        [('v.0', [1.0, 1.0]), ('w.0', [1.0, 0.0]), ('w.1', [0.0, 1.0])]
        """
        plan = self._to_hf_plan(params, quantization, axis_ranges)

        def made(sources: list[str], targets: list[str]) -> dict[str, Tensor]:
            return run(plan, {n: params[n] for n in sources}, targets, contiguous=contiguous)

        items = (item for sources, targets in plan.units() for item in made(sources, targets).items())
        return ((name, tensor.detach()) for name, tensor in items) if detach else items

    def views(self, native: Params, **axis_ranges: range) -> Views:
        """The native tensors' storage under HF names and shapes: write into these and the native tensors are loaded.

        Raises AdapterError naming each HF tensor that is no view (stacked of several, merged across strides, decoded).

        >>> import fmoe, torch
        >>> native = {"w": torch.zeros(2, 3)}
        >>> _ = fmoe.rule("w.{e} [d]", "w [e d]").views(native)["w.1"].fill_(7)
        >>> native["w"].tolist()
        [[0.0, 0.0, 0.0], [7.0, 7.0, 7.0]]
        """
        return views_of(self._to_hf_plan(native, None, axis_ranges), native)

    def _to_hf_plan(self, params: Mapping[str, Any], quantization: bool | None, window: Window) -> Plan:
        back = (self if quantization is None else self.choose(quantization=quantization)).inverse
        with asked(lambda: self._plan(params, window, frozenset(window))):
            return back._plan(params, window, frozenset(window))
