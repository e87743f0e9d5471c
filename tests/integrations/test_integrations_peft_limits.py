"""L0, on the installed PEFT: what is not ours stays PEFT's, and a PEFT that wraps otherwise is refused."""

import subprocess
import sys
import warnings
from typing import Any

import integrations_zoo as zoo
import pytest
from eager_parity import far
from torch import nn
from wrapped_zoo import GATED, bound, grads, same, wrapped

import fmoe
from fmoe.integrations import peft
from fmoe.integrations import transformers as integration

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import ParamWrapper

integration.register()


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_L0_factors_are_what_peft_adds_whichever_way_it_packs(swapped: bool, transposed: bool) -> None:
    """PEFT before 0.20 packed features the other way round; what it adds to a parameter says what A and B are."""
    model, _ = zoo.build("mixtral")
    wrapper: Any = next(m for m in wrapped(model, GATED).modules() if isinstance(m, ParamWrapper))
    E, r, (a, b) = wrapper.num_experts, 3, (5, 7)
    shape = {True: (b, a), False: (a, b)}[swapped]  # of one expert of the parameter
    wrapper.lora_A["default"] = nn.Linear(a, r * E, bias=False)
    wrapper.lora_B["default"] = nn.Linear(r * E, b, bias=False)
    wrapper._did_swap_in_out_features = swapped
    delta = wrapper.get_delta_weight("default")
    assert delta.shape == (E, *shape)
    A, B = peft.factors(wrapper, ["default"], transposed)
    assert far(A @ B, delta if transposed else delta.mT) <= 1e-6


def test_L0_what_is_not_ours_stays_pefts(deltas: list[str]) -> None:
    """A bias, the parameters of an eager model, and wrappers around modules inside a bound one."""
    targets = ["mlp.experts.gate_up_proj_bias", *GATED]
    model, inputs = zoo.build("gpt_oss")
    expected = grads(wrapped(model.double(), targets), inputs)
    deltas.clear()
    same(grads(wrapped(bound(zoo.build("gpt_oss")[0].double(), "gpt_oss"), targets), inputs), expected, 1e-10)
    assert set(deltas) == {"gate_up_proj_bias"}
    for name, target in (("jetmoe", "input_linear.weight"), ("dbrx", "mlp.w1")):
        model, inputs = zoo.build(name)
        fmoe.patch(model)
        model = wrapped(model, [target])
        with pytest.raises(ValueError, match="runs in fmoe on parameters of '.*', a peft.*ParamWrapper, exp"):
            zoo.output(model, inputs)
    model, inputs = zoo.build("switch_transformers")
    fmoe.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(target_modules=["wi"]))
    with pytest.raises(ValueError, match="'wi', a peft.tuners.lora.layer.Linear, expected torch.nn.modules.lin"):
        zoo.output(model, inputs)


def test_L0_peft_imported_before_or_after_is_told() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "import fmoe; fmoe.integrations.transformers.register(); fmoe.integrations.transformers.register()\n"
        "assert 'peft' not in sys.modules\n"
        "from peft.tuners.lora.layer import ParamWrapper\n"
        "assert hasattr(ParamWrapper._activate_lora, '_fmoe')\n"
        "fmoe.integrations.transformers.register()\n"
        "assert not hasattr(ParamWrapper._activate_lora._fmoe, '_fmoe')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_L0_a_peft_that_wraps_otherwise_is_refused() -> None:
    class Layer:
        __name__ = "peft.tuners.lora.layer"

    with pytest.raises(RuntimeError, match="has no ParamWrapper._activate_lora"):
        peft.teach(Layer(), integration.runs_through_fmoe)
