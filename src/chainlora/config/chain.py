"""What a chain is: the keys of `chain` in a config, and of each link."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from chainlora.config.messages import problems
from chainlora.config.section import Section

# How long a link can be said to be; the keys of `ChainConfig`, of which a config gives one.
LENGTHS = ("epochs", "steps", "tokens", "minutes")

_LARGEST = 2**31  # of what sizes a tensor; much larger numbers are no floats


class LinkShape(Section):
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
    """Refuse an empty name, which every path ends with, and text that is no regular expression."""
    if isinstance(modules, tuple) and "" in modules:
        raise ValueError(f"`{key}` must hold names (got an empty one); remove it")
    try:
        re.compile(modules if isinstance(modules, str) else "")
    except re.error as error:
        raise ValueError(
            f"`{key}` must be a list of names, all-linear or a regular expression (got "
            f"{modules!r}: {error}); give a list such as [q_proj, v_proj]"
        ) from None


class KnotConfig(Section):
    """Soft knots: every so many steps a share of the live link is tied, and the rest continues.

    With the time constant τ, what a step has learned is tied to 1 − 1/e after τ steps:
    ``share = 1 − exp(−every / τ)``.
    """

    every: int | None = Field(None, ge=1, description="steps; None: a twelfth of the time constant")
    share: float | None = Field(None, ge=0, lt=1, description="None: from the time constant")
    time_constant: float | None = Field(
        None, gt=0, description="steps; None: 5 times the root of the link's steps"
    )
    follow_rate: bool = Field(
        False, description="shares in proportion to the learning rate, so that they end with it"
    )
    moments: Literal["carried", "new"] = "carried"
    policy: str = Field("spaced", description="a name in knots.driver.POLICIES")

    @model_validator(mode="after")
    def _check(self) -> KnotConfig:
        if self.share is not None and self.time_constant is not None:
            raise ValueError(
                "give `knots.share` or `knots.time_constant`, not both (got both); "
                "share = 1 - exp(-every / time_constant)"
            )
        every, tau = self.every or 1, self.time_constant
        if tau is not None and -math.expm1(-every / tau) >= 1:
            raise ValueError(
                "`knots.time_constant` must leave a part of the link at each soft knot (got "
                f"{tau:g}, with which a knot after {every} step(s) ties all of it); raise it, or "
                "lower knots.every"
            )
        return self


class PlateauConfig(Section):
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
    def _lengths(self) -> ChainConfig:
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
        return self

    @model_validator(mode="after")
    def _hold(self) -> ChainConfig:
        if self.dora and self.hold == "carried":
            raise ValueError(
                "`dora` cannot be carried (its update is not low-rank; got hold: carried); use "
                "hold: tied"
            )
        if self.init == "pissa" and self.hold == "carried":
            raise ValueError(
                "`init: pissa` takes its start out of the base (got hold: carried); use hold: tied"
            )
        return self

    @model_validator(mode="after")
    def _knots_and_plateau(self) -> ChainConfig:
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
        return self

    @model_validator(mode="after")
    def _each_link(self) -> ChainConfig:
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
