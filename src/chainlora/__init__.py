"""Chain of LoRA fine-tuning (arXiv 2401.04151): tune a LoRA, tie a knot, extend the chain.

`Chain` has the steps of the method as methods; `train` runs a whole config. Names are imported on
first use, so that importing the package takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_MODULES = {  # module of each public name
    "Chain": "chainlora.chain.chain",
    "Link": "chainlora.chain.link",
    "stack_links": "chainlora.chain.link",
    "LinkConfig": "chainlora.config.schema",
    "RunConfig": "chainlora.config.schema",
    "load_config": "chainlora.config.reading",
    "make_config": "chainlora.config.reading",
    "train": "chainlora.training.stages",
    "combine": "chainlora.evaluation.combination",
    "extend": "chainlora.training.stages",
    "add": "chainlora.training.stages",
    "rehearse": "chainlora.training.stages",
    "open_run": "chainlora.runs.addresses",
    "mix_stages": "chainlora.runs.changes",
    "undo": "chainlora.runs.changes",
    "redo": "chainlora.runs.changes",
    "log": "chainlora.runs.changes",
    "stage_matrix": "chainlora.evaluation.stage_scores",
    "TrainResult": "chainlora.training.result",
    "carry_moments": "chainlora.knots.moments",
    "ChainCallback": "chainlora.integrations.callback",
    "evaluate_task": "chainlora.evaluation.scoring",
    "save_chain": "chainlora.runs.saved_chain",
    "load_chain": "chainlora.runs.loading_start",
    "load_run": "chainlora.runs.opening",
    "Naming": "chainlora.runs.cards",
    "export_adapter": "chainlora.runs.export",
    "export_merged": "chainlora.runs.export",
    "inspect_run": "chainlora.runs.inspection",
    "diff": "chainlora.evaluation.difference",
    "load_model": "chainlora.models.loading",
    "load_task": "chainlora.data.tasks",
    "list_tasks": "chainlora.data.tasks",
    "ChainLoRAError": "chainlora.errors",
}

__all__ = ["__version__", *sorted(_MODULES)]

if TYPE_CHECKING:
    from chainlora.chain.chain import Chain as Chain
    from chainlora.chain.link import Link as Link
    from chainlora.chain.link import stack_links as stack_links
    from chainlora.config.reading import load_config as load_config
    from chainlora.config.reading import make_config as make_config
    from chainlora.config.schema import LinkConfig as LinkConfig
    from chainlora.config.schema import RunConfig as RunConfig
    from chainlora.data.tasks import list_tasks as list_tasks
    from chainlora.data.tasks import load_task as load_task
    from chainlora.errors import ChainLoRAError as ChainLoRAError
    from chainlora.evaluation.combination import combine as combine
    from chainlora.evaluation.difference import diff as diff
    from chainlora.evaluation.scoring import evaluate_task as evaluate_task
    from chainlora.evaluation.stage_scores import stage_matrix as stage_matrix
    from chainlora.integrations.callback import ChainCallback as ChainCallback
    from chainlora.knots.moments import carry_moments as carry_moments
    from chainlora.models.loading import load_model as load_model
    from chainlora.runs.addresses import open_run as open_run
    from chainlora.runs.cards import Naming as Naming
    from chainlora.runs.changes import log as log
    from chainlora.runs.changes import mix_stages as mix_stages
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
    from chainlora.training.stages import extend as extend
    from chainlora.training.stages import rehearse as rehearse
    from chainlora.training.stages import train as train


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'chainlora' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
