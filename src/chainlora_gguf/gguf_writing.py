"""Write a checkpoint, or a LoRA for it, as a GGUF file that computes the same in llama.cpp.

Names of tensors are the package gguf's. What llama.cpp stores in another way is put right here: the
rows of q and k of a Llama go by pairs (its rotary layout), and a Gemma's norms have their 1 added.
Metadata, and the tokenizer's rules, follow llama.cpp's ``convert_hf_to_gguf.py``. A model of which
llama.cpp would compute something else is refused by what it is.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoConfig

from chainlora.errors import ModelError
from chainlora.models.checkpoint import Checkpoint
from chainlora.models.gguf import (
    build_tokenizer,
    head_size,
    import_gguf,
    known_pre_tokenizers,
    read_metadata,
    rope_factors,
    ropes_of,
)

KINDS = ("f32", "f16", "bf16", "q8_0")
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
_WITH_WINDOWS = ("gemma2", "gemma3_text")
_OTHER = "export --to merged, and convert that with llama.cpp"
# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BLOCK = 32  # values that share a scale in Q8_0

_PHI3 = re.compile("phi-?3", re.IGNORECASE)
# Special tokens of Phi-3, and whether they take the blanks behind them.
_PHI3_TOKENS = {"</s>": True, "<|end|>": True, "<s>": False, "<|endoftext|>": False, "<unk>": False}

# Texts that tell tokenizers apart: how digits, contractions, cases, line breaks, blanks, marks and
# letters beyond ASCII are cut. In NFC, since llama.cpp does not normalise as Qwen's tokenizer does.
_PROBES = (
    "It's 2026-01-07, 12345678 of 9; WE'LL SEE\n\n  don't\t x=3.14/2 (HTTPServer's getURL)\r\n",
    "naïve café — 東京で１２３　été «Привет, мир» हिन्दी 🙂🙂 … a/b\n/c   end",
)


def check_convertible(config: Any, tokenizer: Any) -> None:
    """Raise ModelError for a model that is not written as GGUF here, or a tokenizer that a GGUF
    file without weights does not give back."""
    gguf = import_gguf()
    for rule, got in _misfits(config):
        raise ModelError(f"a model in GGUF must {rule}", got, _OTHER)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocabulary.gguf")
        writer = gguf.GGUFWriter(file, _ARCHITECTURES[config.model_type])
        _add_config(writer, config)
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        _check_tokenizer(file, tokenizer)


def _check_tokenizer(file: Path, tokenizer: Any) -> None:
    """Raise ModelError unless a GGUF file holds the tokenizer, by what it makes of texts."""
    try:
        found = build_tokenizer(file, read_metadata(file))
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds for what it cannot read
        rule = "a tokenizer in GGUF must be one that transformers reads back"
        raise ModelError(rule, f"{type(error).__name__}: {error!s:.200}", _OTHER) from error
    for text in _PROBES:
        if found(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise ModelError("a GGUF file must hold its tokenizer", f"another for {text!r}", _OTHER)
    if found.chat_template != tokenizer.chat_template:
        raise ModelError("a GGUF file must hold its tokenizer", "another chat template", _OTHER)


def _misfits(config: Any) -> list[tuple[str, str]]:
    """Return (what must be, what is) where llama.cpp would compute something else."""
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        return [(f"be one of {', '.join(_ARCHITECTURES)}", repr(kind))]
    found = []
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    expected = "gelu_pytorch_tanh" if kind.startswith("gemma") else "silu"
    if activation != expected:
        found.append((f"have the activation {expected}", activation))
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            found.append((f"have no {name}", f"{name}: true"))
    for rope in ropes_of(config).values():
        # llama.cpp has frequencies of their own for its llama alone
        known = ("default", "linear") + ("llama3",) * (_ARCHITECTURES[kind] == "llama")
        if (rope_kind := rope.get("rope_type", "default")) not in known:
            found.append((f"have RoPE as {' or '.join(known)}", rope_kind))
    if kind in _WITH_WINDOWS:
        found += _gemma_misfits(config)
    return found


def _gemma_misfits(config: Any) -> list[tuple[str, str]]:
    """llama.cpp has a Gemma's pattern of windows, its attention scale and its caps in code."""
    found = []
    every = 2 if config.model_type == "gemma2" else 6
    pattern = [
        "full" if (i + 1) % every == 0 else "sliding" for i in range(len(config.layer_types))
    ]
    if [kind.removesuffix("_attention") for kind in config.layer_types] != pattern:
        found.append((f"attend fully in every {every}th layer", str(config.layer_types)))
    if config.query_pre_attn_scalar != config.head_dim:
        got = f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
        found.append((f"scale attention by its head_dim of {config.head_dim}", got))
    caps = (config.attn_logit_softcapping is None, config.final_logit_softcapping is None)
    if caps != ((False, False) if config.model_type == "gemma2" else (True, True)):
        found.append(("cap logits as its kind does", f"softcapping: {caps}"))
    return found


