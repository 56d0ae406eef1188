"""What a run is: every key a config file or a keyword can set, with its default and its reason.

A config is frozen, refuses keys it does not know, and is complete once loaded: `None` means off. It
imports no tensor library, so that the command line can check a file in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from chainlora.config.chat_templates import Argument, check_arguments, resolved_template
from chainlora.config.messages import problems

# How long a link can be said to be; the keys of `ChainConfig`, of which a config gives one.
LENGTHS = ("epochs", "steps", "tokens", "minutes")


class _Frozen(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, tree: Any) -> Any:
        """Refuse ``lr: true``, which pydantic would take for 1.0."""
        for key, value in tree.items() if isinstance(tree, Mapping) else ():
            field = cls.model_fields.get(key) if isinstance(key, str) else None
            parts = value if isinstance(value, list | tuple) else [value]
            if field is None or not any(isinstance(part, bool) for part in parts):
                continue
            kinds = _kinds(field.annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError(f"`{key}` must be a number (got {value!r}); give one")
        return tree

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, tree: Any) -> Any:
        """Take ``ranks: 8`` for ``[8]`` and ``target_modules: q_proj, v_proj`` for a list."""
        if not isinstance(tree, Mapping):
            return tree
        return {key: _as_list(cls.model_fields.get(key), value) for key, value in tree.items()}


def _kinds(annotation: Any) -> set[Any]:
    """Return the plain types in an annotation such as ``tuple[float, ...] | None``."""
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation)))


def _as_list(field: Any, value: Any) -> Any:
    """Return a list where one is due; names with commas between them are no pattern."""
    if isinstance(value, str) and _NAMES.fullmatch(value) and _is_due_a_list(field, "a"):
        return [name.strip() for name in value.split(",")]
    return [value] if _is_due_a_list(field, value) else value


def _is_due_a_list(field: Any, value: Any) -> bool:
    """Say whether a value stands alone where several may stand; a plain name is no pattern."""
    if field is None or isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    kinds = _kinds(field.annotation)
    if Ellipsis not in kinds:
        return False
    if isinstance(value, str):
        is_plain = re.fullmatch(r"[\w.]+", value) is not None
        return str in kinds and (is_plain or not _takes(field, str))
    return bool(kinds & {int, float}) and not (_takes(field, int) or _takes(field, float))


def _takes(field: Any, kind: type) -> bool:
    """Say whether a field takes one value of a kind, beside a list of them."""
    is_tuple = get_origin(field.annotation) is tuple
    return not is_tuple and kind in get_args(field.annotation)


_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)+")
_LARGEST = 2**31  # of what sizes a tensor; much larger numbers are no floats
_Beta = Annotated[float, Field(ge=0, lt=1)]


class LinkShape(_Frozen):
    """What a link and a chain say in the same words."""

    rslora: bool = Field(False, description="scaling alpha / √rank (arXiv 2312.03732)")
    dropout: float = Field(0.0, ge=0, lt=1)
    init: Literal["gaussian", "kaiming", "gradient", "pissa"] = "kaiming"
    lora_bias: bool = False
    dora: bool = Field(False, description="arXiv 2402.09353")
    target_modules: tuple[str, ...] | str = "all-linear"
    exclude_modules: tuple[str, ...] | str | None = None
    extra_modules: tuple[str, ...] = ()
    train_factors: Literal["both", "A", "B"] = "both"


class LinkConfig(LinkShape):
    """One LoRA of the chain.

    The update is ``scaling · B · A`` with ``A`` (rank × in) and ``B`` (out × rank); ``scaling =
    alpha / rank``, or ``alpha / √rank`` with `rslora`.
    """

    rank: int = Field(8, ge=1, lt=_LARGEST)
    alpha: float = Field(16.0, gt=0)

    @property
    def scaling(self) -> float:
        """Factor in front of B·A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @model_validator(mode="after")
    def _check(self) -> LinkConfig:
        if not self.target_modules:
            raise ValueError(
                "`target_modules` must name at least one module (got none); use e.g. all-linear"
            )
        for key in ("target_modules", "exclude_modules"):
            _check_pattern(key, getattr(self, key))
        if self.target_modules in ("all", ("all",)):
            raise ValueError("`target_modules` must name modules (got all); say all-linear")
        if self.init == "pissa" and self.train_factors != "both":
            raise ValueError(
                "`init: pissa` trains both factors (got train_factors: "
                f"{self.train_factors}); use init: kaiming or train_factors: both"
            )
        if self.init == "gradient" and self.train_factors == "A":
            raise ValueError(
                "`init: gradient` points A along the gradient and trains B (got train_factors: A); "
                "use train_factors: both or B"
            )
        if self.dora and self.lora_bias:
            raise ValueError(
                "`dora` knows no LoRA bias (got lora_bias: true); set one of them to false"
            )
        if self.dora and (self.init == "pissa" or self.train_factors != "both"):
            raise ValueError(
                "`dora` works with init gaussian or kaiming and train_factors: both "
                f"(got {self.init}, {self.train_factors})"
            )
        return self


