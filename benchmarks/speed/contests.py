"""What is compared with what: pure data, read top to bottom.

A contest is a list of entries that run the same workload; the first one is ours, every other is
measured as a ratio to it. `kind` names the module in `contestants/` that runs an entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DTYPES = ("float32", "bfloat16")
QV = ("q_proj", "v_proj")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Entry:
    """One side of a contest. `options` overrides the contest's settings."""

    label: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """Entries on one workload.

    `measure` is the number compared: rows_per_second, seconds_per_step, seconds_per_knot, seconds;
    `goals` are the ratios ours must reach against the named entry ("speed": times as fast,
    "memory": peak at most this share).
    """

    name: str
    workload: str
    num_rows: int
    entries: tuple[Entry, ...]
    measure: str = "rows_per_second"
    repeats: int = 3
    model: str = "model"
    settings: dict[str, Any] = field(default_factory=dict)
    goals: dict[str, dict[str, float]] = field(default_factory=dict)

    def spec(self, entry: Entry) -> dict[str, Any]:
        """Return all settings of one entry, without places on disk."""
        base = {
            "batch_size": 8,
            "epochs": 1,
            "lr": 1e-3,
            "seed": 0,
            "rank": 8,
            "alpha": 16,
            "targets": QV,
            "dtype": "float32",
            "objective": "completion",
            "num_rows": self.num_rows,
        }
        return (
            base | self.settings | entry.options | {"kind": entry.kind, "workload": self.workload}
        )


_OURS, _PEER = Entry("chainlora", "ours"), Entry("Trainer + PEFT", "trainer_peft")
_CLASSIFICATION = {"speed": 3.5, "memory": 0.5}
_LANGUAGE = {"speed": 3.0, "memory": 0.4}


def _contests(
    workload: str,
    num_rows: int,
    entries: tuple[Entry, ...],
    goals: dict[str, float] | None = None,
    *,
    name: str = "",
    dtypes: tuple[str, ...] = DTYPES,
    model: str = "model",
    measure: str = "rows_per_second",
    repeats: int = 3,
    **settings: Any,
) -> list[Contest]:
    """A contest for each dtype; goals are those against each peer, or of ours where it is alone."""
    return [
        Contest(
            f"{name or workload}-{dtype}",
            workload,
            num_rows,
            entries,
            measure,
            repeats,
            model,
            {"dtype": dtype} | settings,
            {entry.label: goals for entry in entries[1:] or entries} if goals else {},
        )
        for dtype in dtypes
    ]


def _trainer(
    workload: str, num_rows: int, goals: dict[str, float] | None = None, **keys: Any
) -> list[Contest]:
    """Ours against transformers.Trainer + PEFT, the completion's loss on both sides."""
    return _contests(workload, num_rows, (_OURS, _PEER), goals, **keys)


def _long(num_tokens: int, num_rows: int, model: str = "model") -> Contest:
    """Rows of this many tokens, one a step, against Trainer + PEFT; ours also with its activations
    computed again in backward."""
    checkpointed = Entry("chainlora, checkpointed", "ours", {"gradient_checkpointing": True})
    return Contest(
        f"{'long' if model == 'model' else model}-{num_tokens}-bfloat16",
        f"long-{num_tokens}",
        num_rows,
        (_OURS, checkpointed, _PEER),
        repeats=1,
        model=model,
        settings={"dtype": "bfloat16", "batch_size": 1},
        goals={_PEER.label: {"speed": 2.0, "memory": 0.4}},
    )


def _language(workload: str, num_rows: int) -> list[Contest]:
    """Ours against TRL's SFTTrainer, without and with its packing."""
    peers = (Entry("TRL", "trl_sft"), Entry("TRL packing", "trl_sft", {"packing": True}))
    return _contests(workload, num_rows, (_OURS, *peers), _LANGUAGE)


def _preferences(num_rows: int) -> list[Contest]:
    """DPO against TRL's DPOTrainer, which asks the base again in every step, or once before."""
    before = Entry("TRL, reference before", "trl_dpo", {"reference_before": True})
    entries = (_OURS, Entry("TRL", "trl_dpo"), before)
    keys: dict[str, Any] = {"objective": "dpo", "batch_size": 2, "lr": 5e-5}
    goals = {"speed": 1.0, "memory": 1.0}
    return _contests("preferences", num_rows, entries, goals, dtypes=DTYPES[:1], repeats=1, **keys)


