"""The keys of `chain` in a config, and of each link."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from chainlora.config.messages import Called
from chainlora.config.section import Count, Section, refuse_if
from chainlora.errors import ConfigError

# Keys for the length of links, of which a config sets at most one.
LENGTHS = ("epochs", "steps", "tokens")

if TYPE_CHECKING:
    Names = Sequence[str]  # accepted from scripts
else:
    Names = tuple[str, ...]  # stored
Share = Annotated[float, Field(ge=0, lt=1)]
# Outside of this range, products in float32 overflow or vanish.
Alpha = Annotated[float, Field(ge=1e-6, le=1e6)]


class LinkShape(Section):
    """Keys that a link and a chain share."""

    rslora: bool = False
    """Scale by alpha / √rank instead (arXiv 2312.03732)."""
    dropout: Share = 0.0
    """Dropout on the input of the LoRA branch (slower: no fused LoRA layer)."""
    init: Literal["gaussian", "kaiming", "gradient"] = "kaiming"
    """Initialization of a link: `kaiming` or `gaussian` (random A, B = 0), or `gradient` (A along
    the loss gradient, B = 0)."""
    lora_bias: bool = False
    """Train a bias on B, merged into the layer's bias; refused for layers without a bias."""
    target_modules: Names | str = "all-linear"
    """Names of modules, a regular expression, or `all-linear`; Linear and Conv1D layers."""
    exclude_modules: Names | str | None = None
    """Names or a regular expression to leave out."""


class LinkConfig(Called, LinkShape):
    """One LoRA of the chain.

    The update is ``scaling · B · A`` with A [rank, in] and B [out, rank] (arXiv 2106.09685);
    ``scaling = alpha / rank``, or ``alpha / √rank`` with `rslora`.

    Raises:
        ConfigError: a keyword is unknown or its value is wrong.
    """

    rank: Count = 8
    """Rank of A and B."""
    alpha: Alpha = 16.0
    """LoRA's alpha."""

    @property
    def scaling(self) -> float:
        """Factor in front of B·A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @model_validator(mode="after")
    def _check_targets(self) -> LinkConfig:
        targets, rule = self.target_modules, "`target_modules` must name at least one module"
        refuse_if(not targets, rule, "none", "use e.g. all-linear")
        for key in ("target_modules", "exclude_modules"):
            modules = getattr(self, key)
            has_empty = isinstance(modules, tuple) and "" in modules  # every path ends with it
            refuse_if(has_empty, f"`{key}` must hold names", "an empty name", "remove it")
            try:
                re.compile(modules if isinstance(modules, str) else "")
            except re.error as error:
                rule = f"`{key}` must be a list of names, all-linear or a regular expression"
                remedy = "give a list such as [q_proj, v_proj]"
                refuse_if(True, rule, f"{modules!r}: {error}", remedy)
        is_all = targets in ("all", ("all",))
        refuse_if(is_all, "`target_modules` must name modules", "all", "use all-linear")
        return self


class KnotConfig(Section):
    """Soft knots: at regular steps a share of the live link is tied, and the rest continues.

    With the time constant τ, 1 − 1/e of a step's change is tied after τ steps:
    ``share = 1 − exp(−every / τ)``.
    """

    every: Count | None = None
    """Steps between soft knots; `null` is a twelfth of the time constant."""
    share: Share | None = None
    """Share tied at each soft knot, from 0 (only balancing) to below 1; `null` follows from the
    other two."""
    time_constant: Annotated[float, Field(ge=1, le=1e9)] | None = None
    """Steps until 1 − 1/e of a step's change is tied; `null`: as with `auto`."""
    follow_rate: bool = False
    """Make shares proportional to the learning rate, so that late steps can still be corrected."""
    moments: Literal["carried", "new"] = "carried"
    """The optimizer's moments: `carried` exactly, or `new` at each soft knot."""
    policy: str = "spaced"
    """`spaced` ties `share` every `every` steps; other policies can be
    [added](layout.md#policies)."""

    @model_validator(mode="after")
    def _check(self) -> KnotConfig:
        every, tau = self.every or 1, self.time_constant
        refuse_if(
            self.share is not None and tau is not None,
            "give `knots.share` or `knots.time_constant`, not both",
            "both",
            "share = 1 - exp(-every / time_constant)",
        )
        refuse_if(
            tau is not None and -math.expm1(-every / tau) >= 1,
            "`knots.time_constant` must leave a part of the link at each soft knot",
            f"{tau}: a knot after {every} step(s) would tie the whole link",
            "raise it, or lower knots.every",
        )
        return self


