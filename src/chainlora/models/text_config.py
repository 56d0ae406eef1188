"""The parts of a transformers model that every room asks for: text config, causal model, body."""

from __future__ import annotations

from typing import Any

from torch import nn

from chainlora.errors import ModelError


def text_config(model: nn.Module) -> Any:
    """Return the config of the text decoder: a multimodal model nests it, others are it."""
    config: Any = causal_model(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def causal_model(model: nn.Module) -> nn.Module:
    """Return the transformers causal model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def base_model(model: nn.Module) -> nn.Module:
    """Return the part of a causal model that ends in hidden states, without the head."""
    model = causal_model(model)
    base = getattr(model, getattr(model, "base_model_prefix", "") or "_", None)
    if not isinstance(base, nn.Module):
        raise ModelError(
            f"the model must be a transformers causal language model (got {type(model).__name__})"
        )
    return base


def compute_dtype(model: nn.Module) -> Any:
    """Return the dtype the model computes in: that of its input embedding."""
    return causal_model(model).get_input_embeddings().weight.dtype  # type: ignore[operator]
