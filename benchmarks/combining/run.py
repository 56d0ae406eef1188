"""Data sets combined layer by layer, with the base as a part: the lab of README.md.

    python benchmarks/combining/run.py --stages ../lab/benchmarks/stages --data … --output …
    python benchmarks/combining/run.py … --only tuning        # or a name of STUDIES

`--stages` is benchmarks/stages of the revision that plan.yaml names, whose package must be the one
that is imported. A cell is one line of OUTPUT/results.jsonl. Kill it and start it again at will.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
_STAGES = Path(sys.argv[sys.argv.index("--stages") + 1]) if "--stages" in sys.argv else HERE
sys.path.insert(0, str(_STAGES))

import links as L  # noqa: E402
import run as R  # noqa: E402
from solve import Llama, Part, Place, Rows, Settings, combine  # noqa: E402

from chainlora.data.examples import Example  # noqa: E402

State = tuple[str, ...]
NAMES = [each.name for each in fields(Settings)]
RIVALS = ("replay", "one LoRA", "one wide LoRA", "all at once")  # here with the base's rows


class General:
    """Rows of the base itself, and texts from outside that measure general ability."""

    def __init__(self, lab: Any, data: Path, plan: Mapping[str, Any], output: Path) -> None:
        self.lab, self.data, self.plan = lab, data.parent, plan
        lab.put(())  # the base
        self.body = Llama(lab.model)
        self._file = HERE / "base_rows.json"  # what the base has written: committed

    @cached_property
    def prompts(self) -> dict[str, list[list[int]]]:
        """The shipped prompts and openings, as tokens."""
        texts = json.loads((HERE / "general.json").read_text())
        chats = [[{"role": "user", "content": text}] for text in texts["chat"]]
        return {
            "chat": [self._chat(chat, add_generation_prompt=True) for chat in chats],
            "plain": [self._tokens(text) for text in texts["plain"]],
        }

    @cached_property
    def rows(self) -> dict[str, list[list[int]]]:
        """The prompts with 64 tokens by the base (greedy)."""
        if not self._file.exists():
            written = {kind: self._continued(some) for kind, some in self.prompts.items()}
            self._file.write_text(json.dumps(written))
        found: dict[str, list[list[int]]] = json.loads(self._file.read_text())
        return found

    def some(self, count: int) -> list[list[int]]:
        """Return as many rows, half of each kind."""
        return [row for rows in self.rows.values() for row in rows[: count // 2]]

    def examples(self) -> list[Example]:
        """Return all rows to train on: what the base wrote is learned."""
        pairs = [
            pair
            for kind, rows in self.rows.items()
            for pair in zip(self.prompts[kind], rows, strict=True)
        ]
        return [
            Example(place, (tuple(row),), (((len(prompt), len(row)),),))
            for place, (prompt, row) in enumerate(pairs)
        ]

    def _continued(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return token rows with up to 64 more tokens each, the most probable ones."""
        weight = {key: self.body.base(*key).bfloat16() for key in self._places}
        rows, end = [list(prompt) for prompt in prompts], self.lab.tokenizer.eos_token_id
        for _ in range(64):
            due = [row for row in rows if row[-1] != end]
            packed, last = Rows(due), torch.tensor([len(row) for row in due]).cumsum(0) - 1
            logits = self.body.logits(packed, lambda *key: weight[key], torch.bfloat16, at=last)
            for row, token in zip(due, logits.argmax(-1).tolist(), strict=True):
                row.append(token)
        return rows

    @cached_property
    def _places(self) -> list[Place]:
        modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        modules += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        return [(layer, m) for layer in range(self.body.num_layers) for m in modules]

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self.lab.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def _chat(self, messages: Any, **more: Any) -> list[int]:
        text = self.lab.tokenizer.apply_chat_template(messages, tokenize=False, **more)
        return self._tokens(text)

    def texts(self, kind: str, count: int) -> list[list[int]]:
        """Return texts of a kind from outside, as at most 128 tokens each."""

        def lines(path: str) -> list[dict[str, Any]]:
            text = (self.data / path).read_text(encoding="utf-8")
            return [json.loads(line) for line in text.strip().split("\n")]

        if kind == "gsm8k":
            found = [f"{r['question']}\n{r['answer']}" for r in lines("gsm8k/test.jsonl")]
        elif kind == "dialogsum":
            found = [r["dialogue"] for r in lines("dialogsum/test.jsonl")]
        elif kind == "boolq":
            found = [r["passage"] for r in lines("boolq/validation.jsonl")]
        elif kind == "multirc":
            found = [r["passage"]["text"] for r in lines("multirc/train.jsonl")]
        else:
            rows = lines("alpaca_demo/train.jsonl")
            asked = [r["instruction"] + ("\n" + r["input"] if r.get("input") else "") for r in rows]
            pairs = list(zip(asked, (r["output"] for r in rows), strict=True))
            if kind == "alpaca chat":
                roles = "user", "assistant"
                chats = [
                    [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]
                    for pair in pairs[500 : 500 + count]
                ]
                return [self._chat(chat)[:128] for chat in chats]
            form = "### Instruction:\n{}\n\n### Response:\n{}"
            found = [form.format(*pair) for pair in pairs[700:]]
        return [self._tokens(text)[:128] for text in found[:count]]

    def measure(self, state: Sequence[str], which: str) -> dict[str, Any]:
        """Return the perplexity of a state on each kind of text, and how many facts are right."""
        weight = self._weights(state)
        kinds: Mapping[str, int] = self.plan["outside"][which]
        found: dict[str, Any] = {
            "perplexity": {k: self._perplexity(weight, self.texts(k, n)) for k, n in kinds.items()}
        }
        if which == "verdict":
            found["facts"] = self._facts(weight)
        return found

    def _weights(self, state: Sequence[str]) -> dict[Place, torch.Tensor]:
        held = [self.lab.link(digest) for digest in state]
        found = {}
        for layer, module in self._places:
            total = self.body.base(layer, module)
            for link in held:
                total = total + link.delta_weight(name_of(link, layer, module))
            found[layer, module] = total.bfloat16()  # rounded once
        return found

    def _perplexity(self, weight: Mapping[Place, torch.Tensor], texts: list[list[int]]) -> float:
        total = count = 0.0
        for at in range(0, len(texts), 10):
            rows = Rows(texts[at : at + 10])
            logits = self.body.logits(rows, lambda *key: weight[key], torch.bfloat16)
            # every token but the last of a row predicts the next one
            inner = (rows.positions[1:] > 0).nonzero()[:, 0]
            logs = torch.log_softmax(logits[inner], -1)
            total -= float(logs.gather(-1, rows.ids[inner + 1][:, None]).sum())
            count += len(inner)
        return math.exp(total / count)

    def _facts(self, weight: Mapping[Place, torch.Tensor]) -> float:
        """Return the share of facts whose word greedy generation writes."""
        right = 0
        pairs = json.loads((HERE / "outside.json").read_text())
        for prompt, answer in pairs:
            start, wanted = self._tokens(prompt), self._tokens(f" {answer}")
            rows = Rows([start + wanted])
            logits = self.body.logits(rows, lambda *key: weight[key], torch.bfloat16)
            right += logits[len(start) - 1 : -1].argmax(-1).tolist() == wanted
        return right / len(pairs)