class ChainConfig(LinkShape):
    """The chain: number, ranks and lengths of its links.

    Give one of `epochs`, `steps` and `tokens`, with one entry per link. Otherwise `data.train`
    decides ([defaults](config.md#without-a-config)).
    """

    ranks: tuple[Count, ...] = (8,)
    """Rank of each link, and so the length of the chain; `[]` trains nothing. Not given, it is 8
    for each entry of `epochs`, `steps` or `tokens`."""
    alpha: Alpha | tuple[Alpha, ...] = 16.0
    """LoRA's alpha: one number, or one for each link. The update is scaled by alpha / rank."""
    alpha_policy: Literal["proportional", "fixed"] = "proportional"
    """With one alpha and different ranks: `proportional` keeps the first link's scaling, `fixed`
    keeps alpha ([decision 4](decisions/0004-alpha-when-the-rank-drops.md))."""
    init_batches: Count = 4
    """Number of steps whose batches `init: gradient` reads."""
    knots: KnotConfig | None = None
    """[Soft knots](#soft-knots) inside each link: `auto`, or a section with the keys below."""
    epochs: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] | None = None
    """Epochs of each link, e.g. `[3, 2]`; fractions are allowed."""
    steps: tuple[Count, ...] | None = None
    """Optimizer steps of each link."""
    tokens: tuple[Annotated[float, Field(gt=0, le=1e15)], ...] | None = None
    """Tokens that each link reads, prompts included, rounded up to whole steps. Each candidate and
    each answer of a pair counts with its prompt."""
    hold: Literal["tied", "carried"] = "tied"
    """Earlier links are `tied` into the base weights, or `carried` beside an unchanged base."""

    @model_validator(mode="before")
    @classmethod
    def _rank_a_length(cls, tree: Any) -> Any:
        """Set the default rank for each length if no ranks are given."""
        if isinstance(tree, Mapping) and "ranks" not in tree:
            given = [tree[key] for key in LENGTHS if isinstance(tree.get(key), list | tuple)]
            return dict(tree) | {"ranks": (8,) * max([1, *map(len, given)])}
        return tree

    @field_validator("knots", mode="before")
    @classmethod
    def _knots(cls, knots: Any) -> Any:
        is_text = isinstance(knots, str) and knots != "auto"
        refuse_if(
            is_text or isinstance(knots, bool | int | float),
            "`chain.knots` must be auto, null or a section of keys",
            repr(knots),
            "e.g. knots: auto, or knots: {every: 10, share: 0.05}",
        )
        return {} if knots == "auto" else knots

    @model_validator(mode="after")
    def _lengths(self) -> ChainConfig:
        given = [key for key in LENGTHS if getattr(self, key) is not None]
        rule, remedy = "give one of `epochs`, `steps` and `tokens`", "set the others to null"
        refuse_if(len(given) > 1, rule, " and ".join(given), remedy)
        for key in given:
            lengths = getattr(self, key)
            refuse_if(
                len(lengths) != len(self.ranks),
                f"`ranks` and `{key}` must have the same length",
                f"{len(self.ranks)} and {len(lengths)}",
                "give one entry per link",
            )
        refuse_if(
            isinstance(self.alpha, tuple) and len(self.alpha) != len(self.ranks),
            "`alpha` must be one number, or one per link",
            f"{self.alpha} for {len(self.ranks)} ranks",
            "give as many numbers as ranks",
        )
        return self

    @model_validator(mode="after")
    def _check(self) -> ChainConfig:
        refuse_if(
            self.knots is not None and self.lora_bias,
            "`knots` need plain LoRA links",
            "lora_bias",
            "leave knots out",
        )
        try:
            self.links()
        except ConfigError as error:  # already here, not when the link begins
            raise ValueError(str(error)) from None
        return self

    @property
    def has_length(self) -> bool:
        """Whether `epochs`, `steps` or `tokens` is given."""
        return any(getattr(self, key) is not None for key in LENGTHS)

    def links(self) -> list[LinkConfig]:
        """Return one `LinkConfig` per link, with `alpha_policy` applied."""
        shared = {
            key: getattr(self, key)
            for key in LinkConfig.model_fields
            if key not in ("rank", "alpha")
        }
        shapes = [(rank, self._alpha(k, rank)) for k, rank in enumerate(self.ranks)]
        made = {
            (rank, alpha): LinkConfig(rank=rank, alpha=alpha, **shared)
            for rank, alpha in dict.fromkeys(shapes)  # thousands of links often have few shapes
        }
        return [made[shape] for shape in shapes]

    def _alpha(self, index: int, rank: int) -> float:
        if isinstance(self.alpha, tuple):
            return self.alpha[index]
        if self.alpha_policy == "fixed":
            return self.alpha
        ratio = rank / self.ranks[0]
        return self.alpha * (ratio**0.5 if self.rslora else ratio)