def name_for(name: str, tokenizer: Any) -> str:
    """Return a model's name without a meaning for llama.cpp, or with the one that it must have.

    llama.cpp (``llama-vocab.cpp``) looks for "phi3" or "phi-3" in the name. Special tokens then
    take the blanks behind them, as Phi-3's do, and a vocabulary without Phi-3's tokens is refused.
    """
    added = tokenizer.added_tokens_decoder.values()
    is_phi3 = all(
        any(token.content == text and token.rstrip == strips for token in added)
        for text, strips in _PHI3_TOKENS.items()
    )
    if is_phi3:
        return name if _PHI3.search(name) else f"Phi-3 {name}"
    return _PHI3.sub("Phi 3", name)


# --- a model ---


def write_gguf(
    folder: Path, tokenizer: Any, file: Path, kind: str, name: str, ends: Sequence[int] = ()
) -> None:
    """Write a checkpoint as one GGUF file, its weights of two dimensions in `kind`.

    `ends` is the token that ends a turn of a chat, if that is not the end of sequence.
    Rows that Q8_0's blocks of 32 do not fit are float16; weights of one dimension are float32, as
    llama.cpp has them. One weight at a time is in memory. Call `check_convertible` before.
    """
    gguf = import_gguf()
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    stored = Checkpoint(folder).all()
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    names = _Names(config)
    writer = gguf.GGUFWriter(file, names.architecture)
    writer.add_name(name)
    writer.add_file_type(
        int(gguf.LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"])
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, config)
    _add_tokenizer(writer, tokenizer, stored["model.embed_tokens.weight"].shape[0])
    for end in ends:
        writer.add_eot_token_id(end)
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    kinds = {key: _kind_of(found.shape, kind) for key, found in stored.items()}
    for key, found in stored.items():
        as_kind = gguf.GGMLQuantizationType[kinds[key].upper()]
        shape = gguf.quants.quant_shape_to_byte_shape(found.shape, as_kind)
        writer.add_tensor_info(names(key), shape, np.dtype(np.uint8), int(np.prod(shape)), as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for key, found in stored.items():
        values = names.arranged(key, found.read().float()).numpy()
        as_kind = gguf.GGMLQuantizationType[kinds[key].upper()]
        writer.write_tensor_data(gguf.quants.quantize(values, as_kind).view(np.uint8))
    writer.close()


def _kind_of(shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _BLOCK else kind


class _Names:
    """llama.cpp's names for a model's tensors, and its arrangement of their rows."""

    def __init__(self, config: Any) -> None:
        gguf = import_gguf()
        self.architecture = _ARCHITECTURES[config.model_type]
        number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture]
        self._map = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def __call__(self, key: str) -> str:
        name: str | None = self._map.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError("a weight in GGUF must be one that llama.cpp knows", f"{key}", _OTHER)
        return name

    def arranged(self, key: str, weight: Tensor) -> Tensor:
        """Return a weight, or B of a LoRA (out × rank), as llama.cpp stores it."""
        module = key.split(".")[-2]
        if self.architecture == "llama" and module in self._heads:
            halves = weight.reshape(self._heads[module], 2, -1, *weight.shape[1:])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        if self.architecture.startswith("gemma") and module.endswith("norm"):
            weight = weight + 1
        return weight.contiguous()


def context_of(config: Any) -> int:
    """Return the context that a model has in llama.cpp, which attends fully in most classes: that
    is the same up to the length of a window."""
    window = None if config.model_type in _WITH_WINDOWS else getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _add_config(writer: Any, config: Any) -> None:
    gguf = import_gguf()
    ropes, size = ropes_of(config), head_size(config)
    rope = ropes["full_attention"]
    writer.add_context_length(context_of(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type in _WITH_WINDOWS:
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])


# --- its tokenizer ---


def _tokenizer_kind(tokenizer: Any) -> tuple[str, str]:
    """Return llama.cpp's model and pre-tokenizer for a tokenizer. Raises ModelError for none."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = tree["model"]["type"]
    if kind == "BPE" and tree["model"]["byte_fallback"]:
        return "llama", "default"  # sentencepiece's BPE
    own = tokenizer.backend_tokenizer.pre_tokenizer
    if kind == "BPE" and own is not None:
        cuts = [own.pre_tokenize_str(probe) for probe in _PROBES]
        for name, (cutter, whole_first) in known_pre_tokenizers().items():
            if whole_first != tree["model"].get("ignore_merges", False):
                continue
            if [cutter.pre_tokenize_str(probe) for probe in _PROBES] == cuts:
                return "gpt2", name
    raise ModelError(
        "a tokenizer in GGUF must be BPE as llama.cpp knows it",
        f"{kind}, {(tree['pre_tokenizer'] or {}).get('type')}",
        _OTHER,
    )


def _add_tokenizer(writer: Any, tokenizer: Any, num_rows: int) -> None:
    model, pre = _tokenizer_kind(tokenizer)
    tree = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [f"[PAD{index}]" for index in range(num_rows)]
    kinds = [_UNUSED] * num_rows
    for token, index in tokenizer.get_vocab().items():
        is_byte = model == "llama" and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[index], kinds[index] = token, _BYTE if is_byte else _NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        kinds[index] = _CONTROL if added.special else _USER_DEFINED
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tree["merges"]]
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if model == "gpt2":
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = _UNKNOWN
        ranks = {first + second: -float(i) for i, (first, second) in reversed([*enumerate(merges)])}
        writer.add_token_scores([ranks.get(token, -1e6) for token in tokens])
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    writer.add_token_types(kinds)
    ids = tokenizer("a")["input_ids"]
    for name, add in [("bos", writer.add_add_bos_token), ("eos", writer.add_add_eos_token)]:
        add(ids[0 if name == "bos" else -1] == getattr(tokenizer, f"{name}_token_id"))
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    if isinstance(tokenizer.chat_template, dict):
        named = tokenizer.chat_template.items()
        writer.add_chat_template([{"name": name, "template": text} for name, text in named])
    elif tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


# --- a LoRA ---


def write_lora_gguf(
    factors: Mapping[str, tuple[Tensor, Tensor]], config: Any, file: Path, name: str
) -> None:
    """Write A (rank × in) and B (out × rank) of modules, of one rank and scaling 1, as a LoRA for
    llama.cpp."""
    gguf = import_gguf()
    names = _Names(config)
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in factors.items():
        key = f"{module}.weight"
        tensors[f"{names(key)}.lora_a"] = a.float().contiguous()
        tensors[f"{names(key)}.lora_b"] = names.arranged(key, b.float())
    rank = next(iter(factors.values()))[0].shape[0]
    writer = gguf.GGUFWriter(file, names.architecture)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))  # llama.cpp scales by alpha / rank
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