def name_of(link: Any, layer: int, module: str) -> str:
    """Return the name by which a link knows a module."""
    return next(name for name in link.factors if name.endswith(f"layers.{layer}.{module}"))


class Runner(R.Runner):
    """The cells of this lab; rows, training and scores are those of benchmarks/stages."""

    def __init__(self, plan: Any, stages: Any, data: Path, output: Path) -> None:
        super().__init__(stages, data, output)
        self.own, self.general = plan, General(self.lab, data, plan, output)
        self.body = self.general.body

    # --- arms ---

    def alone(self, case: R.Case) -> dict[str, State]:
        """Return each task's own stage on the base."""
        return {task: case.train((), case.new_rows(task), "rate", task) for task in case.order}

    def layer_by_layer(self, case: R.Case, ends: Mapping[str, State]) -> State:
        """Return the combination of stages as one link, made where it is missing."""
        s = case.settings
        settings = Settings(**{name: s[name] for name in NAMES})
        rows = {task: [row.sequences[0] for row in case.rows[task]["kept"]] for task in case.order}
        case.old_rows += sum(map(len, rows.values()))
        recipe = {
            "kind": "layer by layer, 2",
            "of": sorted((ends[task], L._digest(rows[task])) for task in case.order),
            "settings": {name: s[name] for name in (*NAMES, "general", "importance")},
        }

        def make() -> Any:
            parts = [self._part(ends[t], rows[t]) for t in sorted(ends, key=lambda t: ends[t])]
            if s["general"]:
                base = Rows(self.general.some(s["general"]))
                parts.append(Part(base, {}, s["importance"]))
            found = combine(self.body, parts, settings)
            names = {name.split("layers.", 1)[1]: name for name in self._names(ends)}
            factors = {names[f"{n}.{m}"]: L.Factors(a, b) for (n, m), (a, b) in found.items()}
            return L.as_link(factors)

        name, info = self.lab._made(recipe, make, 0)
        case.spent.append(info)
        return (name,)

    def _names(self, ends: Mapping[str, State]) -> list[str]:
        return [*self.lab.link(next(iter(ends.values()))[0]).factors]

    def _part(self, state: State, rows: Sequence[Sequence[int]]) -> Part:
        (digest,) = state
        link, found = self.lab.link(digest), {}
        for layer, module in self.general._places:
            each = link.factors[name_of(link, layer, module)]
            found[layer, module] = (each.a, link.scaling * each.b)
        return Part(Rows(rows), found)

    # --- cells ---

    def settings(self, **changed: Any) -> dict[str, Any]:
        """Return the candidate with some settings changed."""
        own = self.plan["defaults"] | self.own["combination"] | {"rate": self.own["rate"]}
        return own | changed

    def measured(
        self, arm: str, seed: int, split: str, settings: dict[str, Any], prompt: str = "shared"
    ) -> dict[str, Any]:
        """Return a cell, computed where it is missing, with general ability beside it."""
        named = {"arm": arm, "seed": seed, "prompt": prompt, "split": split, "settings": settings}
        if (key := R._key(named)) in self.cells:
            return self.cells[key]
        case, wall = self._case(seed, prompt, settings), time.monotonic()
        ends = {} if arm in RIVALS else self.alone(case)
        trained = time.monotonic() - wall
        state = self._made(arm, case, ends)
        which = "tuning" if split == "validation" else "verdict"
        more = {"general": self.general.measure(state, which), "base": self._base(which)}
        more["made_in"] = round(time.monotonic() - wall - trained)
        if split == "test":
            right = {t: self.lab.right(end, case.rows[t][split]) for t, end in ends.items()}
            more |= {"learned": right}
        return self._note(case, arm, split, case.right(state, split), **more)

    def _made(self, arm: str, case: R.Case, ends: Mapping[str, Any]) -> State:
        if arm == "layer by layer":
            return self.layer_by_layer(case, ends)
        if arm == "rehearsed":
            made = self.layer_by_layer(case, ends), ends
        elif arm in ("two passes", "default"):
            made = R.beside(case, "combined", passes=2)
        else:
            return self._rival(arm, case)
        found: State = made[0] if arm == "two passes" else R.rehearsed(case, made)[0]
        return found

    def _rival(self, arm: str, case: R.Case) -> State:
        """Train with the base's rows among the others: as many in each stage as ours reads once."""
        general, places = self.general.examples(), range(len(case.order))
        if arm == "all at once":
            rows = [row for task in sorted(case.order) for row in case.new_rows(task)]
            rows += case.kept(sorted(case.order), case.num_again, "rehearsal")
            rows += general * len(case.order)
            rows = R.dealt(rows, len(rows), f"{case.seed} at once")
            return case.train((), rows, "rate", "at once", rank=R._wide(case))
        rank = {"replay": 0, "one LoRA": R._narrow(case), "one wide LoRA": R._wide(case)}[arm]
        state: State = ()
        for place in places:
            task = case.order[place]
            more = {"rank": rank, "goes_on": place > 0} if rank else {}
            order = R.dealt(general, len(general), f"{case.seed} {task} general")
            state = case.train(state, R.mixed(case.replayed(place), order), "rate", task, **more)
        return state

    def _base(self, which: str) -> dict[str, Any]:
        if which not in (known := self.__dict__.setdefault("_bases", {})):
            known[which] = self.general.measure((), which)
        found: dict[str, Any] = known[which]
        return found

    # --- the plan ---

    def tune(self) -> dict[str, Any]:
        """Return the settings that the tuning seed chooses, step by step."""
        chosen: dict[str, Any] = {}
        for grid in self.own["tuning"]:
            grid = {key: [*values] for key, values in grid.items()}
            choose = gentlest if "general" in grid else most_right
            best = self._best_of(chosen, grid, choose)
            for key in ("ridge", "rate"):  # an edge adds one value beyond it, once
                if key in grid and best[key] in (low := min(grid[key]), max(grid[key])):
                    factor = {"ridge": 10, "rate": 3}[key]
                    beyond = best[key] / factor if best[key] == low else best[key] * factor
                    others = {k: [best[k]] for k in grid if k != key}
                    more = {key: [best[key], float(f"{beyond:.0e}")], **others}
                    best = self._best_of(chosen, {k: more[k] for k in grid}, choose)
            chosen |= best
        return chosen

    def _best_of(
        self, chosen: Mapping[str, Any], grid: Mapping[str, Any], choose: Callable[..., int]
    ) -> dict[str, Any]:
        """Return the values of a grid that the tuning seed chooses."""
        choices = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        seed = self.own["tuning_seed"]
        cells = [
            self.measured("layer by layer", seed, "validation", self.settings(**chosen, **each))
            for each in choices
        ]
        row = 1 / (len(self.plan["tasks"]) * self.plan["rows"]["validation"])
        rights = [fmean(c["right"].values()) for c in cells]
        return choices[choose(rights, [ratio(c) for c in cells], row)]

    def verdict(self) -> None:
        """Run the fresh seeds of the primary comparison."""
        chosen = self.tune()
        print("chosen", chosen, flush=True)
        default = self.plan["defaults"] | {"rate": 1e-3, "again": 3e-4}
        passes = self.plan["defaults"] | {"rate": 1e-3}
        for seed in self.own["verdict"]["seeds"]:
            self.measured("layer by layer", seed, "test", self.settings(**chosen))
            self.measured("default", seed, "test", default)
            self.measured("two passes", seed, "test", passes)

    def beside(self) -> None:
        """Run the variants of the candidate."""
        chosen = self.tune()
        for arm in self.own["beside"]["arms"]:
            changed = {key: value for key, value in arm.items() if key != "name"}
            settings = self.settings(**chosen | changed)
            for seed in self.own["beside"]["seeds"]:
                self.measured("layer by layer", seed, "test", settings)

    def rehearsed(self) -> None:
        """Rehearse the candidate, at the rate that the tuning seed chooses, on the fresh seeds."""
        settings = self.settings(**self.tune())
        rates, tuning = self.own["rehearsed"]["again"], self.own["tuning_seed"]
        cells = [
            self.measured("rehearsed", tuning, "validation", settings | {"again": rate})
            for rate in rates
        ]
        means = [fmean(cell["right"].values()) for cell in cells]
        best = rates[means.index(max(means))]
        for seed in self.own["verdict"]["seeds"]:
            self.measured("rehearsed", seed, "test", settings | {"again": best})

    def second_try(self) -> None:
        """Choose another target on the tuning seed, then run it on seeds of its own."""
        chosen, tuning = self.tune(), self.own["tuning_seed"]
        targets = [
            self.settings(**chosen | changed) for changed in self.own["second_try"]["targets"]
        ]
        cells = [self.measured("layer by layer", tuning, "validation", each) for each in targets]
        rights = [fmean(cell["right"].values()) for cell in cells]
        row = 1 / (len(self.plan["tasks"]) * self.plan["rows"]["validation"])
        best = targets[most_right(rights, [ratio(cell) for cell in cells], row)]
        default = self.plan["defaults"] | {"rate": 1e-3, "again": 3e-4}
        for seed in self.own["second_try"]["seeds"]:
            self.measured("layer by layer", seed, "test", best)
            self.measured("default", seed, "test", default)

    def single(self) -> None:
        """Combine each stage with the base alone."""
        settings = self.settings(**self.tune())
        for seed in self.own["beside"]["seeds"]:
            case = self._case(seed, "shared", settings)
            for task, end in self.alone(case).items():
                arm = f"{task} and the base"
                named = {"arm": arm, "seed": seed, "prompt": "shared", "split": "test"}
                if R._key(named | {"settings": settings}) in self.cells:
                    continue
                rows = case.rows[task]["test"]
                state = self.layer_by_layer(case, {task: end})
                self._note(
                    case,
                    arm,
                    "test",
                    {task: self.lab.right(state, rows)},
                    learned={task: self.lab.right(end, rows)},
                    general=self.general.measure(state, "verdict"),
                    general_alone=self.general.measure(end, "verdict"),
                    base=self._base("verdict"),
                )

    def rivals(self) -> None:
        """Choose each rival's rate as `benchmarks/stages` does, then run it."""
        for arm in RIVALS:
            rates = [*self.plan["grids"]["rate"]]
            best = self._rate_of(arm, rates)
            if best in (min(rates), max(rates)):
                beyond = best / 3 if best == min(rates) else best * 3
                best = self._rate_of(arm, [*rates, float(f"{beyond:.0e}")])
            for seed in self.own["beside"]["seeds"]:
                self.measured(arm, seed, "test", self.plan["defaults"] | {"rate": best})

    def _rate_of(self, arm: str, rates: Sequence[float]) -> float:
        seed, common = self.own["tuning_seed"], self.plan["defaults"]
        cells = [self.measured(arm, seed, "validation", common | {"rate": rate}) for rate in rates]
        means = [fmean(cell["right"].values()) for cell in cells]
        return rates[means.index(max(means))]

    def own_question(self) -> None:
        """Run the candidate and the default where each task has its own question."""
        chosen = self.tune()
        default = self.plan["defaults"] | {"rate": 1e-3, "again": 3e-4}
        for seed in self.own["beside"]["seeds"]:
            self.measured("layer by layer", seed, "test", self.settings(**chosen), "own")
            self.measured("default", seed, "test", default, "own")


