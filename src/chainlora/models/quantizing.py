"""Weights in few bits: how a base is quantised while it is loaded, and how to tell that it is.

A quantised weight cannot hold a merged link without loss, so links are carried beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chainlora.errors import ModelError
from chainlora.models.shards import gathered, is_shard
from chainlora.registry import import_optional

_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}


def quantization(kind: str, dtype: torch.dtype) -> Any:
    """Return what transformers' `from_pretrained` takes as its `quantization_config`.

    nf4: 4-bit NormalFloat in blocks of 64 (arXiv 2305.14314), of bitsandbytes. int8: integers with
    a scale for each row, of torchao. Both quantise weights alone; matmuls run in `dtype`.
    """
    import_optional(_PACKAGES[kind], f"`quantize: {kind}`", ModelError)
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def settle_kernels(model: nn.Module) -> None:
    """Let quantised layers compute the same in training and in evaluation.

    On CPUs with AVX-512 for bfloat16, bitsandbytes repacks weights in place for evaluation, and
    then multiplies in bfloat16 whatever the input is.
    """
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def is_quantized(module: nn.Module) -> bool:
    """Say whether a layer's weight is not an ordinary tensor of floating-point numbers.

    Those of one byte need a scale, which a layer keeps beside them.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return is_packed(module)
    return _is_special(weight) or not weight.is_floating_point() or weight.element_size() == 1


def is_packed(module: nn.Module) -> bool:
    """Say whether a module is a linear map that shows no weight, but holds integers.

    GPTQ, AWQ, HQQ and their like keep codes and scales under names of their own.
    """
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) for size in sizes):
        return False
    if isinstance(getattr(module, "weight", None), Tensor):
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(not tensor.is_floating_point() for tensor in own)


def is_quantized_model(model: nn.Module) -> bool:
    """Say whether a model has quantised layers, wherever they come from."""
    return any(is_quantized(module) for module in model.modules())


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor that indexing and casting work on: quantised ones as what they stand for,
    and one that processes share as a whole."""
    if is_shard(tensor):
        return gathered(tensor)
    return tensor.dequantize() if _is_special(tensor) else tensor


def _is_special(tensor: Tensor) -> bool:
    """Say whether a tensor is of a class of its own, as torchao's are."""
    if is_shard(tensor):
        return False
    return type(tensor) not in (nn.Parameter, Tensor) and hasattr(tensor, "__tensor_flatten__")
