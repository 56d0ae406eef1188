"""Which modules a link adapts: PEFT's own matching, and every refusal a chain needs on top of
it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chainlora.config.schema import LinkConfig
from chainlora.config.time_limit import time_limit
from chainlora.errors import ModelError
from chainlora.models.modes import evaluation_mode, kept_random_state
from chainlora.models.quantizing import is_packed, is_quantized
from chainlora.models.shards import is_shard, local, whole_shape

log = logging.getLogger(__name__)

_SAID: WeakSet[nn.Module] = WeakSet()

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_PATTERN_SECONDS = 10.0  # matching 10,000 module names takes 0.05 s


def peft_config(config: LinkConfig, **overrides: Any) -> peft.LoraConfig:
    """Return PEFT's config of a link."""
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
    }
    return peft.LoraConfig(**keys | overrides)


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's name of what a model is for, None where it has none."""
    name = type(model).__name__
    for ending, task in _TASKS.items():
        if name.endswith(ending):
            return task
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return None
    if not model.config.is_encoder_decoder:
        return "CAUSAL_LM"
    # PEFT's model of this task takes token ids and nothing else: not Whisper's
    return "SEQ_2_SEQ_LM" if model.main_input_name == "input_ids" else None


def _listed(value: tuple[str, ...] | str | None) -> list[str] | str | None:
    return list(value) if isinstance(value, tuple) else value


def target_candidates(model: nn.Module) -> list[str]:
    """Return the last path parts of all layers that can be linked, most frequent first, for
    `target_modules`."""
    counts: dict[str, int] = {}
    head, _ = _tied(model)
    for name, module in model.named_modules():
        if _is_linear(module) and module is not head:
            last = name.rpartition(".")[2]
            counts[last] = counts.get(last, 0) + 1
    return sorted(counts, key=lambda last: (-counts[last], last))


def check_targets(model: nn.Module, config: LinkConfig) -> None:
    """Raise ModelError if a link's modules match nothing, or what they match cannot be linked and
    merged."""
    matched = matched_modules(model, config)
    _check_names(model, config, matched)
    head, embedding = _tied(model)
    shared = _shared_with(model)
    fused = _stacked_experts(model, matched)
    uncalled = _uncalled(model, matched)
    for name, module in matched.items():
        _check_kind(model, name, module)
        if module is head or module is embedding:
            raise ModelError(
                "`target_modules` must not name a head or embedding that are tied (got "
                f"{name}): its merge would change the other too; exclude it, or untie the weights"
            )
        if name in shared:
            raise ModelError(
                "`target_modules` must not match layers that share their weights (got "
                f"{name} and {shared[name]}): each would have an update of its own, and one weight "
                f"cannot hold both; add {name.rpartition('.')[2]!r} to exclude_modules"
            )
        if name in fused:
            raise ModelError(
                f"stacked experts cannot be linked (got {name}, which PEFT takes for a projection "
                "of experts that share one parameter); leave it out, or use all-linear"
            )
        _check_settings(config, name, module)
    if idle := _idle_target(config, matched, uncalled):
        raise ModelError(
            f"the model must call the layers that are adapted (got {idle}, whose weight it reads "
            f"directly, or not at all on text); candidates: {', '.join(target_candidates(model))}"
        )
    for extra in config.extra_modules:
        _check_extra(model, extra, (head, embedding))


def _check_names(model: nn.Module, config: LinkConfig, matched: Mapping[str, nn.Module]) -> None:
    """Raise unless something matches, and every name that is listed does."""
    candidates = ", ".join(target_candidates(model))
    if not matched:
        without = f" without {_listed(config.exclude_modules)}" if config.exclude_modules else ""
        raise ModelError(
            "`target_modules` must match at least one module "
            f"(got {_listed(config.target_modules)}{without}); candidates: {candidates}, or "
            "all-linear"
        )
    names = config.target_modules if isinstance(config.target_modules, tuple) else ()
    trained_whole = inside(model, config.extra_modules)
    for target in names:
        if not any(_named(name, target) for name in (*matched, *trained_whole)):
            raise ModelError(
                f"every name in `target_modules` must match (got {target!r}, which matches "
                f"nothing); candidates: {candidates}"
            )


