"""Tasks: one small data file each, and what turns its rows into prompts.

    task_file.py  what a task file may say
    task.py       `Task`, `load_task`, `list_tasks`: rows as prompts with candidates or a completion
    sampling.py   the splits of a task on disk or on the Hub, and the samples a run draws from them

Adding a task is writing one YAML file; no Python is touched. The shipped files follow the MeZO
protocol (arXiv 2305.17333), which the chain-of-LoRA paper follows. See docs/tasks.md.
"""

from chainlora.data.tasks.sampling import (
    check_split_files,
    flat,
    sample_splits,
    split_source,
    unseen_source,
)
from chainlora.data.tasks.task import Rendered, Task, list_tasks, load_task
from chainlora.data.tasks.task_file import REPORTED_OF_TEXT, WORD_METRICS