def _evaluation(task: str, num_rows: int, speed: float) -> list[Contest]:
    """Scoring against lm-eval, each dtype with its own and ours in bfloat16 with their float32."""
    entries = (Entry("chainlora", "ours_evaluation"), Entry("lm-eval", "lm_evaluation"))
    workload, name = f"{task}-validation", f"evaluate-{task}"
    mixed = Contest(
        f"{name}-mixed",
        workload,
        num_rows,
        (
            Entry("chainlora bfloat16", "ours_evaluation", {"dtype": "bfloat16"}),
            Entry("lm-eval float32", "lm_evaluation"),
        ),
        goals={"lm-eval float32": {"speed": 2 * speed}},
    )
    return [*_contests(workload, num_rows, entries, {"speed": speed}, name=name), mixed]


def _harness(task: str, num_rows: int) -> list[Contest]:
    """Ours against the paper's harness style, cross-entropy over the candidates on both sides."""
    entries, name = (_OURS, Entry("harness style", "harness")), f"harness-{task}"
    return _contests(task, num_rows, entries, {"speed": 6.0}, name=name, objective="candidates")


def _peak(task: str, num_rows: int) -> list[Contest]:
    """Ours alone: its share of the machine's matmul peak, and a profile."""
    keys: dict[str, Any] = {"name": f"peak-{task}", "measure": "share_of_peak", "repeats": 1}
    return [
        contest
        for dtype, goal in zip(DTYPES, (0.75, 0.60), strict=True)
        for contest in _contests(
            task, num_rows, (Entry("chainlora", "peak"),), {"share": goal}, dtypes=(dtype,), **keys
        )
    ]


_KNOTS = (Entry("chainlora", "ours_knots"), Entry("ReLoRA-style merge", "relora_knots"))
CONTESTS: tuple[Contest, ...] = (
    *_trainer("rte", 96, _CLASSIFICATION),
    *_trainer("sst2", 192, _CLASSIFICATION),
    Contest(
        "rte-bfloat16-against-float32",
        "rte",
        96,
        (
            Entry("chainlora bfloat16", "ours", {"dtype": "bfloat16"}),
            Entry("Trainer + PEFT float32", "trainer_peft"),
        ),
        goals={"Trainer + PEFT float32": {"speed": 6.0}},
    ),
    *_harness("rte", 48),
    *_harness("sst2", 96),
    *_language("gsm8k", 48),
    *_evaluation("rte", 96, 2.0),
    *_evaluation("multirc", 96, 10.0),
    *[
        Contest(name, "sst2", 96, _KNOTS, "seconds_per_knot", settings=settings)
        for name, settings in (("knots", {}), ("knots-all-linear", {"targets": ALL_LINEAR}))
    ],
    Contest(
        "links-20-against-1",
        "sst2",
        192,
        (
            Entry("20 links", "ours", {"links": 20, "steps": 3}),
            Entry("1 link", "ours", {"steps": 60}),
        ),
        measure="seconds_per_step",
        goals={"1 link": {"speed": 0.97}},
    ),
    *_peak("rte", 48),
    *_peak("sst2", 96),
    _long(1024, 4),
    _long(4096, 3),
    _long(7600, 2),
    _long(1024, 3, "0.5b"),
    _long(1024, 3, "1.3b"),
    *_language("chat", 32),
    *_preferences(64),
    *_trainer("multirc", 32),
    *_trainer("rte", 48, name="rte-all-linear", targets=ALL_LINEAR),
    *_trainer("sst2", 192, name="sst2-tiny", model="tiny", dtypes=("float32",)),
    *[
        Contest(
            f"rank-{rank}",
            "sst2",
            96,
            (
                Entry(f"rank {rank}", "ours", {"rank": rank, "alpha": 2 * rank}),
                Entry("rank 8", "ours"),
            ),
            "seconds_per_step",
            repeats=1,
        )
        for rank in (1, 64, 256)
    ],
)