def most_right(rights: Sequence[float], ratios: Sequence[float], row: float) -> int:
    """Return the place of the most right answers; of those within one answer, the first."""
    return next(n for n, right in enumerate(rights) if right >= max(rights) - row - 1e-9)


def gentlest(rights: Sequence[float], ratios: Sequence[float], row: float) -> int:
    """Return the place of the smallest ratio among those within a point of the most right."""
    allowed = [n for n, right in enumerate(rights) if right >= max(rights) - 0.01 - 1e-9]
    return min(allowed, key=lambda n: ratios[n])


def ratio(cell: Mapping[str, Any]) -> float:
    """Return perplexity divided by the base's, the geometric mean over kinds of text."""
    own, base = cell["general"]["perplexity"], cell["base"]["perplexity"]
    return math.exp(fmean(math.log(own[kind] / base[kind]) for kind in own))


STUDIES = ["verdict", "second_try", "rehearsed", "beside", "single", "rivals", "own_question"]


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=["tuning", *STUDIES])
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = yaml.safe_load((HERE / "plan.yaml").read_text())
    stages = yaml.safe_load((options.stages / "plan.yaml").read_text())
    runner = Runner(plan, stages, options.data, options.output)
    if options.only == "tuning":
        print("chosen", runner.tune())
    for study in STUDIES:
        if options.only in (None, study):
            getattr(runner, study)()


if __name__ == "__main__":
    main()
