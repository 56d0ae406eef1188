"""Load a causal language model and its tokenizer.

The source is a Hub id, a folder, a GGUF file or a pip package with a GGUF file. `finding.py` first
turns each of them into a folder of safetensors, so that there is one way to load. Remote code and
pickle are never used.

`load_shards` loads a model into several processes. It makes the model without weights and cuts its
parameters into parts; each process then reads its rows by memory map, so none holds the whole
model. If the tensors of the checkpoint do not match the parameters one to one (stacked experts,
weights that transformers converts), each process first loads the whole model.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from chainlora.errors import ConfigError, ModelError, explained
from chainlora.models import shards
from chainlora.models.checkpoint import Checkpoint, Stored
from chainlora.models.finding import resolve_model
from chainlora.models.identity import has_tokenizer
from chainlora.models.quantizing import quantization, settle_kernels

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

    class CausalModel(PreTrainedModel, GenerationMixin):
        """A causal language model of transformers, as type checkers see it: it can generate."""


logger = logging.getLogger(__name__)

_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_MANY_LAYERS = 1000  # more than any model has; transformers makes as many in seconds
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_model(
    spec: str | Path,
    dtype: torch.dtype | str = "float32",
    *,
    quantize: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        spec: Hub id, folder, ``.gguf`` file, or ``pip:PACKAGE`` for the GGUF file in an installed
            package.
        dtype: dtype of the weights, or its name: a floating-point dtype of torch.
        quantize: ``"nf4"`` or ``"int8"`` to quantise linear layers while they load (`quantizing`);
            None to load them as they are.
        device: where to load a quantised model. Other models are loaded on the CPU.

    Returns:
        The model in evaluation mode, and its tokenizer. The tokenizer pads with a token of its
        vocabulary, which does not change.

    Raises:
        ModelError: nothing is at `spec`; it needs remote code or pickle; it is not a causal
            language model; or weights or tokenizer are missing.
        ConfigError: the dtype is invalid.
    """
    torch_dtype, opened = named_dtype(dtype), open_folder(spec)
    return load_weights(opened, torch_dtype, quantize=quantize, device=device), opened.tokenizer


def named_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a floating-point dtype by name. Raises ConfigError for any other value."""
    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ConfigError("`dtype` must be a floating dtype of torch", repr(dtype), "e.g. bfloat16")
    return value


def load_weights(
    opened: Opened,
    dtype: torch.dtype,
    *,
    quantize: str | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Return the model of an opened folder; see `load_model`."""
    folder, config, tokenizer = opened
    keys: dict[str, Any] = {}
    is_quantized = getattr(config, "quantization_config", None) is not None
    if quantize is not None and is_quantized:
        rule = "`quantize` needs a checkpoint that is not quantised"
        got = f"a quantization_config in {folder / 'config.json'}"
        raise ModelError(rule, got, "leave quantize out")
    if quantize is not None:
        keys["quantization_config"] = quantization(quantize, dtype)
    if quantize is not None or is_quantized:
        keys["device_map"] = {"": device}
    # Any error can come from a bad config (0 heads: a division by 0) or from a missing package.
    remedy = "install the package that it names, correct the folder or download it again"
    with explained("a model folder must load with transformers", f"in {folder}", remedy):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            use_kernels=False,  # the default replaces layers with code from the Hub
            local_files_only=True,
            output_loading_info=True,
            **keys,
        )
    model, report = loaded
    _check_whole(model, report, folder, is_quantized)
    settle(model, tokenizer, folder)
    settle_kernels(model)
    return model.eval()


class Opened(NamedTuple):
    """A model folder with its config and tokenizer, before any weight is loaded."""

    folder: Path
    config: Any
    tokenizer: Any


def open_folder(spec: str | Path) -> Opened:
    """Read the config and tokenizer of a model, and check that the folder has weights."""
    folder = resolve_model(spec)
    config = _load_config(folder)
    _refuse_pickle(folder)
    _check_layers(config, folder)
    return Opened(folder, config, load_tokenizer(folder))


def accelerator() -> torch.device:
    """Return the accelerator of this machine, or the CPU."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")


def settle(model: Any, tokenizer: Any, folder: Path) -> None:
    """Check a model against its folder and tokenizer, and give it the tokenizer's pad token."""
    _refuse_integers(model, folder)
    check_vocabulary(model, tokenizer, folder)
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def load_skeleton(spec: str | Path) -> Any:
    """Return a model on the meta device: modules, names and shapes, without weights.

    Raises ModelError if nothing is at `spec`, or transformers cannot make the model.
    """
    # Outside of the meta device: a GGUF file may have to be converted.
    config = _load_config(resolve_model(spec))
    with torch.device("meta"):
        return make_model(config, spec)


