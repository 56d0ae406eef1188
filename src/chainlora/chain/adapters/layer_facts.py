"""Properties of layers that decide whether a link can adapt them.

These are the kind, sizes and forward of a layer, whether it shares its weight, whether the model
calls it, and whether PEFT has a LoRA for it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chainlora.models.modes import in_mode, kept_random_state
from chainlora.models.quantizing import is_packed, is_quantized
from chainlora.models.shards import local

_CALLED: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def is_linear(module: nn.Module) -> bool:
    """Return whether a layer is a Linear or Conv1D, or a packed linear layer (GPTQ, AWQ)."""
    return isinstance(module, nn.Linear | Conv1D) or is_packed(module)


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module stores its weight as [in, out], as GPT-2's Conv1D does."""
    return isinstance(module, Conv1D)


def sizes(module: Any) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer."""
    if isinstance(module, Conv1D):
        first, second = module.weight.shape
        return first, second
    return module.in_features, module.out_features  # a quantised weight has another shape


def num_trained(rank: int, modules: Mapping[str, Any]) -> int:
    """Return the number of parameters of a LoRA of this rank on these layers."""
    return rank * sum(sum(sizes(module)) for module in modules.values())


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a subclass of Linear computes another function than ``x Wᵀ + c``.

    Examples are grouped and rounded layers. On the meta device only the output's shape is compared;
    the loaded model is checked again.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    if is_quantized(module):  # its forward only dequantises
        return False
    x = torch.linspace(-1, 1, 3 * module.in_features, dtype=module.weight.dtype)
    x = x.view(1, 3, -1).to(module.weight.device)
    try:
        with torch.no_grad():
            actual, plain = module(x), nn.functional.linear(x, module.weight, module.bias)
    except (RuntimeError, TypeError):
        return True
    if not isinstance(actual, Tensor) or actual.shape != plain.shape:
        return True
    return not (actual.is_meta or torch.allclose(actual, plain, 1e-3, 1e-3))


def why_no_lora(module: nn.Module) -> str | None:
    """Return why PEFT has no LoRA for a packed layer, or None if it has one."""
    with warnings.catch_warnings(action="ignore"):
        try:
            peft.LoraModel._create_new_module(peft.LoraConfig(), "probe", module, r=1, lora_alpha=1)
        except (ValueError, TypeError, ImportError) as error:
            return str(error).partition(". ")[0]
    return None


def why_no_lora_by_name(model: nn.Module, name: str) -> str | None:
    """Return why PEFT refuses a layer with this name (such as Mamba's `out_proj`), or None."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(peft.LoraConfig(), model, name.rpartition(".")[2])
    except ValueError as error:
        return str(error)
    return None


def stacked_experts(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those `names` that PEFT treats as projections of stacked experts.

    Transformers 5 stores the experts of Mixtral, DeepSeek and similar models in stacked parameters.
    PEFT applies a target such as ``gate_proj`` to them, even in layers with a plain Linear of that
    name. It does the same when it loads an adapter.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = set()
    for leaf in {name.rpartition(".")[2] for name in names}:
        config = peft.LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # one projection of an expert without the others
            taken.add(leaf)
        if leaf not in (config.target_modules or ()):
            taken.add(leaf)
    return {name for name in names if name.rpartition(".")[2] in taken}


def uncalled_modules(model: nn.Module, matched: Mapping[str, nn.Module]) -> set[str]:
    """Return the matched modules that the model never calls on text.

    A module counts as called if any module of its kind is, for example another expert.
    """
    called = _called_modules(model)
    if called is None:  # a model of other inputs
        return {name for name in matched if _is_read_by_attention(model, name)}
    kinds = {kind_of(name) for name in matched if name in called}
    return {name for name in matched if kind_of(name) not in kinds}


def _is_read_by_attention(model: nn.Module, name: str) -> bool:
    """Return whether torch's own attention contains a layer, whose weight it reads directly."""
    parent = model.get_submodule(name.rpartition(".")[0])
    attention = nn.MultiheadAttention
    return isinstance(parent, attention) and type(parent).forward is attention.forward


def kind_of(name: str) -> str:
    """Return a module's path with "*" for its numbers: equal for the same module of all layers."""
    return re.sub(r"\d+", "*", name)


def _called_modules(model: nn.Module) -> frozenset[str] | None:
    """Return the paths of modules that run in a forward pass on a few tokens; None if it fails."""
    if model not in _CALLED:
        seen: set[nn.Module] = set()
        ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
        has_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        keys = {"decoder_input_ids": ids} if has_decoder else {}
        try:
            with in_mode(model), kept_random_state(model), torch.no_grad(), ExitStack() as hooks:
                for module in model.modules():
                    hook = module.register_forward_pre_hook(lambda called, _: seen.add(called))
                    hooks.enter_context(hook)
                model(input_ids=ids, use_cache=False, **keys)
        except Exception:  # a later, real use of the model reports the error
            return None
        names = {name for name, module in model.named_modules() if module in seen}
        _CALLED[model] = frozenset(names)
    return _CALLED[model]


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Return, by path, another module with the same weight: writing one writes the other."""
    owners: dict[tuple[int, int], str] = {}
    shared: dict[str, str] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.device.type == "meta":
            continue
        if is_quantized(module):  # never written; its storage may be hidden
            continue
        weight = local(weight)
        if not weight.numel():
            continue
        place = (weight.untyped_storage().data_ptr(), int(weight.storage_offset()))
        if place in owners:
            shared[path] = owners[place]
            shared.setdefault(owners[place], path)
        else:
            owners[place] = path
    return shared


def tied_head(model: Any) -> nn.Module | None:
    """Return the model's head if it shares its weight with the embedding, else None."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None or embedding is None or weight is not embedding.weight:
        return None
    return head


# --- quantised bases ---


def prepare_quantized(model: Any) -> None:
    """Prepare a quantised model for links, in place, as PEFT does for a LoRA.

    Freezes all parameters. In a bitsandbytes model, parameters that are not quantised become
    float32 (embedding, norms, head), and so do hidden states and logits; quantised layers keep
    their compute dtype. Models of other kinds of quantisation keep their dtype.
    """
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
