"""Write a checkpoint, or a LoRA for it, as a GGUF file that computes the same in llama.cpp.

Tensor names come from the package gguf. llama.cpp stores some weights differently: it interleaves
the rows of a Llama's q and k (rotary layout), and adds 1 to a Gemma's norms. Metadata and tokenizer
rules follow llama.cpp's ``convert_hf_to_gguf.py``. A model that llama.cpp would compute differently
is refused; the error names the property.
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

from chainlora.chain.adapters import Factors
from chainlora.errors import ModelError
from chainlora.models.checkpoint import Checkpoint
from chainlora_gguf.from_gguf import (
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
# Special tokens of Phi-3, and whether they absorb the blanks after them.
_PHI3_TOKENS = {"</s>": True, "<|end|>": True, "<s>": False, "<|endoftext|>": False, "<unk>": False}

# Texts that distinguish tokenizers, by splits of digits, contractions, cases, line breaks, blanks,
# marks and letters beyond ASCII. In NFC, as llama.cpp does not normalise like Qwen's tokenizer.
_PROBES = (
    "It's 2026-01-07, 12345678 of 9; WE'LL SEE\n\n  don't\t x=3.14/2 (HTTPServer's getURL)\r\n",
    "naïve café — 東京で１２３　été «Привет, мир» हिन्दी 🙂🙂 … a/b\n/c   end",
)


def check_convertible(config: Any, tokenizer: Any) -> None:
    """Raise ModelError for a model or tokenizer that cannot be written as GGUF.

    The tokenizer is checked by writing it to a file without weights and reading it back.
    """
    gguf = import_gguf()
    for rule, got in _violations(config):
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
    """Raise ModelError unless the tokenizer in a GGUF file gives the same ids and template."""
    try:
        restored = build_tokenizer(file, read_metadata(file))
    except ModelError:
        raise
    except Exception as error:  # transformers raises many types
        rule = "transformers must be able to read a tokenizer in GGUF"
        raise ModelError(rule, f"{type(error).__name__}: {error!s:.200}", _OTHER) from error
    rule = "a GGUF file must reproduce its tokenizer"
    for text in _PROBES:
        if restored(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise ModelError(rule, f"other ids for {text!r}", _OTHER)
    if restored.chat_template != tokenizer.chat_template:
        raise ModelError(rule, "another chat template", _OTHER)


def _violations(config: Any) -> list[tuple[str, str]]:
    """Return (rule, got) for each property that llama.cpp would compute differently."""
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        return [(f"be one of {', '.join(_ARCHITECTURES)}", repr(kind))]
    violations = []
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    expected = "gelu_pytorch_tanh" if kind.startswith("gemma") else "silu"
    if activation != expected:
        violations.append((f"have the activation {expected}", activation))
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            violations.append((f"have no {name}", f"{name}: true"))
    for rope in ropes_of(config).values():
        # llama.cpp reads separate frequencies (`rope_freqs`) only for its architecture llama
        known = ("default", "linear") + ("llama3",) * (_ARCHITECTURES[kind] == "llama")
        if (rope_kind := rope.get("rope_type", "default")) not in known:
            violations.append((f"have RoPE as {' or '.join(known)}", rope_kind))
    if kind in _WITH_WINDOWS:
        violations += _gemma_violations(config)
    return violations


def _gemma_violations(config: Any) -> list[tuple[str, str]]:
    """Compare with constants in llama.cpp: pattern of windows, attention scale, soft caps."""
    violations = []
    every = 2 if config.model_type == "gemma2" else 6
    pattern = [
        "full" if (i + 1) % every == 0 else "sliding" for i in range(len(config.layer_types))
    ]
    if [kind.removesuffix("_attention") for kind in config.layer_types] != pattern:
        violations.append((f"attend fully in every {every}th layer", str(config.layer_types)))
    if config.query_pre_attn_scalar != config.head_dim:
        got = f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
        violations.append((f"scale attention by its head_dim of {config.head_dim}", got))
    caps = (config.attn_logit_softcapping is None, config.final_logit_softcapping is None)
    if caps != ((False, False) if config.model_type == "gemma2" else (True, True)):
        violations.append(("have the logit caps of its kind", f"softcapping: {caps}"))
    return violations


def name_for(name: str, tokenizer: Any) -> str:
    """Return a model's name that contains "Phi-3" if and only if the model has Phi-3's tokens.

    llama.cpp (``llama-vocab.cpp``) looks for "phi3" or "phi-3" in the name. If the name contains
    it, special tokens absorb the blanks after them, and a vocabulary without Phi-3's tokens is
    refused.
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
    folder: Path, tokenizer: Any, file: Path, kind: str, name: str, ends: Sequence[int]
) -> None:
    """Write a checkpoint as one GGUF file. Call `check_convertible` first.

    One weight at a time is in memory. `kind` is one of `KINDS`, for weights of two dimensions. With
    q8_0, rows whose length is not a multiple of 32 become float16. Weights of one dimension are
    float32, as in llama.cpp. `name` is the model's name, see `name_for`; `ends` is the token that
    ends a turn of a chat, if it is not the end of sequence.
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
    types = {
        key: gguf.GGMLQuantizationType[_kind_of(weight.shape, kind).upper()]
        for key, weight in stored.items()
    }
    for key, weight in stored.items():
        shape = gguf.quants.quant_shape_to_byte_shape(weight.shape, types[key])
        size = int(np.prod(shape))
        writer.add_tensor_info(names(key), shape, np.dtype(np.uint8), size, types[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for key, weight in stored.items():
        values = names.arranged(key, weight.read().float()).numpy()
        writer.write_tensor_data(gguf.quants.quantize(values, types[key]).view(np.uint8))
    writer.close()


def _kind_of(shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _BLOCK else kind


class _Names:
    """llama.cpp's names of a model's tensors, and its order of their rows."""

    def __init__(self, config: Any) -> None:
        gguf = import_gguf()
        self.architecture = _ARCHITECTURES[config.model_type]
        number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture]
        self._map = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def __call__(self, key: str) -> str:
        name: str | None = self._map.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError("llama.cpp must know each weight of the model", f"{key}", _OTHER)
        return name

    def arranged(self, key: str, weight: Tensor) -> Tensor:
        """Return a weight, or B of a LoRA (out × rank), as llama.cpp stores it."""
        module = key.split(".")[-2]
        if self.architecture == "llama" and module in self._heads:
            # [heads, 2, half a head, …] -> [heads, half a head, 2, …]: rotary pairs interleaved
            halves = weight.reshape(self._heads[module], 2, -1, *weight.shape[1:])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        if self.architecture.startswith("gemma") and module.endswith("norm"):
            weight = weight + 1
        return weight.contiguous()


def context_of(config: Any) -> int:
    """Return the context length in llama.cpp.

    For most classes llama.cpp has full attention. It equals windowed attention only up to the
    length of a window, so a window limits the context.
    """
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
    """Return llama.cpp's names of the model and the pre-tokenizer of a tokenizer.

    Raises ModelError if llama.cpp has none that fit.
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = tree["model"]["type"]
    if kind == "BPE" and tree["model"]["byte_fallback"]:
        return "llama", "default"  # sentencepiece's BPE
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    if kind == "BPE" and pre_tokenizer is not None:
        cuts = [pre_tokenizer.pre_tokenize_str(probe) for probe in _PROBES]
        for name, (cutter, whole_first) in known_pre_tokenizers().items():
            if whole_first != tree["model"].get("ignore_merges", False):
                continue
            if [cutter.pre_tokenize_str(probe) for probe in _PROBES] == cuts:
                return "gpt2", name
    raise ModelError(
        "a tokenizer in GGUF must be a BPE tokenizer that llama.cpp supports",
        f"{kind}, {(tree['pre_tokenizer'] or {}).get('type')}",
        _OTHER,
    )