def _check_pattern(key: str, modules: tuple[str, ...] | str | None) -> None:
    """Refuse an empty name, which is the end of every path, and text that is no regular
    expression."""
    if isinstance(modules, tuple) and "" in modules:
        raise ValueError(f"`{key}` must hold names (got an empty one); remove it")
    try:
        re.compile(modules if isinstance(modules, str) else "")
    except re.error as error:
        raise ValueError(
            f"`{key}` must be a list of names, all-linear or a regular expression (got "
            f"{modules!r}: "
            f"{error}); give a list such as [q_proj, v_proj]"
        ) from None


class KnotConfig(_Frozen):
    """Soft knots: every so many steps a share of the live link is tied, and the rest continues.

    With the time constant τ, what a step has learned is tied to 1 − 1/e after τ steps:
    ``share = 1 − exp(−every / τ)``.
    """

    every: int | None = Field(None, ge=1, description="steps; None: a twelfth of the time constant")
    share: float | None = Field(None, ge=0, lt=1, description="None: from the time constant")
    time_constant: float | None = Field(
        None, gt=0, description="steps; None: 0.15 of the steps of the link"
    )
    follow_rate: bool = Field(
        False, description="shares in proportion to the learning rate, so that they end with it"
    )
    moments: Literal["carried", "new"] = "carried"

    @model_validator(mode="after")
    def _check(self) -> KnotConfig:
        if self.share is not None and self.time_constant is not None:
            raise ValueError(
                "give `knots.share` or `knots.time_constant`, not both (got both); "
                "share = 1 - exp(-every / time_constant)"
            )
        return self


class PlateauConfig(_Frozen):
    """When a link has stopped to learn: every `patience` steps, `of` is compared with what it was.

    A link ends early, and the last link gets the steps that are left.
    """

    of: Literal["norm", "loss"] = "norm"
    patience: int = Field(50, ge=1, description="steps between comparisons")
    min_change: float = Field(
        0.02, gt=0, lt=1, description="relative growth of the norm, or fall of the loss"
    )