def make_model(config: Any, spec: str | Path, **keys: Any) -> Any:
    """Return a model of a config, without loading weights. Raises ModelError if it fails."""
    rule = "transformers must be able to make the model"
    with explained(rule, f"for {spec}", "check its config.json"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **keys)


def _load_config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        stated: Any = None
        with suppress(OSError, ValueError, RecursionError):
            stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stated = stated if isinstance(stated, dict) else {}
        kind, has_code = stated.get("model_type"), "auto_map" in stated
        if isinstance(kind, str) and kind in CONFIG_MAPPING and not has_code:
            rule = "transformers must be able to read config.json"
            got = f"{type(error).__name__}: {error!s:.200} in {folder}"
            raise ModelError(rule, got, "correct or download it again") from error
        code = ", with remote code, which is never run" if has_code else ""
        rule, got = "config.json must name an architecture of transformers", f"{kind!r} in {folder}"
        remedy = "use another model, or a newer transformers"
        raise ModelError(rule, f"{got}{code}", remedy) from error
    named = config.architectures
    names = [str(name) for name in named] if isinstance(named, list | tuple) else []
    masked = bool(names) and all(name.endswith("ForMaskedLM") for name in names)
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    if not is_causal or config.is_encoder_decoder or masked:
        got = f"{', '.join(names) or config.model_type} in {folder}"
        remedy = "use a decoder-only one such as Llama, Qwen, GPT-2 or OPT"
        raise ModelError("`model` must be a causal language model", got, remedy)
    return config


