"""The seam to PEFT: put one LoRA on a model, read and write its factors, take it off, save it, load it.

This is the only module that imports `peft`. A layer is asked whether it is adapted (`isinstance`), names are
never matched by substring. The model stays the user's own object: adapted layers are swapped in place.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import LinkConfig
from .errors import ModelError, RunError

LIVE = "link"
CARRIED = "carried"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's share of a link, float32 on the CPU: ``A`` (rank × in), ``B`` (out × rank).

    `bias` (out) is LoRA's own bias on B; `magnitude` (out) is DoRA's (arXiv 2402.09353).
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None


@dataclass
class Adapter:
    """A LoRA that sits on the model: its tuner layers by module path, and the extra modules it trains."""

    tuner: peft.LoraModel
    config: LinkConfig
    layers: dict[str, Any]  # PEFT's LoraLayer, whose attributes are untyped
    extra: dict[str, nn.Module] = field(default_factory=dict)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters this link trains."""
        for layer in self.layers.values():
            yield from _trained(layer, self.config)
        for module in self.extra.values():
            yield from module.parameters()

    def named_factor(self, factor: str) -> list[nn.Parameter]:
        """Return the trained parameters of factor ``"A"`` or ``"B"`` (with B's bias and magnitude)."""
        picked = []
        for layer in self.layers.values():
            a = layer.lora_A[LIVE].weight
            picked += [p for p in _trained(layer, self.config) if (p is a) == (factor == "A")]
        return picked


def _trained(layer: Any, config: LinkConfig) -> Iterator[nn.Parameter]:
    a, b = layer.lora_A[LIVE], layer.lora_B[LIVE]
    if config.train_factors != "B":
        yield a.weight
    if config.train_factors != "A":
        yield from b.parameters()
    if LIVE in layer.lora_magnitude_vector:
        yield from layer.lora_magnitude_vector[LIVE].parameters()


def base_layer(layer: nn.Module) -> Any:
    """Return the frozen layer below a tuner layer, or the layer itself when it is not adapted."""
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def is_transposed(module: nn.Module) -> bool:
    """Say whether the module stores its weight (in × out), as GPT-2's Conv1D does."""
    return isinstance(module, Conv1D)


