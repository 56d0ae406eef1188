"""Chain of LoRA fine-tuning (arXiv 2401.04151): tune a LoRA, tie a knot, extend the chain.

The heart is `Chain` with its verbs; `train` runs a whole config. Names load on first use, so that importing the
package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Chain": "chain", "Link": "chain", "extend_chain": "chain", "tune_link": "chain", "tie_knot": "chain",
    "fit_chain": "chain", "live_link": "chain", "add_link": "chain", "drop_links": "chain", "discard_link": "chain",
    "stack_links": "chain", "LinkConfig": "config", "RunConfig": "config", "load_config": "config",
    "make_config": "config", "train": "training", "evaluate_task": "scoring", "load_run": "export",
    "export_adapter": "export", "export_merged": "export", "inspect_run": "inspection", "load_model": "models",
    "load_task": "tasks", "list_tasks": "tasks", "ChainLoRAError": "errors",
}

__all__ = ["__version__", *sorted(_WHERE)]

if TYPE_CHECKING:
    from .chain import (
        Chain as Chain,
    )
    from .chain import (
        Link as Link,
    )
    from .chain import (
        add_link as add_link,
    )
    from .chain import (
        discard_link as discard_link,
    )
    from .chain import (
        drop_links as drop_links,
    )
    from .chain import (
        extend_chain as extend_chain,
    )
    from .chain import (
        fit_chain as fit_chain,
    )
    from .chain import (
        live_link as live_link,
    )
    from .chain import (
        stack_links as stack_links,
    )
    from .chain import (
        tie_knot as tie_knot,
    )
    from .chain import (
        tune_link as tune_link,
    )
    from .config import LinkConfig as LinkConfig
    from .config import RunConfig as RunConfig
    from .config import load_config as load_config
    from .config import make_config as make_config
    from .errors import ChainLoRAError as ChainLoRAError
    from .export import export_adapter as export_adapter
    from .export import export_merged as export_merged
    from .export import load_run as load_run
    from .inspection import inspect_run as inspect_run
    from .models import load_model as load_model
    from .scoring import evaluate_task as evaluate_task
    from .tasks import list_tasks as list_tasks
    from .tasks import load_task as load_task
    from .training import train as train




def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'chainlora' has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
