"""Tiny models of every class in transformers' causal-LM mapping, configs shrunk by field name.

The default config of a class is taken, and every known field that makes it large is set to a small
value; lists with an entry a layer are left out, so that the class derives them again. Thresholds
(windows, original context lengths, chunks) shrink too, so that short rows lie beyond them. What
cannot be derived stands in `ADJUSTMENTS`, by model type; classes that cannot be made tiny in
`IMPOSSIBLE`, with the reason.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 272  # byte-level BPE: 256 bytes, three special tokens, some merges
CONTEXT = 256
LAYERS = 4  # every kind of layer: patterns repeat after at most four, or are adjusted
# Windows and chunks, and the original context of scaled rotary embeddings: beyond what a probe
# runs, as in real models, and between the short and the long rows of the tests.
THRESHOLD = 64
ORIGINAL = 48


def _each(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SMALL: dict[str, Any] = {
    **_each(  # width
        32,
        "hidden_size d_model n_embd emb_dim dim word_embed_proj_dim embedding_size embedding_dim "
        "attention_hidden_size lru_width input_embedding_size output_embedding_size "
        "backbone_hidden_size cross_attention_hidden_size pronunciation_embed_dim shape_embed_dim",
    ),
    **_each(  # inner width
        64,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff d_inner "
        "dim_ff intermediate_size_mlp dense_intermediate_size",
    ),
    **_each(  # inner width of experts
        32,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size router_hidden_size "
        "shared_intermediate_size",
    ),
    **_each(
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers "
        "num_blocks",
    ),
    **_each(LAYERS, "encoder_layers num_encoder_layers num_layers_per_stack"),
    **_each(  # heads
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "swa_num_attention_heads linear_num_heads linear_num_value_heads mamba_n_heads "
        "mamba_num_heads num_query_groups",
    ),
    **_each(  # key heads
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads "
        "index_n_heads",
    ),
    **_each(  # size of a head
        8,
        "head_dim v_head_dim d_kv dim_head d_head kv_channels swa_head_dim index_head_dim "
        "linear_key_head_dim linear_value_head_dim linear_head_dim qk_nope_head_dim "
        "qk_rope_head_dim rotary_dim global_head_dim query_pre_attn_scalar swa_v_head_dim",
    ),
    **_each(16, "qk_head_dim"),
    **_each(16, "q_lora_rank kv_lora_rank o_lora_rank laurel_rank gated_norm_rank adapter_rank"),
    **_each(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_each(  # experts that are picked
        2,
        "num_experts_per_tok moe_topk moe_k num_experts_per_token zero_expert_num hc_mult "
        "top_k_experts",
    ),
    **_each(1, "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups"),
    **_each(1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    **_each(8, "mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank"),
    **_each(
        CONTEXT,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length "
        "max_target_positions max_source_positions",
    ),
    **_each(
        THRESHOLD,
        "sliding_window sliding_window_size window_size attention_window_size local_attention "
        "attention_chunk_size chunk_size mamba_chunk_size local_attention_window_len "
        "keep_window_size floor_scale log_scaling_n_floor rel_extent",
    ),
    **_each(ORIGINAL, "original_max_position_embeddings"),
    **_each(
        VOCABULARY,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size "
        "pronunciation_vocab_size shape_vocab_size",
    ),
    **_each(0, "pad_token_id mask_token_id mask_index cls_token_id unk_index"),
    **_each(1, "bos_token_id decoder_start_token_id"),
    **_each(2, "eos_token_id sep_token_id forced_eos_token_id"),
    **_each(8, "hidden_size_per_layer_input"),
    **_each(THRESHOLD, "index_topk"),
    **{"is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False},
}

_MIXED = ["linear_attention", "full_attention"] * 2
_WINDOWED = ["sliding_attention", "full_attention"] * 2
_BLT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# What a class needs beyond the fields above, and every kind of layer where four do not show it.
ADJUSTMENTS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": _BLT | {"hidden_size_global": 32, "cross_attn_k": 2},
        "decoder_config": _BLT | {"hidden_size_global": 32, "cross_attn_k": 2},
        "global_config": _BLT,
        "patcher_config": _BLT | {"sliding_window": THRESHOLD},
    },
    "cohere_compass_text": {
        "layer_types": _WINDOWED,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"adapter_out_dim": 32},
        "audio_config": {"adapter_out_dim": 32},
    },
    "dots3_note_text": {
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    **_each({"layer_types": _WINDOWED}, "gemma3_text kolibri1 laguna mellum"),
    "kolibri1_1": {  # its check asks for heads of 16, and for heads of the index within a group
        "head_dim": 16,
        "layer_types": ["sliding_attention", "indexed_attention"] * 2,
        "index_num_heads": 2,
        "index_pool_size": THRESHOLD,
        "index_compression": 4,
        "index_num_local_tokens": 8,
        "index_num_sink_tokens": 2,
        "mlp_only_layers": [0],
        "mlp_only_intermediate_size": 64,
    },
    "gemma3n_text": {
        "layer_types": _WINDOWED,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _MIXED},
    "inkling2_loop_text": {
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
    },
    **_each({"layer_types": ["hybrid_sliding", "hybrid"] * 2}, "inkling2_text inkling_text"),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _MIXED},
    **_each({"layer_types": ["conv", "full_attention"] * 2}, "lfm2 lfm2_moe"),
    "lfm3": {"layer_types": ["conv", "sliding_attention", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": THRESHOLD,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local", "lsh", "local", "lsh"],
    },
    "smollm3": {"use_sliding_window": True, "sliding_window": THRESHOLD, "layer_types": _WINDOWED},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
    },
    "zaya": {"num_experts_per_tok": 1},
}
IMPOSSIBLE: dict[str, str] = {
    "gemma3n": "its vision tower is a timm model, which is not installed",
    "gemma4_assistant": "its default config is refused by its own check, and it drafts for a model",
    "musicgen": "AutoModelForCausalLM cannot build it from its own config",
    "musicgen_melody": "AutoModelForCausalLM cannot build it from its own config",
}


_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
_REAL = 1024  # an original context that no row of the tests reaches, and that packing asks for
# Settings of a class that its default leaves out, by a name of their own: (model type, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, dynamic rotary": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama, yarn": (
        "llama",
        {"rope_parameters": _YARN | {"original_max_position_embeddings": ORIGINAL}},
    ),
    "llama, yarn, long context": (
        "llama",
        {
            "max_position_embeddings": 4 * _REAL,
            "rope_parameters": _YARN | {"original_max_position_embeddings": _REAL},
        },
    ),
    "ministral3, long context": (
        "ministral3",
        {
            "max_position_embeddings": 4 * _REAL,
            "rope_parameters": _YARN
            | {"original_max_position_embeddings": _REAL, "llama_4_scaling_beta": 0.5},
        },
    ),
    "phi3, LongRoPE": (
        "phi3",
        {
            "original_max_position_embeddings": ORIGINAL,
            "rope_parameters": _LONG_ROPE | {"original_max_position_embeddings": ORIGINAL},
        },
    ),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "lfm2, one kind of block": ("lfm2", {"block_multiple_of": 1}),
    "jamba, small weights": ("jamba", {"enlarged": False}),
    "lfm2, small weights": ("lfm2", {"enlarged": False}),
    "qwen3_5_text, small weights": ("qwen3_5_text", {"enlarged": False}),
    "big_bird, full attention": ("big_bird", {"attention_type": "original_full"}),
    "bigbird_pegasus, full attention": ("bigbird_pegasus", {"attention_type": "original_full"}),
    "llama, eager attention": ("llama", {"attn_implementation": "eager"}),
}


def model_types() -> list[str]:
    """Return every model type of the mapping."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _shrunk(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a small config without randomness; `changes` are set on top."""
    default = kind()
    given = default.to_dict()
    values = {
        name: SMALL[name] for name in given if name in SMALL and not _stays(name, given[name])
    }
    values |= {name: 0.0 for name, value in given.items() if _is_random(name, value)}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(given.get(name), dict):
            values[name] = _small_rope(given[name])
    for name in kind.sub_configs:
        own = getattr(default, name, None)
        if isinstance(own, PreTrainedConfig):
            adjusted = ADJUSTMENTS.get(own.model_type, {})
            values[name] = _shrunk(type(own), adjusted) | {"model_type": own.model_type}
    if "kv_lora_rank" in given:  # multi-head latent attention has a key head a query head
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values | changes


