"""A base in few bits, as PEFT knows it: how it is prepared, and what its weights stand for."""

from __future__ import annotations

from typing import Any

import peft
from torch import Tensor, nn

from chainlora.chain.adapters.layers import is_transposed
from chainlora.models.quantizing import is_quantized


def prepare_quantized(model: Any) -> None:
    """Prepare a quantised model for links in place, as PEFT does for one LoRA.

    Everything is frozen. Beside layers of bitsandbytes, what is not quantised becomes float32: the
    embedding, norms and the head, and so hidden states and logits. Quantised layers multiply in
    their compute dtype as before. Other kinds of layers keep the model's dtype.
    """
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def dequantized(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as it computes with it, [out, in] float32 on the CPU."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Any = dequantize_module_weight(layer) if is_quantized(layer) else layer.weight
    weight = weight.detach().float().cpu()
    return weight.T if is_transposed(layer) else weight