def _refuse_pickle(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if not pickles:
        got = f"none in {folder}"
        remedy = "name a repository, a revision or a folder with safetensors"
        raise ModelError("a model folder must have *.safetensors", got, remedy)
    raise ModelError(
        "weights must be safetensors, since pickle can run code",
        f"only {pickles[0]} in {folder}",
        "load a trusted copy with transformers and call save_pretrained, or use a revision with "
        "safetensors",
    )


def _check_layers(config: Any, folder: Path) -> None:
    """Raise ModelError if config.json names more layers than the folder has tensors.

    Such a model would take very long to make, and then all memory.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= _MANY_LAYERS:
        return
    try:
        tensors = len(Checkpoint(folder).all())
    except SafetensorError:  # a damaged file has no readable tensor
        tensors = 0
    if layers > tensors:
        rule = "config.json must match the weights in its folder"
        got = f"num_hidden_layers {layers} and {tensors} tensors in {folder}"
        raise ModelError(rule, got, "correct or download it again")


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model folder, with a pad token of its vocabulary.

    Raises ModelError if the folder has no tokenizer, or it does not load.
    """
    if not has_tokenizer(folder):
        rule, got = "a model folder must hold its tokenizer", "no tokenizer.json or similar file in"
        raise ModelError(rule, f"{got} {folder}", "save the tokenizer into this folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        remedy = "save it again into this folder"
        if "trust_remote_code" in str(error):
            remedy = "remote code is never run; use a tokenizer of transformers"
        got = f"{error!s:.200} in {folder}"
        raise ModelError("the tokenizer must load with transformers", got, remedy) from error
    for key in ("is_local", "local_files_only"):  # keys of this call, which it would save
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    return tokenizer


def are_same_tokenizers(one: Any, two: Any) -> bool:
    """Say whether two tokenizers give every text and every chat the same tokens.

    Their files may differ: another version of a library writes them in another form, and a trainer
    saves the padding and the truncation of its last batch. Only those of the library tokenizers can
    be compared; others count as different.
    """
    return all(hasattr(each, "backend_tokenizer") for each in (one, two)) and (
        _encoding_of(one) == _encoding_of(two)
    )


def _encoding_of(tokenizer: Any) -> list[Any]:
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: rule for key, rule in rules.items() if key not in ("padding", "truncation")}
    names = ("bos", "eos", "unk")
    return [kept, tokenizer.chat_template, *(getattr(tokenizer, f"{n}_token_id") for n in names)]


def _check_whole(model: Any, report: dict[str, Any], folder: Path, is_quantized: bool) -> None:
    missing = sorted(report["missing_keys"])
    if is_quantized:  # its linear layers and experts may have other names in the file
        linear = {name for name, module in model.named_modules() if hasattr(module, "in_features")}
        missing = [name for name in missing if name.endswith(".weight")]
        missing = [name for name in missing if name.removesuffix(".weight") not in linear]
    if missing:
        rule = "a checkpoint must have every weight of the model"
        got = f"{len(missing)} missing in {folder}, first {missing[0]}"
        raise ModelError(rule, got, "use a checkpoint of a causal language model")
    if unexpected := sorted(report["unexpected_keys"]):
        text = "%d weights in %s are not the model's and are ignored, first %s"
        logger.warning(text, len(unexpected), folder, unexpected[0])


def _refuse_integers(model: Any, folder: Path) -> None:
    """Raise ModelError for integer weights without a quantization_config.

    transformers would cast the integers to floats without an error.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_parameters()}
    names |= {name.removeprefix(prefix) for name in names}
    for name, stored in Checkpoint(folder).all().items():
        if name in names and stored.dtype in _INTEGERS:
            rule = "weights must be floating-point unless config.json has a quantization_config"
            got = f"{stored.dtype} for {name} in {stored.file}"
            raise ModelError(rule, got, "use the checkpoint before quantisation")


def check_vocabulary(model: Any, tokenizer: Any, folder: Path) -> None:
    """Raise ModelError if the tokenizer can write tokens without a row in the embedding.

    Special tokens may lie beyond the embedding, for example image tokens of text models (Gemma 3
    1B), except bos, eos, unk and pad, which texts contain.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = {index for index in tokenizer.get_vocab().values() if index >= rows}
    # Mistral's tokenizer lacks the attribute.
    added = tokenizer.added_tokens_decoder if beyond else {}
    written = {getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if wrong := beyond - ({key for key, token in added.items() if token.special} - written):
        rule, got = "the embedding must have a row per token", f"token {max(wrong)} and {rows} rows"
        remedy = "use the tokenizer the model was trained with"
        raise ModelError(rule, f"{got} in {folder}", remedy)


# --- several processes ---


def load_shards(opened: Opened, dtype: torch.dtype, count: int, device: torch.device) -> Any:
    """Return a frozen model whose weights are cut into `count` parts, one per process.

    Raises ModelError as `load_weights`, or if the model is quantised or FSDP2 cannot shard it.
    """
    folder, config, tokenizer = opened
    if getattr(config, "quantization_config", None) is not None:
        got = f"a quantization_config in {folder / 'config.json'}"
        remedy = "leave it out: each process then holds the whole model"
        raise ModelError("`train.shard` needs weights of 16 or 32 bits", got, remedy)
    with init_empty_weights(include_buffers=False):
        model = make_model(config, folder, dtype=dtype)
    model.tie_weights()
    stored, reason = _find_tensors(model, folder, dtype)
    if reason is not None:
        logger.warning("each process first loads the whole model %s: %s", folder, reason)
        model = load_weights(opened, dtype)
    else:
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        settle(model, tokenizer, folder)
    model.requires_grad_(False)
    shards.shard(model, count, device)
    if reason is not None:
        model.to(device)
    else:
        _materialise(model, device)
        with torch.no_grad():
            for name, tensor in _weights(model).items():
                shards.local(tensor).copy_(stored[name].read(shards.rows(tensor)))
    shards.start(model)
    return model.eval()


def _find_tensors(
    model: Any, folder: Path, dtype: torch.dtype
) -> tuple[dict[str, Stored], str | None]:
    """Return the stored tensor of every parameter, or why rows cannot be read directly."""
    for change in get_model_conversion_mapping(model):  # most entries only change names
        if isinstance(change, WeightConverter):
            kind = type(change).__name__
            return {}, f"transformers converts its weights while loading ({kind})"
    if dtype != torch.float32 and getattr(model, "_keep_in_fp32_modules_strict", None):
        return {}, "some of its weights stay in float32"
    checkpoint, tensors = Checkpoint(folder), {}
    for name, tensor in _weights(model).items():
        match = next(checkpoint.find(name, tuple(tensor.shape)), None)
        if match is None:
            return {}, f"the checkpoint has no tensor with the name and shape of {name}"
        tensors[name] = match
    return tensors, None


def _weights(model: Any) -> dict[str, Tensor]:
    """Return the parameters and saved buffers of a model; tied parameters once."""
    saved = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return dict(model.named_parameters()) | buffers


def _materialise(model: Any, device: torch.device) -> None:
    """Allocate memory on `device` for the rows of this process; keep the values of buffers."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
