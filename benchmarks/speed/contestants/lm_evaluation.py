"""lm-eval: HFLM on a local multiple-choice task, by `simple_evaluate`.

Only its `loglikelihood` call is timed: building the task, and metrics, are left out of its time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

BATCH_SIZE = 8  # sorted by length, as lm-eval does; larger batches were no faster here


class TimedHFLM(HFLM):
    """HFLM that notes how long its scoring took."""

    seconds = 0.0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        began = time.perf_counter()
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self.seconds += time.perf_counter() - began
        return answers


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Score the rows of a task."""
    with open(spec["files"]["ordered"], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    model = TimedHFLM(
        pretrained=spec["model"], device="cpu", dtype=spec["dtype"], batch_size=BATCH_SIZE
    )
    task = {
        "task": "local",
        "custom_dataset": lambda **_: {"validation": Dataset.from_list(rows)},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "candidates",
        "doc_to_target": "label",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    found = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    scores = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    return {
        "rows_per_second": len(rows) / model.seconds,
        "seconds": model.seconds,
        "accuracy": found["results"]["local"]["acc,none"],
        "scores": scores,
    }