def _add_tokenizer(writer: Any, tokenizer: Any, num_rows: int) -> None:
    model, pre = _tokenizer_kind(tokenizer)
    tree = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [f"[PAD{index}]" for index in range(num_rows)]
    kinds = [_UNUSED] * num_rows
    added = tokenizer.added_tokens_decoder
    for token, index in tokenizer.get_vocab().items():
        if index >= num_rows:  # Gemma 3 for text has a special token without a row
            continue
        is_byte = model == "llama" and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[index], kinds[index] = token, _BYTE if is_byte else _NORMAL
        if index in added:
            kinds[index] = _CONTROL if added[index].special else _USER_DEFINED
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if model == "gpt2":
        writer.add_token_merges([" ".join(merge) for merge in tree["merges"]])
    else:
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = _UNKNOWN
        merges = reversed([*enumerate(tree["merges"])])
        ranks = {first + second: -float(place) for place, (first, second) in merges}
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


def write_lora_gguf(factors: Mapping[str, Factors], config: Any, file: Path, name: str) -> None:
    """Write the factors of modules as a LoRA for llama.cpp. They must have one rank and scaling 1.

    `name` is the model's name.
    """
    gguf = import_gguf()
    names = _Names(config)
    rank = len(next(iter(factors.values())).a)
    writer = gguf.GGUFWriter(file, names.architecture)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))  # llama.cpp scales by alpha / rank
    for module, pair in factors.items():  # A is [rank, in], B [out, rank]
        key = f"{module}.weight"
        writer.add_tensor(f"{names(key)}.lora_a", pair.a.float().contiguous().numpy())
        writer.add_tensor(f"{names(key)}.lora_b", names.arranged(key, pair.b.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
