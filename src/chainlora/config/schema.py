"""What a run is: every key a config file or a keyword can set, with its default and its reason.

A config is frozen, refuses keys it does not know, and is complete once loaded: `None` means off. It
imports no tensor library, so that the command line can check a file in milliseconds. The keys of
`chain` are in `config.chain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from chainlora.config.chain import LENGTHS as LENGTHS
from chainlora.config.chain import ChainConfig as ChainConfig
from chainlora.config.chain import KnotConfig as KnotConfig
from chainlora.config.chain import LinkConfig as LinkConfig
from chainlora.config.chain import PlateauConfig as PlateauConfig
from chainlora.config.chat_templates import Argument, check_arguments, resolved_template
from chainlora.config.section import Section

_Beta = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(Section):
    """Where the rows come from: a task by name or file, or the user's own files."""

    task: str | None = None
    dir: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    format: Literal[
        "auto", "completion", "chat", "text", "sharegpt", "alpaca", "conversational"
    ] = "auto"
    chat_template: str | None = Field(
        None, description="a name, a file or a text; None: the tokenizer's own"
    )
    template_arguments: dict[str, Argument] = Field(
        {}, description="of the chat template, e.g. enable_thinking"
    )
    num_train: int | None = Field(None, ge=1)
    num_validation: int | None = Field(None, ge=1)
    num_test: int | None = Field(None, ge=1)
    data_seed: int = 0
    sampling: Literal["protocol", "saner"] = "protocol"
    max_length: int | None = Field(None, ge=2, description="tokens; None is the model's context")
    truncation: Literal["error", "left"] | None = Field(
        None, description="None: the task's own; files: error, and plain text is split into blocks"
    )
    shots: int = Field(0, ge=0, description="demonstrations before each prompt (in-context)")

    @field_validator("train", "validation", "test", mode="before")
    @classmethod
    def _one_source(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, list):
            return value
        if len(value) == 1:
            return value[0]
        raise ValueError(
            f"`data.{info.field_name}` must be one file, folder or Hub dataset (got "
            f"{len(value)}); put the rows into one file"
        )

    @field_validator("chat_template")
    @classmethod
    def _chat_template(cls, template: str | None) -> str | None:
        return None if template is None else resolved_template(template)

    @field_validator("template_arguments")
    @classmethod
    def _template_arguments(cls, arguments: dict[str, Argument]) -> dict[str, Argument]:
        check_arguments(arguments)
        return arguments

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.task is None and self.train is None and self.dir is None:
            raise ValueError(
                "`data` must name a `task` or a `train` file (got neither); e.g. data: {train: "
                "my.jsonl}"
            )
        if self.shots and self.task is None:
            raise ValueError(
                f"`data.shots` are demonstrations of a task (got {self.shots} for files without "
                "one); name a task, or leave it out"
            )
        if self.task is not None and self.train is not None and self.dir is not None:
            raise ValueError("`data.dir` and `data.train` exclude each other (got both); keep one")
        if self.task is not None and self.train is None and (self.validation or self.test):
            raise ValueError(
                "`data.validation` and `data.test` go with data.train (got a task whose rows are "
                "drawn); give data.train beside them, or leave them out"
            )
        return self


