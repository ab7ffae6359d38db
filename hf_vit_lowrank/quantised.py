"""What a user would pick instead of fewer parameters, or on top of them: fewer bits for every weight."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import nn

from .errors import UserError

LIBRARIES = ("torchao", "hqq")
HQQ_BITS = 4
HQQ_GROUP = 64  # weights that share a scale and a zero point; 32, 16 or 8 where that does not divide a weight
HQQ_SMALLEST_GROUP = 8  # hqq takes none smaller

_Model = TypeVar("_Model", bound=nn.Module)


def check_quantisers() -> None:
    """Raises UserError where torchao or hqq is not installed."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UserError(f"Quantising needs {' and '.join(missing)}: pip install {' '.join(missing)}.")


def quantise(model: _Model, kind: str) -> _Model:
    """A copy of a float32 model with its `nn.Linear`s, classifier included, replaced; arithmetic stays in float32.

    kind:
        "int8": torchao's Int8WeightOnlyConfig, symmetric, one float32 scale for each output.
        "hqq4": 4 bits by half-quadratic quantisation (hqq's HQQLinear, Badri and Shaji 2023), float32 scale and zero
            point for each group of `HQQ_GROUP` weights; the weights are dequantised before each product. A weight that
            no group divides stays as it is.

    Raises UserError where torchao or hqq is not installed.
    """
    check_quantisers()
    quantised = copy.deepcopy(model)
    QUANTISERS[kind](quantised)
    return quantised


def serialised_bytes(model: nn.Module) -> int:
    """What the state of a model takes in a file of torch.save, whatever its tensors are."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def _int8(model: nn.Module) -> None:
    torchao: Any = import_module("torchao.quantization")
    torchao.quantize_(
        model,
        torchao.Int8WeightOnlyConfig(set_inductor_config=False),  # which would be set for the whole process
        # torchao 0.18 fails on weights with a single input or output, those of a bypass of rank 1.
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and min(module.weight.shape) > 1,
    )


def _hqq4(model: nn.Module) -> None:
    hqq: Any = import_module("hqq.core.quantize")
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        group = math.gcd(module.weight.numel() // 2, HQQ_GROUP)  # an even number of them: two weights share a byte
        if group >= HQQ_SMALLEST_GROUP:
            settings = hqq.BaseQuantizeConfig(nbits=HQQ_BITS, group_size=group)
            parent, _, attribute = name.rpartition(".")
            device = str(module.weight.device)
            replacement = hqq.HQQLinear(module, settings, compute_dtype=torch.float32, device=device)
            setattr(model.get_submodule(parent), attribute, replacement)


QUANTISERS: dict[str, Callable[[nn.Module], None]] = {"int8": _int8, "hqq4": _hqq4}
