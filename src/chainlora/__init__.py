"""Chain of LoRA fine-tuning (arXiv 2401.04151): tune a LoRA, tie a knot, extend the chain.

`Chain` has the steps of the method as methods; `train` runs a whole config. Names are imported on
first use, so that importing the package takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_NAMES = {  # the public names of each module
    "chainlora.chain.chain": ("Chain",),
    "chainlora.chain.link": ("Link", "stack_links"),
    "chainlora.config.schema": ("LinkConfig", "RunConfig"),
    "chainlora.config.reading": ("load_config", "make_config"),
    "chainlora.training.stages": ("train", "extend", "add", "combine"),
    "chainlora.training.updating": ("update",),
    "chainlora.runs.addresses": ("open_run",),
    "chainlora.runs.changes": ("undo", "redo", "log"),
    "chainlora.evaluation.stage_scores": ("stage_matrix",),
    "chainlora.training.result": ("TrainResult",),
    "chainlora.knots.moments": ("carry_moments",),
    "chainlora_trainer.callback": ("ChainCallback",),
    "chainlora.evaluation.scoring": ("evaluate_task",),
    "chainlora.runs.saved_chain": ("save_chain",),
    "chainlora.runs.loading_start": ("load_chain",),
    "chainlora.runs.opening": ("load_run",),
    "chainlora.runs.cards": ("Naming",),
    "chainlora.runs.export": ("export_adapter", "export_merged"),
    "chainlora.runs.inspection": ("inspect_run",),
    "chainlora.evaluation.difference": ("diff",),
    "chainlora.models.loading": ("load_model",),
    "chainlora.data.tasks": ("load_task",),
    "chainlora.errors": ("ChainLoRAError",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULES)]

if TYPE_CHECKING:
    from chainlora.chain.chain import Chain as Chain
    from chainlora.chain.link import Link as Link
    from chainlora.chain.link import stack_links as stack_links
    from chainlora.config.reading import load_config as load_config
    from chainlora.config.reading import make_config as make_config
    from chainlora.config.schema import LinkConfig as LinkConfig
    from chainlora.config.schema import RunConfig as RunConfig
    from chainlora.data.tasks import load_task as load_task
    from chainlora.errors import ChainLoRAError as ChainLoRAError
    from chainlora.evaluation.difference import diff as diff
    from chainlora.evaluation.scoring import evaluate_task as evaluate_task
    from chainlora.evaluation.stage_scores import stage_matrix as stage_matrix
    from chainlora.knots.moments import carry_moments as carry_moments
    from chainlora.models.loading import load_model as load_model
    from chainlora.runs.addresses import open_run as open_run
    from chainlora.runs.cards import Naming as Naming
    from chainlora.runs.changes import log as log
    from chainlora.runs.changes import redo as redo
    from chainlora.runs.changes import undo as undo
    from chainlora.runs.export import export_adapter as export_adapter
    from chainlora.runs.export import export_merged as export_merged
    from chainlora.runs.inspection import inspect_run as inspect_run
    from chainlora.runs.loading_start import load_chain as load_chain
    from chainlora.runs.opening import load_run as load_run
    from chainlora.runs.saved_chain import save_chain as save_chain
    from chainlora.training.result import TrainResult as TrainResult
    from chainlora.training.stages import add as add
    from chainlora.training.stages import combine as combine
    from chainlora.training.stages import extend as extend
    from chainlora.training.stages import train as train
    from chainlora.training.updating import update as update
    from chainlora_trainer.callback import ChainCallback as ChainCallback


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'chainlora' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
