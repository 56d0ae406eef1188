"""Ours, as a user has it: `chainlora.training.loop.train` on a config, watched by a listener."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from measuring import Steps, peak_mb

from chainlora.config.reading import make_config
from chainlora.config.schema import RunConfig
from chainlora.training.stages import train_run as train


def config_of(spec: Mapping[str, Any]) -> RunConfig:
    """Return the run's config: rows of a task, or a file of prompts and completions or of
    messages."""
    files, links = spec["files"], spec.get("links", 1)
    data = {"train": files["rows"]}
    if task := files.get(f"task_{spec['objective']}"):
        data["task"] = task
    unit = "steps" if "steps" in spec else "epochs"
    return make_config(
        {
            "model": spec["model"],
            "data": data,
            "chain": {
                "ranks": [spec["rank"]] * links,
                "alpha": spec["alpha"],
                "target_modules": spec["targets"],
                unit: [spec[unit]] * links,
            },
            "train": {
                "lr": spec["lr"],
                "batch_size": spec["batch_size"],
                "seed": spec["seed"],
                "dtype": spec["dtype"],
                "loss": "dpo" if spec["objective"] == "dpo" else None,
                "gradient_checkpointing": spec.get("gradient_checkpointing", False),
            },
        }
    )


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Train; also say what a knot took: from the end of a link's last step to the start of the next
    one's first."""
    steps, peaks, gaps, seconds = Steps(), [], [], []
    tokens = link = 0

    def listen(record: Mapping[str, Any]) -> None:
        nonlocal tokens, link
        if record["event"] != "step":
            return
        steps.mark()
        steps.losses.append(record["loss"])
        seconds.append(record["seconds"])
        tokens += record["tokens"]
        if record["link"] != link:
            gaps.append(steps.times[-1] - steps.times[-2] - record["seconds"])
        link = record["link"]
        peaks.append(round(peak_mb(), 1))

    train(config_of(spec), listener=listen)
    measures = steps.result(spec["num_rows"] * spec["epochs"]) | {"tokens": tokens}
    if "steps" in spec:
        measures["seconds_per_step"] = statistics.median(seconds)
    if gaps:
        measures |= {
            "seconds_per_knot": statistics.median(gaps),
            "knot_seconds": [round(gap, 4) for gap in gaps],
            "share_of_100_steps": statistics.median(gaps) / (100 * statistics.median(seconds)),
            "peak_before_first_knot_mb": peaks[spec["steps"] - 1],
            "peak_after_knots_mb": peaks[-1],
        }
    return measures
