"""Tasks: a small data file per task, and the code that turns its rows into prompts.

To add a task, write one YAML file; no Python is needed. The shipped files follow the MeZO protocol
(arXiv 2305.17333), as the chain-of-LoRA paper does. See docs/tasks.md.
"""

from chainlora.data.tasks.sampling import (
    flat,
    sample_splits,
    split_files,
    split_source,
    unseen_source,
)
from chainlora.data.tasks.task import (
    REPORTED_OF_TEXT,
    WORD_METRICS,
    Rendered,
    Task,
    list_tasks,
    load_task,
)