def _is_random(name: str, value: Any) -> bool:
    """Say whether a field is the rate of a dropout or of a noise."""
    return isinstance(value, float) and any(part in name for part in ("drop", "jitter", "noise"))


def _stays(name: str, value: Any) -> bool:
    """Say whether a field is off, which switches a whole part of the architecture off."""
    return value is None and name not in ("num_key_value_heads", "pad_token_id", "head_dim")


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    small = {k: _small_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = ORIGINAL
    return small


def tiny_model(model_type: str, *, seed: int = 0, enlarged: bool = True, **changes: Any) -> Any:
    """Return a tiny model with weights large enough to matter, float32, in evaluation mode."""
    torch.manual_seed(seed)
    kind = CONFIG_MAPPING[model_type]
    config = kind(**_shrunk(kind, ADJUSTMENTS.get(model_type, {}) | changes))
    model = AutoModelForCausalLM.from_config(config).float()
    if enlarged:
        enlarge(model, seed)
    return model.eval()


@torch.no_grad()
def enlarge(model: nn.Module, seed: int = 0) -> None:
    """Draw matrices anew so that a map keeps the size of what it reads, and move all vectors.

    At the small standard deviations of transformers' own start, layers hardly matter, and neither
    does a mistake in one.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:  # a scale stays of its size, a bias gets one
            size = torch.nan_to_num(parameter).abs().mean().item() or 1.0
            parameter.copy_(torch.nan_to_num(parameter) + 0.1 * size * noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.mul_(math.sqrt(module.weight.shape[-1]))