def target_candidates(model: nn.Module) -> list[str]:
    """Return the last path parts of all Linear and Conv1D layers, most frequent first, for `target_modules`."""
    counts: dict[str, int] = {}
    head, _ = _tied(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            last = name.rpartition(".")[2]
            counts[last] = counts.get(last, 0) + 1
    return sorted(counts, key=lambda last: (-counts[last], last))


def attach(model: nn.Module, config: LinkConfig) -> Adapter:
    """Put a fresh LoRA on `model` in place: adapter weights in float32, the rest frozen.

    Factors hold PEFT's own start; the caller sets them. Raises ModelError when nothing matches, when a matched
    layer is neither Linear nor Conv1D, when a target shares its storage (tied head), or `lora_bias` finds no bias.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ModelError(
            "a chain needs a model without adapters (got one that already has LoRA layers); "
            "merge or unload them first"
        )
    check_targets(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PEFT would take every module whose path *ends* in the name, `input_layernorm` for `norm`: give it whole paths
        extra = [name for name, _ in _named_modules(model, config.extra_modules)] or None
        tuner = peft.LoraModel(model, _peft_config(config, modules_to_save=extra), LIVE)
    adapter = Adapter(tuner, config, _layers(model), _extra_modules(model))
    for layer in adapter.layers.values():
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            part.float()
    for module in adapter.extra.values():
        _train_in_float32(module)
    _train_only(adapter)
    return adapter


def _train_only(adapter: Adapter) -> None:
    for parameter in adapter.tuner.model.parameters():
        parameter.requires_grad_(False)
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)


def _train_in_float32(module: nn.Module) -> None:
    """Keep an extra module in float32 (a bfloat16 weight loses small updates), with casts at its borders."""
    if all(parameter.dtype == torch.float32 for parameter in module.parameters()):
        return
    module.float()
    dtypes: list[torch.dtype] = []

    def widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        dtypes[:] = [inputs[0].dtype]
        return tuple(i.float() if torch.is_tensor(i) and i.is_floating_point() else i for i in inputs)

    def narrow(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.to(dtypes[0]) if dtypes[0].is_floating_point else output

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow)


def detach(adapter: Adapter) -> None:
    """Take the LoRA off in place: plain layers again, and the extra modules as they were before."""
    model = adapter.tuner.model
    originals = {name: model.get_submodule(name).original_module for name in adapter.extra}
    adapter.tuner.unload()
    for name, module in originals.items():
        model.set_submodule(name, module)
    for attribute in ("peft_config", "peft_type", "_hf_peft_config_loaded"):
        if attribute in vars(model):
            delattr(model, attribute)
    adapter.layers, adapter.extra = {}, {}


def same_shape(adapter: Adapter, config: LinkConfig) -> bool:
    """Say whether the next link fits into this one's tensors (then compiled graphs live on)."""
    return adapter.config.model_copy(update={"alpha": config.alpha, "init": config.init}) == config


def set_factors(adapter: Adapter, name: str, factors: Factors) -> None:
    """Write one module's factors, in place."""
    layer = adapter.layers[name]
    with torch.no_grad():
        layer.lora_A[LIVE].weight.copy_(factors.a)
        layer.lora_B[LIVE].weight.copy_(factors.b)
        if layer.lora_B[LIVE].bias is not None:
            layer.lora_B[LIVE].bias.copy_(torch.zeros(()) if factors.bias is None else factors.bias)
        if LIVE in layer.lora_magnitude_vector and factors.magnitude is not None:
            layer.lora_magnitude_vector[LIVE].weight.copy_(factors.magnitude)


def get_factors(adapter: Adapter, name: str) -> Factors:
    """Copy one module's factors to float32 on the CPU."""
    layer = adapter.layers[name]
    b = layer.lora_B[LIVE]
    magnitude = layer.lora_magnitude_vector[LIVE].weight if LIVE in layer.lora_magnitude_vector else None
    return Factors(
        _host(layer.lora_A[LIVE].weight),
        _host(b.weight),
        None if b.bias is None else _host(b.bias),
        None if magnitude is None else _host(magnitude),
    )


def set_config(adapter: Adapter, config: LinkConfig) -> None:
    """Give a reused adapter the next link's scaling and settings."""
    for layer in adapter.layers.values():
        layer.scaling[LIVE] = config.scaling
        layer.lora_alpha[LIVE] = config.alpha
    adapter.config = config


def zero(adapter: Adapter) -> None:
    """Make the adapter add nothing: both factors and the bias to zero, in place."""
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_A[LIVE].weight.zero_()
            for parameter in layer.lora_B[LIVE].parameters():
                parameter.zero_()


def reset_magnitudes(adapter: Adapter) -> None:
    """Set DoRA's magnitudes to the row norms of the weights as they are now, so that the link is a no-op."""
    for layer in adapter.layers.values():
        if LIVE in layer.lora_magnitude_vector:
            base = layer.get_base_layer()
            weight = base.weight.detach().float()
            norms = torch.linalg.norm(weight, dim=0 if is_transposed(base) else 1)
            with torch.no_grad():
                layer.lora_magnitude_vector[LIVE].weight.copy_(norms)


def touched_parameters(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yield (path on the plain model, parameter) of all a link may change: base layers and extra modules."""
    for name, layer in adapter.layers.items():
        base = layer.get_base_layer()
        yield f"{name}.weight", base.weight
        if getattr(base, "bias", None) is not None:
            yield f"{name}.bias", base.bias
    for name, module in adapter.extra.items():
        for key, parameter in module.named_parameters():
            yield f"{name}.{key}", parameter


def get_extra(adapter: Adapter) -> dict[str, Tensor]:
    """Copy the trained extra modules' weights, by path on the plain model, to float32 on the CPU."""
    return {
        f"{name}.{key}": _host(parameter)
        for name, module in adapter.extra.items()
        for key, parameter in module.named_parameters()
    }


def set_extra(model: nn.Module, adapter: Adapter | None, weights: Mapping[str, Tensor]) -> None:
    """Write extra modules' weights: into the adapter's own copies where it has them, else into the model."""
    copies = {
        f"{name}.{key}": parameter
        for name, module in (adapter.extra if adapter else {}).items()
        for key, parameter in module.named_parameters()
    }
    with torch.no_grad():
        for path, weight in weights.items():
            (copies[path] if path in copies else model.get_parameter(path)).copy_(weight)


def carry(adapter: Adapter, stacked: Mapping[str, Factors]) -> None:
    """Hold earlier links beside the base as one frozen branch, their scalings folded into B and the bias."""
    tuner = adapter.tuner
    rank = max((factors.a.shape[0] for factors in stacked.values()), default=0)
    if not rank:
        return
    pattern = {re.escape(name): factors.a.shape[0] for name, factors in stacked.items()}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(stacked),
        init_lora_weights=True,
        lora_bias=any(factors.bias is not None for factors in stacked.values()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner.peft_config[CARRIED] = config
        tuner.inject_adapter(tuner.model, CARRIED)
        tuner.set_adapter([CARRIED, LIVE])
    for name, layer in adapter.layers.items():
        if CARRIED in layer.lora_A:
            with torch.no_grad():
                layer.lora_A[CARRIED].weight.data = stacked[name].a.to(layer.lora_A[LIVE].weight)
                layer.lora_B[CARRIED].weight.data = stacked[name].b.to(layer.lora_B[LIVE].weight)
                bias = stacked[name].bias
                if bias is not None:
                    layer.lora_B[CARRIED].bias.data = bias.to(layer.lora_B[LIVE].weight)
            layer.scaling[CARRIED] = 1.0
    _train_only(adapter)


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _extra_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module.modules_to_save[LIVE]
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def _peft_config(config: LinkConfig, **overrides: Any) -> peft.LoraConfig:
    keys: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_bias": config.lora_bias,
        "target_modules": _listed(config.target_modules),
        "exclude_modules": _listed(config.exclude_modules),
        "modules_to_save": list(config.extra_modules) or None,
        "task_type": "CAUSAL_LM",
    }
    return peft.LoraConfig(**keys | overrides)


def _listed(value: tuple[str, ...] | str | None) -> list[str] | str | None:
    return list(value) if isinstance(value, tuple) else value


def check_targets(model: nn.Module, config: LinkConfig) -> None:
    """Raise ModelError if a link's modules match nothing, or what they match cannot be linked and merged."""
    matched = matched_modules(model, config)
    if not matched:
        raise ModelError(
            f"`target_modules` must match at least one module (got {_listed(config.target_modules)}"
            f"{f' without {_listed(config.exclude_modules)}' if config.exclude_modules else ''}); candidates: "
            f"{', '.join(target_candidates(model))}, or all-linear"
        )
    head, embedding = _tied(model)
    for name, module in matched.items():
        if not isinstance(module, nn.Linear | Conv1D):
            raise ModelError(
                f"only Linear and Conv1D layers can be linked (got {type(module).__name__} at {name}); "
                f"candidates: {', '.join(target_candidates(model))}"
            )
        if not module.weight.is_floating_point():
            raise ModelError(
                f"a quantised layer cannot be linked yet (got {type(module).__name__} of {module.weight.dtype} at "
                f"{name}); load the model in float32 or bfloat16"
            )
        if module is head:
            raise ModelError(
                f"`target_modules` must not name a head tied to the input embedding (got {name}): its "
                "merge would change the embedding too; exclude it, or untie the weights"
            )
        if config.lora_bias and module.bias is None:
            raise ModelError(
                f"`lora_bias` needs a bias in the layer it is merged into (got {name} without one); "
                "set lora_bias: false"
            )
    if isinstance(config.target_modules, tuple):
        unmatched = [t for t in config.target_modules if not any(_named(name, t) for name in matched)]
        if unmatched:
            raise ModelError(
                f"every name in `target_modules` must match (got {unmatched[0]!r}, which matches "
                f"nothing); candidates: {', '.join(target_candidates(model))}"
            )
    for extra in config.extra_modules:
        found = _named_modules(model, (extra,))
        if not found:
            known = dict.fromkeys(name.rpartition(".")[2] for name, _ in model.named_modules() if name)
            named = ", ".join(name for name in known if not name.isdigit())
            raise ModelError(
                f"`extra_modules` must match a module (got {extra!r}, which matches nothing); known: {named}"
            )
        if any(module in (head, embedding) for _, module in found):
            raise ModelError(
                f"`extra_modules` must not name a tied head or embedding (got {extra!r}): training one "
                "would change the other; untie the weights first"
            )


def _named_modules(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if any(_named(path, name) for name in names)]


def matched_modules(model: nn.Module, config: LinkConfig) -> dict[str, nn.Module]:
    """Return the modules a link would adapt, by path, as PEFT itself picks them (for `all-linear`: not the head)."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resolved = _maybe_include_all_linear_layers(_peft_config(config), model)
    return {
        name: module
        for name, module in model.named_modules()
        if name and check_target_module_exists(resolved, name)
    }


def _named(path: str, last: str) -> bool:
    return path == last or path.endswith("." + last)


def _tied(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """Return (head, embedding) when they share one weight, else (None, None)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if head is None or embedding is None or head.weight is not embedding.weight:
        return None, None
    return head, embedding


def save_adapter(
    directory: Path,
    factors: Mapping[str, Factors],
    config: LinkConfig,
    *,
    rank: int,
    alpha: float,
    base: str,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an ordinary PEFT adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

    `rank` and `alpha` are of the stored factors (a PiSSA link stores twice its tuned rank). `extra` maps
    parameter paths of trained extra modules to their weights.
    """
    tensors: dict[str, Tensor] = {}
    for name, share in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = share.a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = share.b.contiguous()
        if share.bias is not None:
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = share.bias
        if share.magnitude is not None:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = share.magnitude
    for path, weight in (extra or {}).items():
        tensors[f"{_PREFIX}{path}"] = weight.contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    written = _peft_config(
        config,
        r=rank,
        lora_alpha=alpha,
        base_model_name_or_path=base,
        inference_mode=True,
        target_modules=sorted(factors),
        exclude_modules=None,
        modules_to_save=sorted({path.rpartition(".")[0] for path in extra or {}}) or None,
        init_lora_weights=True,
    )
    written.save_pretrained(str(directory))


def load_adapter(directory: Path) -> tuple[dict[str, Factors], dict[str, Tensor], dict[str, Any]]:
    """Read a saved adapter: factors by module, extra weights by parameter path, and its PEFT config as a dict."""
    try:
        tensors = load_file(directory / "adapter_model.safetensors")
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"a link must be a whole PEFT adapter (got {directory}: {error}); the run directory is half there"
        ) from None
    except Exception as error:  # safetensors raises its own class for a truncated file
        raise RunError(
            f"a link's weights must be readable (got {directory}: {error}); the run directory is half there: copy it "
            "whole, or train anew"
        ) from None
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    factors = {}
    for name in modules:
        factors[name] = Factors(
            tensors.pop(f"{name}.lora_A.weight").float(),
            tensors.pop(f"{name}.lora_B.weight").float(),
            tensors.pop(f"{name}.lora_B.bias", None),
            tensors.pop(f"{name}.lora_magnitude_vector", None),
        )
    return factors, tensors, config
