"""Training loops of methods that chainlora does not train; a preset names its own by `loop`.

`full` is full fine-tuning: rows, batches, optimizer, schedule and evaluations are those of a run,
and every step updates all weights of the plain model. The weights are not kept.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from chainlora import RunConfig
from chainlora.config.data import DataConfig
from chainlora.training.optimizers import from_groups
from chainlora.training.result import TrainResult, evaluate_point, finish
from chainlora.training.run import Run
from chainlora.training.stages import train_run
from chainlora.training.step import rate_factor, steps_ahead, update
from chainlora_lab.protocol import CellData

logger = logging.getLogger(__name__)


class CellConfig(RunConfig):
    """The config of a cell: that of a run, and the loop that trains it instead of chainlora's.

    Of a sequence of data sets, it is that of the first of its `stages` (`sequences`): names and
    whole configs. `way` says how they are learned, `settings` are what that takes.
    """

    data: CellData
    loop: Literal["full"] | None = None
    way: str | None = None
    settings: dict[str, Any] = Field(default={})
    stages: tuple[tuple[str, RunConfig], ...] = ()

    @model_validator(mode="after")
    def _check_loop(self) -> CellConfig:
        refused = {
            "quantize": self.quantize is not None,
            "train.dtype: bfloat16": self.train.dtype != "float32",
            "train.keep_best: true": self.train.keep_best,
        }
        if self.settings and self.way is None:
            rule, got = "`settings` are those of a way to add data sets", ", ".join(self.settings)
            raise ValueError(f"{rule} (got {got}); for ranks, give recipe.ranks")
        if self.loop is not None and any(refused.values()):
            got = ", ".join(key for key, is_set in refused.items() if is_set)
            rule = f"`loop: {self.loop}` trains float32 weights and keeps no best point"
            raise ValueError(f"{rule} (got {got}); leave it out")
        return self

    @property
    def plain(self) -> RunConfig:
        """Return the config of the run alone, on files of rows."""
        tree = self.model_dump(exclude={"loop", "way", "settings", "stages"})
        tree["data"] = {key: tree["data"][key] for key in DataConfig.model_fields}
        return RunConfig(**tree)

    @property
    def has_validation(self) -> bool:
        return self.data.is_drawn or super().has_validation

    @property
    def parts(self) -> list[RunConfig]:
        """Return the configs of all stages, which are this one where there are no others."""
        return [config for _, config in self.stages] or [self]


def fine_tune(config: RunConfig) -> TrainResult:
    """Train every weight for as many steps as the links of `config` have together."""
    assert config.output is not None
    if Path(config.output).exists():
        logger.warning("full fine-tuning cannot resume: %s starts over", config.output)
        shutil.rmtree(config.output)
    # fast paths take weights as frozen, and each of their threads has gradients of its own
    slow = config.model_copy(update={"train": config.train.model_copy(update={"speedups": "off"})})
    return train_run(slow, loop=_all_weights)


def _all_weights(run: Run) -> TrainResult:
    model, end = run.chain.model, run.batches.num_steps
    evaluate_point(run, "start")
    model.requires_grad_(True)
    optimizer = from_groups([{"params": [*model.parameters()], "ratio": 1.0}], run.train)
    with closing(steps_ahead(run, 0, end)) as steps:
        for work in steps:
            update(run, work, optimizer, rate_factor(run.train, run.batches.lengths, work.step))
            run.last_scored = None
            every, step = run.train.eval_every, run.progress.step
            if every and step % every == 0 and step < end:
                evaluate_point(run, "step")
            if run.progress.stopped:  # by `early_stop`
                break
    model.requires_grad_(False)
    evaluate_point(run, "knot")
    result = finish(run)
    result["trainable_parameters"] = sum(p.numel() for p in model.parameters())
    return result
