"""The 4- and 8-bit rules: how a base is quantised, and how its quantised values are held."""

import logging
import os
from functools import cache
from typing import Any

import torch
from torch import nn

from raytune_ft.spec import ModelSpec

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


@cache
def import_bitsandbytes() -> Any:
    """Import bitsandbytes without torch's compiler, which takes two seconds.

    It compiles slow replacements of kernels that it has; what is compiled later is so as always.
    """
    # It offers optional kernels on every load.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        import bitsandbytes
    finally:
        if before is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = before
    return bitsandbytes


def whole_shape(parameter: torch.Tensor) -> list[int]:
    """Shape of the whole parameter, also where ZeRO-3 left a placeholder."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def is_divided(model: nn.Module) -> bool:
    """Whether the workers divide weights of the model among themselves (ZeRO-3)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def compute_dtype(spec: ModelSpec) -> torch.dtype:
    """Type of activations, and of weights that are not quantised."""
    return torch.float32 if spec.weight_bits == 32 else torch.bfloat16


def quantisation_config(spec: ModelSpec) -> Any | None:
    """What `from_pretrained` needs to quantise while it loads; None for 16 and 32 bits."""
    if spec.weight_bits not in (4, 8):
        return None
    from transformers import BitsAndBytesConfig

    import_bitsandbytes()
    if spec.weight_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(spec),
    )


def keep_weights_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on AVX512-BF16 processors.

    Its inference path repacks the weights in place at the first forward in eval mode. The packed form has no
    gradient, and `train()` does not undo it: an evaluation before training would silently stop the learning.
    """
    bnb = import_bitsandbytes()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dequantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace each 4-bit layer by a plain one that holds the same, already rounded, values in `dtype`."""
    bnb = import_bitsandbytes()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, bnb.nn.Linear4bit):
                continue
            weight = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state).to(dtype)
            plain = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(
                weight.view(child.out_features, child.in_features), requires_grad=False
            )
            plain.bias = child.bias
            setattr(parent, name, plain)
