"""`experts_implementation="fmoe"` in Transformers, heard by every model that it is said to, or refused.

    fmoe.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="fmoe")

Experts run on views of the module's own parameters: no weight is copied, saving and loading stay Transformers'. Models
whose experts Transformers does not exchange raise here, and `fmoe.patch(model)` binds them.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fmoe.backends import NAMES, Backend
from fmoe.entrance import held
from fmoe.folding import meant
from fmoe.integrations import bindings, peft
from fmoe.integrations.bindings import FLAGS, OTHERS, binding_of, gate_of_once, is_decorated, unknown
from fmoe.integrations.kinds import Registered, kind_of

BACKENDS: dict[str, str | Backend | None] = {}
"""The names that are registered in Transformers -> the backend of each."""


def register(name: str = "fmoe", backend: str | Backend | None = None) -> None:
    """Transformers knows `experts_implementation=name`: its experts are `fmoe.experts` on this backend.

    PEFT's LoRA on expert parameters becomes that of `fmoe.experts` on such models. Saying it twice changes nothing.
    backend: as in `fmoe.experts`.

    Raises ImportError without Transformers 5, RuntimeError for one whose experts have properties that are not read
    here, ValueError for an unknown backend and for a name that means something else already. From then on a model that
    is made, or told, to run this way raises ValueError where its experts would not hear of it, and where what they
    compute between their products is not known.

    Source: transformers.integrations.moe, `ExpertsInterface`, `use_experts_implementation`.

    >>> from transformers import AutoModelForCausalLM, MixtralConfig
    >>> register()
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_local_experts=4)
    >>> config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    >>> model = AutoModelForCausalLM.from_config(config, experts_implementation="fmoe")
    >>> [runs_through_fmoe(layer.mlp.experts) for layer in model.model.layers]
    [True]
    """
    try:
        import transformers
        from transformers import PreTrainedModel
        from transformers.integrations import finegrained_fp8, moe

        found = (moe.ALL_EXPERTS_FUNCTIONS, finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS)
    except (ImportError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ImportError(f"experts cannot be registered: {told}; `pip install -U 'transformers>=5.20'`") from error
    here, eight_bits = found
    if isinstance(backend, str) and backend not in NAMES:
        raise ValueError(
            f"backend is {backend!r}, expected one of {', '.join(NAMES)}, or a function{meant(backend, NAMES)}"
        )
    if name == "eager" or name in here and (name not in BACKENDS or BACKENDS[name] != backend):
        raise ValueError(f"experts_implementation {name!r} is taken, expected another name for backend {backend!r}")
    marks = inspect.signature(moe.use_experts_implementation).parameters
    if unread := sorted(marks.keys() - {*FLAGS, "experts_class", "experts_interface"}):
        told = f"transformers {transformers.__version__} marks experts with {', '.join(unread)}"
        raise RuntimeError(f"{told}, which this fmoe does not read: `pip install -U fmoe`, or 'transformers<=5.24'")
    # imported on first use, the module may exist twice: the decorated classes look into the one that they were given
    for registry in (here, marks["experts_interface"].default):
        registry.register(name, functools.partial(bindings.decorated, backend=backend))
    eight_bits.register(name, _eight_bits)
    BACKENDS[name] = backend
    _listen(PreTrainedModel)
    peft.install(runs_through_fmoe)


def runs_through_fmoe(module: nn.Module) -> bool:
    """Is a module of experts bound to fmoe, by Transformers or by `fmoe.patch`?"""
    named = is_decorated(module) and getattr(module.config, "_experts_implementation", None) in BACKENDS
    return named or "_fmoe_backend" in module.__dict__


def unheard(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of experts that Transformers does not exchange, by their names in the model."""
    for name, module in model.named_modules():
        if binding_of(module) is not None or kind_of(module).__name__ in OTHERS or unknown(name, module):
            yield name, module


def _eight_bits(self: Any, *_: Tensor) -> Tensor:
    raise NotImplementedError(
        f"{type(self).__name__} holds weights in 8 bits, and is no module that fmoe runs: load it with dequantize=True,"
        " or convert the checkpoint and call fmoe.experts(..., backend='triton_fp8')"
    )


def _listen(model_class: Any) -> None:
    """Every model that is made, or told, to run through fmoe is looked at: does it?"""
    if hasattr(model_class.post_init, "_fmoe"):
        return
    post_init, set_experts = model_class.post_init, model_class.set_experts_implementation

    @functools.wraps(post_init)
    def post_init_heard(self: Any) -> None:
        post_init(self)
        if getattr(self.config, "_experts_implementation", None) in BACKENDS:
            _heard(self)

    @functools.wraps(set_experts)
    def set_heard(self: Any, experts_implementation: str | dict[str, str]) -> None:
        before = self.get_experts_implementation()
        asked = experts_implementation
        try:
            set_experts(self, asked)
            if BACKENDS.keys() & set(asked.values() if isinstance(asked, dict) else [asked]) and not _heard(self):
                raise ValueError(f"{type(self).__name__} has no experts that Transformers exchanges")
        except ValueError:
            set_experts(self, before)
            raise

    post_init_heard._fmoe = True  # type: ignore[attr-defined]
    model_class.post_init, model_class.set_experts_implementation = post_init_heard, set_heard


def _heard(model: nn.Module) -> int:
    """How many modules of experts run through fmoe. Raises ValueError for one that ought to and would not."""
    if deaf := next(unheard(model), None):
        name, module = deaf
        kind = kind_of(module).__name__
        why = "Transformers does not exchange these experts; load without experts_implementation, and fmoe.patch(model)"
        raise ValueError(f"{type(model).__name__}.{name} ({kind}) would not run through fmoe: {OTHERS.get(kind, why)}")
    mine: list[Any] = [m for m in model.modules() if is_decorated(m) and runs_through_fmoe(m)]
    for module in mine:
        gate_of_once(module)
        told = str(module.config._experts_implementation)
        module.__dict__["_fmoe_registered"] = Registered(told, BACKENDS[told])
    return len(mine)


held(globals(), "register")
