"""Convert a GGUF file once into a safetensors folder with a correct tokenizer.

transformers reads the tensors and dequantises them to float32, which is exact for a GGUF file. This
module corrects four things that transformers gets wrong: scaled RoPE; a ``quantization_config``
that prevents saving; control tokens that are missing among the special tokens; and the
pre-tokenizer named by ``tokenizer.ggml.pre`` (SmolLM2 first splits off digits). Therefore it builds
byte-level BPE tokenizers from the file's metadata, by the rules of llama.cpp's ``llama-vocab.cpp``.

A converted folder is in the user's cache, under a name with the file's digest. It appears by one
rename, so it is never seen incomplete.
"""

from __future__ import annotations

import json
import logging
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from chainlora.errors import ModelError, explained
from chainlora.files import make_folder, remove_scratch, replaced_folder, reported
from chainlora.models.checkpoint import save_model
from chainlora.models.identity import cache_dir, hash_file
from chainlora.registry import import_optional

logger = logging.getLogger(__name__)

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_OTHER = "use the model's safetensors checkpoint"
_CONVERSION = 2  # version of the result: increase it when a file converts differently
_NUM_TENSORS = "GGUF.tensor_count"  # the name in the package gguf
_LLAMA3 = {  # the same in every Llama since 3.1
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Names in `tokenizer.ggml.pre`, by their pre-tokenizer (llama-vocab.cpp).
_GPT2 = ["gpt-2", "default", "phi-2", "mpt", "olmo", "jais", "trillion", "roberta-bpe", "gigachat"]
_DIGITS_FIRST = ["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"]
# These look up a whole piece before merging (`ignore_merges`), and add BOS by default.
_WHOLE_WORDS_FIRST = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"}


def converted_folder(file: Path) -> Path:
    """Return the folder with the converted model of a GGUF file; convert it if needed.

    Several processes may call it at once: one converts, the others wait. Raises ModelError if the
    file is not a GGUF model that can be converted.
    """
    digest = hash_file(file)
    name = f"{file.stem}-{file.stat().st_size}-{digest[:16]}-v{_CONVERSION}"
    folder = cache_dir() / "gguf" / name
    if folder.is_dir():
        return folder
    make_folder(folder.parent)
    with reported(folder.parent), FileLock(folder.parent / f".{name}.lock"):
        if folder.is_dir():
            return folder
        # left by a killed conversion; the lock excludes a running one
        remove_scratch(folder.parent, name)
        with replaced_folder(folder) as scratch:
            _convert(file, scratch, digest)
    return folder


def _convert(file: Path, folder: Path, digest: str) -> None:
    metadata = read_metadata(file)
    if (parts := metadata.get("split.count", 1)) > 1:
        remedy = "join the parts with llama-gguf-split --merge"
        raise ModelError("a GGUF model must be one file", f"part of {parts}: {file}", remedy)
    architecture, tensors = metadata.get("general.architecture"), metadata[_NUM_TENSORS]
    blocks = metadata.get(f"{architecture}.block_count")
    if isinstance(blocks, int) and blocks > tensors:  # would take hours, then all memory
        rule = "a GGUF file must have the tensors of its blocks"
        got = f"{blocks} blocks and {tensors} tensors in {file}"
        raise ModelError(rule, got, "download it again")
    import_gguf()
    with explained("a GGUF file must describe its tokenizer", f"in {file}", "download it again"):
        tokenizer = build_tokenizer(file, metadata)
    logger.info("converting %s once to %s", file, folder.parent)
    rule = "transformers must be able to read the architecture of a GGUF file"
    with explained(rule, f"for {architecture!r} in {file}", _OTHER):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            use_kernels=False,
            output_loading_info=True,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        got = f"none for {missing[0]} in {file}"
        raise ModelError("a GGUF file must have every weight of its model", got, _OTHER)
    if hasattr(model.config, "quantization_config"):  # the weights are float32 now
        del model.config.quantization_config  # saving refuses otherwise
    model.hf_quantizer = None
    model.config._name_or_path = ""
    stored = {tensor.name: tensor for tensor in import_gguf().GGUFReader(file).tensors}
    rope = {name: stored.pop(name).data for name in list(stored) if name.startswith("rope_")}
    _scale_rope(model.config, rope, file, metadata)
    held = sum(parameter.numel() for parameter in model.parameters())
    if (left := sum(int(tensor.n_elements) for tensor in stored.values()) - held) > 0:
        logger.warning("%d values in %s are not the model's and are ignored", left, file)
    save_model(model, tokenizer, folder)
    source = {"file": file.name, "sha256": digest, "transformers": transformers.__version__}
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n")


def _scale_rope(config: Any, tensors: dict[str, Any], file: Path, metadata: dict[str, Any]) -> None:
    """Set the scaled RoPE of a file in the config; transformers ignores it.

    For Llama 3 the file stores the divisor of each frequency but not the parameters behind it:
    they are set, and must give the same divisors. Raises ModelError for other kinds of RoPE.
    """
    if not getattr(config, "rope_parameters", None):
        return
    rope, prefix = ropes_of(config)["full_attention"], f"{metadata['general.architecture']}.rope"
    if rope.get("rope_type", "default") != "default":
        return  # transformers has read it
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    factor = metadata.get(f"{prefix}.scaling.factor") or metadata.get(f"{prefix}.scale_linear") or 1
    divisors = tensors.pop("rope_freqs.weight", None)
    is_known = kind in ("none", "linear") and not tensors
    if divisors is not None:
        rope |= _LLAMA3 | {"factor": float(divisors.max())}
        computed = rope_factors(config)
        is_known &= factor == 1 and computed.shape == divisors.shape
        is_known = is_known and np.allclose(computed, divisors, rtol=1e-3)
    elif kind == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    if not is_known:
        got = f"{kind}, {', '.join(tensors) or 'with other frequencies'} in {file}"
        rule = "the RoPE of a GGUF file must be plain, linear or Llama 3's"
        raise ModelError(rule, got, _OTHER)


def ropes_of(config: Any) -> dict[str, Any]:
    """Return the RoPE parameters by kind of layer; most models have one kind."""
    parameters = config.rope_parameters
    return parameters if "full_attention" in parameters else {"full_attention": parameters}


def head_size(config: Any) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(config: Any) -> Any:
    """Return the divisors of RoPE's frequencies [head size / 2] of Llama 3, or None."""
    rope = ropes_of(config)["full_attention"]
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    return (plain / scaled.double()).float().numpy()


def import_gguf() -> Any:
    """Return the package gguf. Raises ModelError if it is not installed."""
    return import_optional("gguf", "a GGUF file", ModelError)


def read_metadata(file: Path) -> dict[str, Any]:
    """Return a GGUF file's key-value pairs (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    Raises:
        ModelError: the file is not a little-endian GGUF file of version 2 or 3.
    """
    with open(file, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"a .gguf file must begin with GGUF (got {file}); download it again")
        position, pairs = 4, dict[str, Any]()
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                version, pairs[_NUM_TENSORS], num_pairs = struct.unpack_from("<IQQ", data, position)
                if version not in (2, 3):
                    rule = "a GGUF file must be of version 2 or 3, little-endian"
                    remedy = "convert it again with a newer llama.cpp"
                    raise ModelError(rule, f"{version} in {file}", remedy)
                position = 24
                for _ in range(num_pairs):
                    key, position = _read_value(data, position, _STRING)
                    kind = struct.unpack_from("<I", data, position)[0]
                    pairs[key], position = _read_value(data, position + 4, kind)
            except (struct.error, LookupError, ValueError, OverflowError, MemoryError) as error:
                got = f"{file}, unreadable at byte {position}"
                rule = "a GGUF file must be complete"
                raise ModelError(rule, got, "download it again") from error
            return pairs


def _read_value(data: mmap.mmap, position: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        start = position + 8
        end = start + struct.unpack_from("<Q", data, position)[0]
        return data[start:end].decode("utf-8"), end
    if kind != _ARRAY:
        layout = "<" + _SCALARS[kind]
        return struct.unpack_from(layout, data, position)[0], position + struct.calcsize(layout)
    inner, length = struct.unpack_from("<IQ", data, position)
    position += 12
    if inner in _SCALARS:
        layout = f"<{length}{_SCALARS[inner]}"
        return list(struct.unpack_from(layout, data, position)), position + struct.calcsize(layout)
    if inner == _ARRAY:
        raise ValueError("an array of arrays")  # no writer makes one; nesting would have no limit
    values = []
    for _ in range(length):
        value, position = _read_value(data, position, inner)
        values.append(value)
    return values, position


def build_tokenizer(file: Path, metadata: dict[str, Any]) -> Any:
    """Return the tokenizer of a GGUF file; every control token is one special token.

    Raises:
        ModelError: the file has no tokenizer, or one that is not supported.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        raise ModelError("a GGUF file must hold its tokenizer", f"none in {file}", _OTHER)
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        plain = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
        tokenizer = _byte_level_tokenizer(file, metadata, control, plain)
    else:
        # transformers supports the tokenizer of Gemma 1 in GGUF, but not its config
        is_gemma = metadata.get("general.architecture") == "gemma"
        reader: Any = PreTrainedTokenizerFast if is_gemma else AutoTokenizer
        tokenizer = reader.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.add_tokens(_added(control, special=True))
    tokenizer.chat_template = _chat_template(metadata) or tokenizer.chat_template
    for token in control:
        if tokenizer.encode(token, add_special_tokens=False) != [tokens.index(token)]:
            got = f"{token!r} split in {file}"
            raise ModelError("each control token must be one token", got, _OTHER)
    return tokenizer


def _chat_template(metadata: dict[str, Any]) -> Any:
    """Return the chat template, or all templates by name if the file has several."""
    default, key = metadata.get("tokenizer.chat_template"), "tokenizer.chat_template"
    named = {name: metadata[f"{key}.{name}"] for name in metadata.get(f"{key}s", [])}
    return named | ({"default": default} if default else {}) if named else default


def _added(tokens: list[str], *, special: bool) -> list[AddedToken]:
    return [AddedToken(token, special=special, normalized=False) for token in tokens]


def _byte_level_tokenizer(
    file: Path, metadata: dict[str, Any], control: list[str], plain: list[str]
) -> Any:
    tokens = metadata["tokenizer.ggml.tokens"]
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    whole_first = pre in _WHOLE_WORDS_FIRST
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_first))
    if pre not in (known := known_pre_tokenizers()):
        got, remedy = f"{pre!r} in {file}", f"{_OTHER}, or a newer transformers"
        raise ModelError("the pre-tokenizer of a GGUF file must be known", got, remedy)
    backend.pre_tokenizer = known[pre][0]
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_added(control, special=True))
    backend.add_tokens(_added(plain, special=False))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    special = {name: tokens[index] for name, index in ids.items() if index is not None}
    begins = metadata.get("tokenizer.ggml.add_bos_token", whole_first)
    if begins and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            f"{bos} $A", f"{bos} $A {bos}:1 $B:1", [(bos, ids["bos_token"])]
        )
    limit = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=limit or int(1e30),
        **special,
        additional_special_tokens=[token for token in control if token not in special.values()],
    )


def known_pre_tokenizers() -> dict[str, tuple[Any, bool]]:
    """Return by name a pre-tokenizer, and whether whole pieces are looked up before merging.

    Of names with the same meaning, the first one is the most common in files of llama.cpp.
    """
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_PRE_TOKENIZER_SPLITS as splits,
        )
    except ImportError:  # older transformers, below about 5.20
        splits = {}
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known = dict.fromkeys(_GPT2, gpt2) | dict.fromkeys(_DIGITS_FIRST, digits)
    for name in sorted(splits, key=lambda name: name != "llama-bpe"):
        split = pre_tokenizers.Split(Regex(splits[name]), behavior="isolated")
        known[name] = pre_tokenizers.Sequence([split, in_bytes])
    return {name: (cutter, name in _WHOLE_WORDS_FIRST) for name, cutter in known.items()}
