"""Tiny models of each kind: classifiers, encoders, encoder-decoders, vision, speech, experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, LABELS, ROWS, LENGTH = 96, 3, 6, 7
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
_VISION = _LAYERS | _STEADY | {"image_size": 16, "patch_size": 4, "num_channels": 3}
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
_DISTIL = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "hidden_dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
Batch = dict[str, Tensor]


def _ids() -> Batch:
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2  # some read what they say of a row at its end
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def rows_of_text() -> Batch:
    """Token ids, and one label a row."""
    return _ids() | {"labels": torch.arange(ROWS) % LABELS}


def labelled_tokens() -> Batch:
    """Token ids, and one label a token."""
    ids = _ids()
    return ids | {"labels": ids["input_ids"] % LABELS}


def answers() -> Batch:
    """Token ids, and where an answer begins and ends."""
    return _ids() | {
        "start_positions": torch.arange(ROWS) % 3,
        "end_positions": torch.full((ROWS,), 4),
    }


def next_tokens() -> Batch:
    """Token ids, which are the labels too."""
    ids = _ids()
    return ids | {"labels": ids["input_ids"]}


def pairs_of_text() -> Batch:
    """Token ids of a source, and those of a target."""
    return _ids() | {"labels": _ids()["input_ids"][:, :4].contiguous()}


def images() -> Batch:
    """Images, and one label each."""
    pixels = torch.randn(ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"pixel_values": pixels, "labels": torch.arange(ROWS) % LABELS}


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
    head: tuple[str, ...] = ()  # what a new model of the class draws, and a chain trains whole
    targets: str | tuple[str, ...] = "all-linear"


_CLASSIFY = {"task": "SEQ_CLS", "batch": rows_of_text}
_LABEL = {"task": "TOKEN_CLS", "batch": labelled_tokens}
_TRANSLATE = {"task": "SEQ_2_SEQ_LM", "batch": pairs_of_text}
_CAUSAL = {"task": "CAUSAL_LM", "batch": next_tokens}
_SEE = {"batch": images}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # beside experts, which are stacked

KINDS: dict[str, Kind] = {
    "BertForSequenceClassification": Kind(
        "BertConfig", _ENCODER, head=("classifier",), **_CLASSIFY
    ),
    "RobertaForSequenceClassification": Kind(
        "RobertaConfig", _ENCODER, head=("classifier",), **_CLASSIFY
    ),
    "DistilBertForSequenceClassification": Kind(
        "DistilBertConfig", _DISTIL, head=("pre_classifier", "classifier"), **_CLASSIFY
    ),
    "DebertaV2ForSequenceClassification": Kind(
        "DebertaV2Config", _ENCODER, head=("pooler", "classifier"), **_CLASSIFY
    ),
    "ModernBertForSequenceClassification": Kind(
        "ModernBertConfig", _ENCODER, head=("head", "classifier"), **_CLASSIFY
    ),
    "LlamaForSequenceClassification": Kind("LlamaConfig", _DECODER, head=("score",), **_CLASSIFY),
    "MixtralForSequenceClassification": Kind(
        "MixtralConfig", _DECODER | _EXPERTS, head=("score",), targets=_ATTENTION, **_CLASSIFY
    ),
    "BertForTokenClassification": Kind("BertConfig", _ENCODER, head=("classifier",), **_LABEL),
    "RobertaForTokenClassification": Kind(
        "RobertaConfig", _ENCODER, head=("classifier",), **_LABEL
    ),
    "BertForQuestionAnswering": Kind(
        "BertConfig", _ENCODER, answers, "QUESTION_ANS", head=("qa_outputs",)
    ),
    "BertForMaskedLM": Kind("BertConfig", _ENCODER, next_tokens),
    "T5ForConditionalGeneration": Kind("T5Config", _T5, **_TRANSLATE),
    "BartForConditionalGeneration": Kind("BartConfig", _BART, **_TRANSLATE),
    "WhisperForConditionalGeneration": Kind("WhisperConfig", _SPEECH, speech),
    "ViTForImageClassification": Kind("ViTConfig", _VISION, head=("classifier",), **_SEE),
    "MixtralForCausalLM": Kind("MixtralConfig", _DECODER | _EXPERTS, targets=_ATTENTION, **_CAUSAL),
    "Qwen2MoeForCausalLM": Kind(
        "Qwen2MoeConfig",
        _DECODER | _EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
        **_CAUSAL,
    ),
}


def config_of(name: str) -> Any:
    """Return the config of a class, tiny."""
    kind = KINDS[name]
    labels = {"num_labels": LABELS} if kind.head and kind.task != "QUESTION_ANS" else {}
    return getattr(transformers, kind.config)(**kind.keys | labels)


def new_model(name: str, seed: int = 0) -> Any:
    """Return a model of a class, every weight drawn from a seed."""
    torch.manual_seed(seed)
    return getattr(transformers, name)(config_of(name)).eval()


def load(name: str, folder: Any, seed: int = 0) -> Any:
    """Return the model of a class on the weights of a folder; a head that it lacks is drawn."""
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    labels = {"num_labels": LABELS} if KINDS[name].head and "Answering" not in name else {}
    return kind.from_pretrained(folder, **labels).eval()
