"""Quantise a base while it loads, and detect quantised layers.

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
    """Return the `quantization_config` for transformers' `from_pretrained`.

    Only weights are quantised; matmuls run in `dtype`. ``nf4`` is 4-bit NormalFloat in blocks of 64
    by bitsandbytes (arXiv 2305.14314), ``int8`` integers with one scale per row by torchao. Raises
    ModelError if the package is not installed.
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


def quantized_while_loading(model: Any) -> str | None:
    """Return the kind of `quantization` that a model was loaded with, None for any other model."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return None
    config, dtype = quantizer.quantization_config, next(model.parameters()).dtype
    kind = {"bitsandbytes": "nf4", "torchao": "int8"}.get(config.quant_method)
    is_ours = kind is not None and config.to_dict() == quantization(kind, dtype).to_dict()
    return kind if is_ours else None


def settle_kernels(model: nn.Module) -> None:
    """Make quantised layers compute the same in training and in evaluation.

    On CPUs with AVX-512 for bfloat16, bitsandbytes repacks weights for evaluation, and then
    multiplies in bfloat16 for any input dtype. This switches that off.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def is_quantized(module: nn.Module) -> bool:
    """Return whether a layer's weight is not a plain floating-point tensor.

    One-byte floats count as quantised too: the layer stores a scale for them.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return is_packed(module)
    return _is_special(weight) or not weight.is_floating_point() or weight.element_size() == 1


def is_packed(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that stores integers and has no `weight`.

    GPTQ, AWQ, HQQ and similar layers store codes and scales under other names.
    """
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    has_sizes = all(isinstance(size, int) for size in sizes)
    if not has_sizes or isinstance(getattr(module, "weight", None), Tensor):
        return False
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(not tensor.is_floating_point() for tensor in tensors)


def is_quantized_model(model: nn.Module) -> bool:
    """Return whether a model has quantised layers of any kind."""
    return any(is_quantized(module) for module in model.modules())


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return a plain tensor with all values: dequantised, and gathered from all processes."""
    if is_shard(tensor):
        return gathered(tensor)
    return tensor.dequantize() if _is_special(tensor) else tensor


def _is_special(tensor: Tensor) -> bool:
    """Return whether a tensor is of a special class, such as torchao's."""
    if is_shard(tensor):
        return False
    return type(tensor) not in (nn.Parameter, Tensor) and hasattr(tensor, "__tensor_flatten__")