def _check_kind(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise unless a layer is a plain linear map, of states or tokens, that PEFT has a LoRA for."""
    if not _is_linear(module) and not isinstance(module, nn.Embedding):
        raise ModelError(
            f"only Linear, Conv1D and Embedding layers can be linked (got "
            f"{type(module).__name__} at {name}); candidates: "
            f"{', '.join(target_candidates(model))}"
        )
    if is_packed(module) and (reason := _refused(module)):
        raise ModelError(
            f"PEFT must have a LoRA for each layer (got {type(module).__name__} at {name}: "
            f"{reason}); install what PEFT needs for it (GPTQ and AWQ: gptqmodel and optimum), or "
            "take the checkpoint before quantisation, with quantize: nf4"
        )
    if isinstance(module, nn.Embedding):
        _check_embedding(name, module)
        return
    if _has_own_forward(module):
        raise ModelError(
            f"only layers that compute x Wᵀ + c can be linked (got {type(module).__name__} at "
            f"{name}, which computes something else); leave it out, or use all-linear"
        )
    if reason := _incompatible(model, name):
        raise ModelError(f"PEFT must have a LoRA for each layer (got {name}: {reason})")


def _check_embedding(name: str, module: nn.Embedding) -> None:
    """Raise unless an embedding looks up rows of its weight, and holds all of them."""
    kind = type(module).__name__
    if is_shard(module.weight):
        raise ModelError(
            f"an embedding that processes share cannot be linked (got {kind} at {name}); leave it "
            "out, or let each process hold the whole model"
        )
    if module.max_norm is not None or module.sparse or not _looks_up(module):
        raise ModelError(
            "an embedding that is linked must look up rows of its weight and do no more (got "
            f"{kind} at {name}, with max_norm, sparse gradients or a forward of its own); leave it "
            "out"
        )


def _looks_up(module: nn.Embedding) -> bool:
    """Say whether a forward is a look-up, times `embed_scale` where there is one, as in PEFT."""
    if type(module).forward is nn.Embedding.forward:
        return True
    ids = torch.arange(min(3, module.num_embeddings), device=module.weight.device)[None]
    try:
        with torch.no_grad():
            own, rows = module(ids), nn.functional.embedding(ids, module.weight)
    except (RuntimeError, TypeError):
        return False
    rows = rows * getattr(module, "embed_scale", 1.0)
    return isinstance(own, Tensor) and own.shape == rows.shape and torch.allclose(own, rows)


def _check_settings(config: LinkConfig, name: str, module: Any) -> None:
    """Raise if a link's initialization or bias does not suit a layer."""
    if isinstance(module, nn.Embedding):
        _check_embedding_settings(config, name)
        return
    shorter = _shorter_side(module)
    if config.init in ("gradient", "pissa") and config.rank > shorter:
        raise ModelError(
            f"`init: {config.init}` takes singular directions, of which a layer has as many as its "
            f"shorter side (got rank {config.rank} for {shorter} at {name}); lower the rank or use "
            "init: kaiming"
        )
    if config.lora_bias and getattr(module, "bias", None) is None:
        raise ModelError(
            f"`lora_bias` needs a bias in the layer it is merged into (got {name} without one); "
            "set lora_bias: false"
        )


def _check_embedding_settings(config: LinkConfig, name: str) -> None:
    chosen = {"dora": config.dora, "lora_bias": config.lora_bias}
    chosen |= {f"init: {config.init}": config.init in ("gradient", "pissa")}
    if found := [key for key, is_set in chosen.items() if is_set]:
        raise ModelError(
            f"an embedding takes a plain LoRA (got {found[0]} with {name} in target_modules); "
            "leave one of them out"
        )


def _check_extra(model: nn.Module, extra: str, tied: tuple[nn.Module | None, ...]) -> None:
    """Raise if the extra modules of a name are not there, or cannot be trained by themselves."""
    found = named_modules(model, (extra,))
    if not found:
        known = dict.fromkeys(name.rpartition(".")[2] for name, _ in model.named_modules() if name)
        named = ", ".join(name for name in known if not name.isdigit())
        raise ModelError(
            f"`extra_modules` must match a module (got {extra!r}, which matches nothing); "
            f"known: {named}"
        )
    if any(is_quantized(part) for _, module in found for part in module.modules()):
        raise ModelError(
            f"`extra_modules` must not name quantised layers (got {extra!r}): they cannot be "
            "trained; leave it out"
        )
    if any(module in tied for _, module in found):
        raise ModelError(
            f"`extra_modules` must not name a tied head or embedding (got {extra!r}): training one "
            "would change the other; untie the weights first"
        )


def check_mergeable(model: nn.Module, config: LinkConfig) -> None:
    """Raise ModelError if a link adapts a layer that cannot be merged into without loss."""
    for name, module in matched_modules(model, config).items():
        if is_quantized(module):
            raise ModelError(
                f"a quantised layer cannot hold merged links (got {type(module).__name__} at "
                f"{name}); use hold: carried"
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) or is_packed(module)


def _refused(module: nn.Module) -> str | None:
    """Return why PEFT has no LoRA for a layer that shows no weight, None where it has one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peft.LoraModel._create_new_module(peft.LoraConfig(), "probe", module, r=1, lora_alpha=1)
        except (ValueError, TypeError, ImportError) as error:
            return " ".join(str(error).partition(". ")[0].split())
    return None


def _shorter_side(module: Any) -> int:
    if isinstance(module, Conv1D | nn.Embedding):
        return min(whole_shape(module.weight))
    return min(module.in_features, module.out_features)  # a quantised weight has another shape


def named_modules(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of all modules whose path is, or ends in, one of `names`."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if any(_named(path, name) for name in names)
    ]


def trained_module(path: str, config: LinkConfig) -> str:
    """Return the extra module that a parameter belongs to, by path; it may lie deep inside.

    What PEFT trains because its path ends like another's (`pre_classifier`, `classifier`) is a
    module of its own.
    """
    parts = path.split(".")[:-1]
    for size in range(1, len(parts) + 1):
        module = ".".join(parts[:size])
        if any(_named(module, name) for name in config.extra_modules):
            return module
    return ".".join(parts)


def inside(model: nn.Module, names: tuple[str, ...]) -> set[str]:
    """Return the paths of the modules that `named_modules` finds, and of all within them."""
    return {
        f"{path}.{below}".rstrip(".")
        for path, module in named_modules(model, names)
        for below, _ in module.named_modules()
    }


def matched_modules(model: nn.Module, config: LinkConfig) -> dict[str, nn.Module]:
    """Return the modules a link would adapt, by path, as PEFT itself picks them.

    What `extra_modules` trains whole is not adapted as well.

    ``all-linear`` is every Linear and Conv1D layer but the head, and but those where a LoRA would
    do nothing or PEFT has none: layers that the model never calls on text (vision towers, weights
    that are read directly), and names that PEFT takes for stacked experts. Linear layers that show
    no weight (GPTQ, AWQ) count among them, which PEFT itself leaves out.
    """
    from peft.tuners.tuners_utils import (
        _maybe_include_all_linear_layers,
        check_target_module_exists,
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resolved: Any = _maybe_include_all_linear_layers(peft_config(config), model)
    takes_all = str(config.target_modules).lower() == "all-linear"
    if takes_all:
        resolved.target_modules |= {n for n, module in model.named_modules() if is_packed(module)}
    trained_whole = inside(model, config.extra_modules)
    with time_limit(_PATTERN_SECONDS, lambda: _endless(config)):
        matched = {
            name: module
            for name, module in model.named_modules()
            if name and name not in trained_whole and check_target_module_exists(resolved, name)
        }
    if not takes_all:
        return matched
    left_out = _stacked_experts(model, matched) | _uncalled(model, matched)
    left_out |= {name for name in matched if _incompatible(model, name)}
    left_out |= {name for name, module in matched.items() if _has_own_forward(module)}
    _say(model, left_out)
    return {name: module for name, module in matched.items() if name not in left_out}


def _endless(config: LinkConfig) -> ModelError:
    return ModelError(
        "`target_modules` and `exclude_modules` must match in "
        f"{_PATTERN_SECONDS:g} s (got no end of {config.target_modules!r}, "
        f"{config.exclude_modules!r}); avoid a repeat inside a repeat, such as (.*)*"
    )


def _say(model: nn.Module, left_out: set[str]) -> None:
    """Log once a model which layers a link on all of them does without."""
    if model in _SAID:
        return
    _SAID.add(model)
    if left_out:
        kinds = sorted({_kind(name) for name in left_out})
        log.warning("all-linear leaves out %d layers: %s", len(left_out), ", ".join(kinds))
    stacked = {
        _kind(name)
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        and any(p.dim() == 3 for p in module.parameters(recurse=False))
    }
    if stacked:
        log.warning("all-linear leaves out stacked parameters: %s", ", ".join(sorted(stacked)))


def _has_own_forward(module: nn.Module) -> bool:
    """Say whether a subclass of Linear computes anything but ``x Wᵀ + c`` (grouped, rounded)."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    if is_quantized(module):  # it dequantises first
        return False
    x = torch.linspace(-1, 1, 3 * module.in_features, dtype=module.weight.dtype)
    x = x.view(1, 3, -1).to(module.weight.device)
    try:
        with torch.no_grad():
            own, plain = module(x), nn.functional.linear(x, module.weight, module.bias)
    except (RuntimeError, TypeError):
        return True
    if not isinstance(own, Tensor) or own.shape != plain.shape:
        return True
    return not torch.allclose(own, plain, rtol=1e-3, atol=1e-3)


def _incompatible(model: nn.Module, name: str) -> str | None:
    """Return why PEFT refuses a layer of this name (Mamba's `out_proj`), None where it does not."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(peft.LoraConfig(), model, name.rpartition(".")[2])
    except ValueError as error:
        return str(error)
    return None


def _idle_target(
    config: LinkConfig, matched: Mapping[str, nn.Module], uncalled: set[str]
) -> str | None:
    """Return a module of a target whose matches are none of them called, None if there is none."""
    targets = config.target_modules
    for target in targets if isinstance(targets, tuple) else ("",):
        mine = [name for name in matched if not target or _named(name, target)]
        if mine and uncalled.issuperset(mine):
            return mine[0]
    return None


def _stacked_experts(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return which of `names` PEFT takes for projections of experts.

    Transformers 5 holds the experts of Mixtral, DeepSeek and their like in stacked parameters. PEFT
    reads a target such as ``gate_proj`` as theirs, in layers too that have a plain Linear of that
    name, and reads an adapter from disk in the same way.
    """
    leaves = {name.rpartition(".")[2] for name in names}
    taken = {leaf for leaf in leaves if _is_of_experts(model, leaf)}
    return {name for name in names if name.rpartition(".")[2] in taken}


def _is_of_experts(model: nn.Module, leaf: str) -> bool:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = peft.LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # one projection of an expert without the others
        return True
    return leaf not in (config.target_modules or ())


def _uncalled(model: nn.Module, matched: Mapping[str, nn.Module]) -> set[str]:
    """Return which modules a model never calls on text, none of their kind being called either.

    Of experts only some see a token; they count as called where one of the same place is.
    """
    called = _called_modules(model)
    if called is None:
        return set()
    kinds = {_kind(name) for name in matched if name in called}
    return {name for name in matched if _kind(name) not in kinds}


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


_CALLED: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def _called_modules(model: nn.Module) -> frozenset[str] | None:
    """Return the paths of modules that run in a forward over a few tokens; None if it fails."""
    if model not in _CALLED:
        seen: set[nn.Module] = set()
        handles = [
            module.register_forward_pre_hook(lambda each, _: seen.add(each))
            for module in model.modules()
        ]
        device = next(model.parameters()).device
        try:
            with evaluation_mode(model), kept_random_state(model), torch.no_grad():
                ids = torch.arange(1, 9, device=device)[None]
                both = _is_encoder_decoder(model)
                model(
                    input_ids=ids, use_cache=False, **({"decoder_input_ids": ids} if both else {})
                )
        except Exception:  # a model that cannot run is refused where it is to run
            return None
        finally:
            for handle in handles:
                handle.remove()
        names = {name for name, module in model.named_modules() if module in seen}
        _CALLED[model] = frozenset(names)
    return _CALLED[model]


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _shared_with(model: nn.Module) -> dict[str, str]:
    """Return, by path, another module that holds the same weight: writing one writes the other."""
    owners: dict[tuple[int, int], str] = {}
    shared: dict[str, str] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.device.type == "meta":
            continue
        if is_quantized(module):  # never written, and its storage may be hidden
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


def _named(path: str, last: str) -> bool:
    return path == last or path.endswith("." + last)


def _tied(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """Return (head, embedding) when they share one weight, else (None, None)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None or embedding is None or weight is not embedding.weight:
        return None, None
    return head, embedding