class TrainConfig(Section):
    """How a link is tuned.

    Defaults follow the paper where it speaks (AdamW, linear decay, batch 8).
    """

    lr: float = Field(1e-3, gt=0)
    lora_plus_ratio: float = Field(
        1.0, gt=0, description="learning rate of B over that of A (arXiv 2402.12354)"
    )
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    restart_schedule: bool = False
    warmup_steps: int = Field(0, ge=0)
    restart_warmup_steps: int | None = Field(
        None,
        ge=0,
        description="warm-up of later links; None: warmup_steps if the schedule restarts, else 0",
    )
    batch_size: int = Field(8, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    group_by_length: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(
        0, ge=0, lt=2**32, description="a step's generator is seeded with seed · 2³² + step"
    )
    optimizer: str = Field("adamw", description="a name in training.optimizers.OPTIMIZERS")
    optimizer_options: dict[str, bool | int | float | str | tuple[float | None, ...] | None] = (
        Field({}, description="further arguments of the optimizer, e.g. momentum")
    )
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    optimizer_reset: Literal["full", "prune"] = "full"
    prune_fraction: float = Field(
        0.99, ge=0, le=1, description="of the moments, by size (arXiv 2307.05695)"
    )
    eval_every: int | None = Field(None, ge=1, description="steps; None: at knots only")
    eval_at_knots: bool = Field(True, description="and at the start; the end is always evaluated")
    select_metric: str | None = Field(
        None, description="metric that picks the best point; None: the task's own"
    )
    keep_best: bool = False
    early_stop: int | None = Field(None, ge=1, description="evaluations without improvement")
    accept_links: Literal["all", "better"] = Field(
        "all",
        description="better: a link that does not lower the loss of validation rows by more than "
        "its standard error is dropped, and the chain ends",
    )
    save_every: int | None = Field(
        100, ge=1, description="steps between checkpoints; None: at knots only"
    )
    log_every: int | None = Field(
        None,
        ge=1,
        description="steps between lines of a log; None: a tenth of the run, or after a minute",
    )
    gradient_checkpointing: bool = False
    speedups: Literal["auto", "off"] = "auto"
    shard: Literal["fsdp2", "zero3"] | None = Field(
        None,
        description="fsdp2, zero3: the processes of a run share the model; None: each holds all",
    )
    trackers: tuple[str, ...] = ()

    @field_validator("speedups", mode="before")
    @classmethod
    def _speedups(cls, value: Any) -> Any:
        return ("auto" if value else "off") if isinstance(value, bool) else value  # YAML's off

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.optimizer_reset == "prune" and self.prune_fraction == 0:
            raise ValueError("`optimizer_reset: prune` needs prune_fraction above 0 (got 0)")
        if self.compares and not self.eval_at_knots:
            raise ValueError(
                "`keep_best`, `early_stop` and `accept_links` compare the knots (got "
                "eval_at_knots: false); leave it true"
            )
        if self.keep_best and self.accept_links == "better":
            raise ValueError(
                "`keep_best` and `accept_links: better` both choose what is kept (got both); leave "
                "one out"
            )
        return self

    @property
    def compares(self) -> bool:
        """Say whether the run decides by validation rows."""
        return self.keep_best or self.early_stop is not None or self.accept_links == "better"


class RunConfig(Section):
    """One run: model, data, chain, training, output."""

    model: str
    quantize: Literal["nf4", "int8"] | None = Field(
        None, description="bits of the base's linear layers; its links are carried"
    )
    data: DataConfig
    chain: ChainConfig = ChainConfig()
    train: TrainConfig = TrainConfig()
    output: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _model_section(cls, tree: Any) -> Any:
        """Take ``model: {name: …, quantize: nf4}`` for the two keys."""
        if not isinstance(tree, Mapping) or not isinstance(tree.get("model"), Mapping):
            return tree
        section = dict(tree["model"])
        if not {"name"} <= section.keys() <= {"name", "quantize"}:
            raise ValueError(
                "`model` must be a name, or a section of name and quantize (got "
                f"{', '.join(sorted(map(str, section)))})"
            )
        return dict(tree) | {"model": section.pop("name")} | section

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        chain, train = self.chain, self.train
        if self.quantize and (chain.hold == "tied" or chain.tune == "full"):
            got = "tune: full" if chain.tune == "full" else "hold: tied"
            remedy = "leave chain.tune out, and set" if chain.tune == "full" else "set"
            raise ValueError(
                f"`quantize: {self.quantize}` weights can be neither trained nor merged into "
                f"without loss (got {got}); {remedy} chain.hold: carried"
            )
        if chain.ranks and all(getattr(chain, key) is None for key in LENGTHS):
            raise ValueError(
                "`chain` must say how long each link is tuned (got no epochs, steps, tokens or "
                f"minutes); e.g. epochs: {[1] * len(chain.ranks)}"
            )
        if train.optimizer_reset == "prune" and len(set(chain.ranks)) > 1:
            raise ValueError(
                "`optimizer_reset: prune` keeps moments over a knot, so all ranks must be equal "
                f"(got {list(chain.ranks)}); use optimizer_reset: full"
            )
        if chain.tune == "full" and train.dtype != "float32":
            raise ValueError(
                "`tune: full` needs dtype: float32 (got bfloat16, whose weights lose small "
                "updates); set train.dtype"
            )
        if chain.tune == "full" and train.keep_best:
            raise ValueError(
                "`tune: full` keeps no best point, which would be one more copy of the model (got "
                "keep_best: true); leave it out, or use early_stop"
            )
        if chain.tune == "full" and train.accept_links == "better":
            raise ValueError(
                "`accept_links: better` drops links, of which `tune: full` has none (got both); "
                "leave it out, or use early_stop"
            )
        sampled = self.data.task is not None and self.data.train is None
        if train.compares and not (self.data.validation or sampled):
            raise ValueError(
                "`early_stop`, `keep_best` and `accept_links` need validation rows (got none); "
                "give data.validation"
            )
        return self