class ChainConfig(LinkShape):
    """The chain: how long, how wide, how long each link is tuned.

    `ranks` is chain length and rank step-down in one; an empty list trains nothing (zero-shot).
    When the ranks differ and `alpha` is one number, `alpha_policy` decides: ``proportional`` keeps
    the *scaling* of the first link (alpha_k = alpha · rank_k / rank_0, so one learning rate serves
    every link), ``fixed`` keeps *alpha* (scaling grows as the rank drops).
    """

    ranks: tuple[int, ...] = (8, 8)
    alpha: float | tuple[float, ...] = 16.0
    alpha_policy: Literal["proportional", "fixed"] = "proportional"
    init_batches: int = Field(4, ge=1, description="batches that `init: gradient` reads")
    knots: KnotConfig | None = Field(
        None, description="soft knots inside each link; `auto` chooses their distance and share"
    )
    plateau: PlateauConfig | None = Field(
        None, description="end a link, the last one excepted, when it has stopped to learn"
    )
    epochs: tuple[float, ...] | None = None
    steps: tuple[int, ...] | None = None
    tokens: tuple[float, ...] | None = None
    minutes: tuple[float, ...] | None = None
    hold: Literal["tied", "carried"] = "tied"
    tune: Literal["lora", "full"] = "lora"

    @field_validator("knots", mode="before")
    @classmethod
    def _knots(cls, knots: Any) -> Any:
        return {} if knots == "auto" else knots

    @field_validator("ranks")
    @classmethod
    def _ranks(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        for position, rank in enumerate(ranks):
            if rank < 1:
                raise ValueError(
                    f"`ranks` must be positive integers (got {rank} at position {position})"
                )
            if rank >= _LARGEST:
                raise ValueError(
                    f"`ranks` must be below {_LARGEST} (got {rank!s:.40} at position {position})"
                )
        return ranks

    @model_validator(mode="after")
    def _check(self) -> ChainConfig:
        given = [key for key in LENGTHS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(
                f"give one of `epochs`, `steps`, `tokens` and `minutes` (got {' and '.join(given)})"
                "; set the others to null"
            )
        for key in given:
            lengths = getattr(self, key)
            if len(lengths) != len(self.ranks):
                raise ValueError(
                    f"`ranks` and `{key}` must be of one length "
                    f"(got {len(self.ranks)} and {len(lengths)}); give one entry a link"
                )
            if any(length <= 0 for length in lengths):
                raise ValueError(f"`{key}` must be positive (got {list(lengths)})")
        if isinstance(self.alpha, tuple) and len(self.alpha) != len(self.ranks):
            raise ValueError(
                f"`alpha` must be one number or one a link (got {len(self.alpha)} for "
                f"{len(self.ranks)} ranks)"
            )
        if self.dora and self.hold == "carried":
            raise ValueError(
                "`dora` cannot be carried (its update is not low-rank; got hold: carried); use "
                "hold: tied"
            )
        if self.init == "pissa" and self.hold == "carried":
            raise ValueError(
                "`init: pissa` takes its start out of the base (got hold: carried); use hold: tied"
            )
        plain = self.init != "pissa" and self.train_factors == "both"
        if self.knots is not None and (self.dora or self.lora_bias or not plain):
            raise ValueError(
                "`knots` need plain LoRA links that train both factors (got dora, lora_bias, "
                "init: pissa or train_factors); leave knots out"
            )
        if self.plateau is not None and self.knots is not None and self.plateau.of == "norm":
            raise ValueError(
                "`plateau.of: norm` watches ‖B·A‖, which soft knots keep small (got knots too); "
                "use plateau.of: loss"
            )
        if self.plateau is not None and self.tune == "full":
            raise ValueError("`plateau` ends links (got tune: full, which has none); leave it out")
        if self.knots is not None and self.tune == "full":
            raise ValueError("`knots` tie links (got tune: full, which has none); leave knots out")
        try:
            self.links()
        except ValidationError as error:  # here, and not when the link begins
            raise ValueError(problems(error, LinkConfig)) from None
        return self

    def links(self) -> list[LinkConfig]:
        """Return one `LinkConfig` a link, scaling policy applied."""
        shared = {
            key: getattr(self, key)
            for key in LinkConfig.model_fields
            if key not in ("rank", "alpha")
        }
        return [
            LinkConfig(rank=rank, alpha=self._alpha(k, rank), **shared)
            for k, rank in enumerate(self.ranks)
        ]

    def _alpha(self, index: int, rank: int) -> float:
        if isinstance(self.alpha, tuple):
            return self.alpha[index]
        if self.alpha_policy == "fixed":
            return self.alpha
        ratio = rank / self.ranks[0]
        return self.alpha * (ratio**0.5 if self.rslora else ratio)


class DataConfig(_Frozen):
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
                "one); "
                "name a task, or leave it out"
            )
        if self.task is not None and self.train is not None and self.dir is not None:
            raise ValueError("`data.dir` and `data.train` exclude each other (got both); keep one")
        if self.task is not None and self.train is None and (self.validation or self.test):
            raise ValueError(
                "`data.validation` and `data.test` go with data.train (got a task whose rows are "
                "drawn); "
                "give data.train beside them, or leave them out"
            )
        return self


class TrainConfig(_Frozen):
    """How a link is tuned. Defaults follow the paper where it speaks (AdamW, linear decay, batch
    8)."""

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
    shard: Literal["fsdp2"] | None = Field(
        None, description="fsdp2: the processes of a run share the model; None: each holds all"
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


class RunConfig(_Frozen):
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
                "minutes); "
                f"e.g. epochs: {[1] * len(chain.ranks)}"
            )
        if train.optimizer_reset == "prune" and len(set(chain.ranks)) > 1:
            raise ValueError(
                "`optimizer_reset: prune` keeps moments over a knot, so all ranks must be equal "
                f"(got {list(chain.ranks)}); use optimizer_reset: full"
            )
        if chain.tune == "full" and train.dtype != "float32":
            raise ValueError(
                "`tune: full` needs dtype: float32 (got bfloat16, whose weights lose small "
                "updates); "
                "set train.dtype"
            )
        if chain.tune == "full" and train.keep_best:
            raise ValueError(
                "`tune: full` keeps no best point, every weight would be one more copy of the "
                "model (got "
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
