"""Access parts of a transformers model: text config, causal model, body, context length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from chainlora.errors import ModelError

# Tokens, for architectures without a limit (ALiBi, recurrent).
UNLIMITED_CONTEXT = 1 << 30
_CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "max_target_positions",  # Whisper's decoder
)


def text_config(model: nn.Module) -> Any:
    """Return the config of the text decoder, which multimodal models nest in their config."""
    config: Any = causal_model(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def causal_model(model: nn.Module) -> nn.Module:
    """Return the transformers causal model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def base_model(model: nn.Module) -> nn.Module:
    """Return a causal model without its head: it returns hidden states."""
    model = causal_model(model)
    base = getattr(model, getattr(model, "base_model_prefix", "") or "_", None)
    if not isinstance(base, nn.Module) and hasattr(model, "lm_head"):
        base = getattr(model, "model", None)  # Llama 4, Mllama: the prefix is another
    if not isinstance(base, nn.Module):
        raise ModelError(
            f"the model must be a transformers causal language model (got {type(model).__name__})"
        )
    return base


def has_parameters(module: nn.Module, recurse: bool = True) -> bool:
    """Return whether a module, or one inside it, has parameters."""
    return any(True for _ in module.parameters(recurse))


def outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Yield the module lists of a model that are in no other list, such as its decoder layers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from outermost_lists(child)


def compute_dtype(model: nn.Module) -> Any:
    """Return the dtype of the model's computations, the dtype of its input embedding."""
    return causal_model(model).get_input_embeddings().weight.dtype  # type: ignore[operator]


def context_length(model: nn.Module) -> int:
    """Return the context length in tokens; `UNLIMITED_CONTEXT` if the config has no limit."""
    config = text_config(model)
    for name in _CONTEXTS:
        if isinstance(length := getattr(config, name, None), int) and length > 0:
            tables: Any = [m for n, m in model.named_modules() if n.endswith("position_embeddings")]
            padding = (getattr(table, "padding_idx", None) for table in tables)
            # RoBERTa's positions begin behind its padding position.
            return length - next((index + 1 for index in padding if index is not None), 0)
    return UNLIMITED_CONTEXT
