"""Tiny models of each kind: encoders, encoder-decoders, speech, experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, ROWS, LENGTH = 96, 6, 7
_LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = _LAYERS | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER = _TEXT | _STEADY | {"pad_token_id": 0}
_DECODER = _TEXT | _SPECIAL | {"num_key_value_heads": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_ENCODER_DECODER = _SPECIAL | {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
}
_BART = _ENCODER_DECODER | {"max_position_embeddings": 64, "decoder_start_token_id": 2}
_SPEECH = _ENCODER_DECODER | {
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "decoder_start_token_id": 1,
}
Batch = dict[str, Tensor]


def _ids() -> Batch:
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2  # some read what they say of a row at its end
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def next_tokens() -> Batch:
    """Token ids, which are the labels too."""
    ids = _ids()
    return ids | {"labels": ids["input_ids"]}


def pairs_of_text() -> Batch:
    """Token ids of a source, and those of a target."""
    return _ids() | {"labels": _ids()["input_ids"][:, :4].contiguous()}


def speech() -> Batch:
    """Spectrograms, and the token ids of what was said."""
    features = torch.randn(ROWS, 8, 16, generator=torch.Generator().manual_seed(3))
    return {"input_features": features, "labels": _ids()["input_ids"][:, :4].contiguous()}


@dataclass(frozen=True)
class Kind:
    """A class of models, and how it is tuned."""

    config: str
    keys: dict[str, Any]
    batch: Callable[[], Batch]
    task: str | None = None  # of PEFT
    targets: str | tuple[str, ...] = "all-linear"


_TRANSLATE = {"task": "SEQ_2_SEQ_LM", "batch": pairs_of_text}
_CAUSAL = {"task": "CAUSAL_LM", "batch": next_tokens}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # beside experts, which are stacked

KINDS: dict[str, Kind] = {
    "BertForMaskedLM": Kind("BertConfig", _ENCODER, next_tokens),
    "T5ForConditionalGeneration": Kind("T5Config", _T5, **_TRANSLATE),
    "BartForConditionalGeneration": Kind("BartConfig", _BART, **_TRANSLATE),
    "WhisperForConditionalGeneration": Kind("WhisperConfig", _SPEECH, speech),
    "MixtralForCausalLM": Kind("MixtralConfig", _DECODER | _EXPERTS, targets=_ATTENTION, **_CAUSAL),
    "Qwen2MoeForCausalLM": Kind(
        "Qwen2MoeConfig",
        _DECODER | _EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
        **_CAUSAL,
    ),
}


def new_model(name: str, seed: int = 0) -> Any:
    """Return a model of a class, every weight drawn from a seed."""
    torch.manual_seed(seed)
    kind = KINDS[name]
    config = getattr(transformers, kind.config)(**kind.keys)
    return getattr(transformers, name)(config).eval()


def load(name: str, folder: Any) -> Any:
    """Return the model of a class on the weights of a folder."""
    return getattr(transformers, name).from_pretrained(folder).eval()
