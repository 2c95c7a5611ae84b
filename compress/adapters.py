"""LoRA adapters (arXiv 2106.09685) of PEFT on packed layers, which PEFT does not know by itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.nn import QuantLinear, StackedLinear

if TYPE_CHECKING:
    from peft import LoraConfig

INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")  # of PEFT's, those that leave the base weight as it is


def lora(**arguments: Any) -> LoraConfig:
    """Make a LoraConfig whose adapters go onto packed layers, too; takes what PEFT's own takes.

    For `peft.get_peft_model` with a model of `compress.load`. The packed weights stay as they are: only the adapters are
    trained, and they are saved apart. Raises CompressError where PEFT is not installed, and for arguments that packed layers
    cannot follow.
    """
    _check(arguments)
    try:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear
    except ImportError as error:
        raise CompressError("Adapters need PEFT: pip install peft.") from error

    class PackedLora(Linear):
        """An adapter around a packed layer, whose codes cannot take a merged weight."""

        def __init__(self, *given: Any, **named: Any) -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="Unsupported layer type"
                )  # PEFT's word for types that it has no case for
                super().__init__(*given, **named)

        def merge(self, *_: Any, **__: Any) -> None:
            raise CompressError(
                "An adapter cannot be merged into packed weights, whose codes would have to be solved anew. Keep it beside the "
                "model, or merge it into the dense model and quantize that."
            )

    config = LoraConfig(**arguments)
    config._register_custom_module({QuantLinear: PackedLora, StackedLinear: PackedLora})
    return config


def _check(arguments: Mapping[str, Any]) -> None:
    """Raise for initial values that are subtracted from the base weight, and for a choice of layers by their class."""
    if (init := arguments.get("init_lora_weights", True)) not in INITS:
        raise CompressError(
            f"init_lora_weights={init!r} changes the weights under the adapter, and packed ones stay as they are. Use one of "
            f"{', '.join(map(str, INITS))}."
        )
    if arguments.get("target_modules") == "all-linear":
        raise CompressError(
            "target_modules='all-linear' finds layers of torch only, and no packed ones. Name them, as in "
            "target_modules=['q_proj', 'v_proj'], or give a regular expression of their names."
        )
