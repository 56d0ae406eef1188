"""One architecture against plain transformers and peft: what is right, what is refused, what wrong.

Everything goes through the public interface: `train` on a model folder, its records, `load_run`,
`export_merged`, `export_adapter`, `Engine`. The reference beside it is written out here: a
right-padded batch through the model's own forward, PEFT's layers, torch's optimizer.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from conftest import byte_tokens
from helpers import start_as_ours
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from architectures.tiny import CONTEXT, IMPOSSIBLE, VARIANTS, VOCABULARY, model_types, tiny_model
from chainlora import export_adapter, export_merged, load_run, make_config, train
from chainlora.chain.adapters.targets import matched_modules
from chainlora.data.examples import Example
from chainlora.data.splits import prepare_splits
from chainlora.engine.engine import Engine
from chainlora.errors import ChainLoRAError, ModelError
from chainlora.evaluation.generation import generate_greedy
from chainlora.models.text_config import base_model

STEPS = 2  # of each of two links
LEARNING_RATE = 0.2  # of SGD on gradients clipped to norm 1
# Rounding in float32 over a few layers, of a hidden state and of a loss; and how far beyond its own
# difference between a padded batch and one row a model may be, before training and after it: four
# steps of Qwen 3.5's recurrence amplify rounding by a thousand, plain or ours.
HIDDEN, LOSS, OWN = 2e-5, 2e-5, 20.0
# PEFT 0.21 loads adapters of these without some factors, those that it saved too, and warns of it.
MISREAD = {"inkling2_loop_text", "inkling2_text", "laguna"}


@dataclass
class Result:
    """What was found about an architecture."""

    name: str
    kind: str = ""  # the class
    outcome: str = "wrong"  # right, refused or wrong
    why: str = ""  # the refusal, or what is wrong
    path: str = ""
    notes: list[str] = field(default_factory=list)
    exports: str = ""
    differences: dict[str, float] = field(default_factory=dict)


def cases() -> list[str]:
    """Return the names of all cases: every model type that can be made tiny, and the variants."""
    return [*(name for name in model_types() if name not in IMPOSSIBLE), *VARIANTS]


def check(name: str, work: Path) -> Result:
    """Train, score and export the tiny model of a case in `work`, beside the plain way."""
    result = Result(name)
    model_type, changes = VARIANTS.get(name, (name, {}))
    with _quiet():
        model = tiny_model(model_type, **changes)
        result.kind = type(model).__name__
        folder, run = work / "model", work / "run"
        config = example_config(model, work)
        records: list[Any] = []
        try:
            final = train(config, listener=records.append)
        except ChainLoRAError as error:
            result.why = str(error)
            claimed = run.exists() and any(run.iterdir())
            result.outcome = "wrong" if claimed else "refused"
            return result
        plan = next(record for record in records if record.name == "plan")
        result.path, result.notes = plan.path, plan.notes
        losses = [record.loss for record in records if record.name == "step"]
        _compare(result, config, folder, run, losses, final["metrics"]["test"]["loss"])
        # a difference that is not a number is too large, too
        wrong = {k: v for k, v in result.differences.items() if not v <= 1.0}
        result.why = ", ".join(f"{k} off by {v:.1e}" for k, v in wrong.items())
        result.outcome = "wrong" if result.why else "right"
    return result


def example_config(model: Any, work: Path) -> Any:
    """Save a model and rows in `work`; return the config of a run on them."""
    model.save_pretrained(work / "model")
    _tokenizer().save_pretrained(work / "model")
    return make_config(
        {
            "model": str(work / "model"),
            "output": str(work / "run"),
            "data": _rows(work),
            "chain": {"ranks": [2, 2], "alpha": 4, "steps": [STEPS, STEPS]},
            "train": {
                "optimizer": "sgd",
                "lr": LEARNING_RATE,
                "schedule": "constant",
                "max_grad_norm": 1.0,
                "batch_size": 8,
                "eval_at_knots": False,
                "save_every": None,
            },
        }
    )


def _compare(
    result: Result, config: Any, folder: Path, run: Path, losses: list[float], scored: float
) -> None:
    """Note every difference, of what it may be."""
    tokenizer = _tokenizer()
    splits = prepare_splits(config.data, tokenizer, CONTEXT)
    rows, test = list(splits.train), list(splits.test)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    own = _own_difference(plain, rows)
    result.differences |= _engine_differences(folder, rows, own)
    expected, chained = _plain_chain(folder, config, rows)
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    result.differences["step loss"] = worst / (LOSS + OWN * own)
    reference = _plain_loss(chained, test)
    _, alone = _plain_chain(folder, config, rows, _plain_loss_of_rows)
    drift = abs(_plain_loss(alone, test) - reference) / reference
    largest = LOSS + OWN * max(own, _if_rounding(drift))
    result.differences["test loss"] = abs(scored - reference) / reference / largest
    live, _ = load_run(run)
    result.differences["live"] = abs(_plain_loss(live, test) - reference) / reference / largest
    result.differences["greedy answers"] = 2.0 * _greedy_differs(live, tokenizer, rows)
    result.differences |= _export_differences(result, folder, run, test, reference, largest)


# --- what ours is compared with ---


def _padded(rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return token ids without each row's last, and their mask, [rows, longest]."""
    inputs = [torch.tensor(row.sequences[0][:-1]) for row in rows]
    mask = [torch.ones_like(tokens) for tokens in inputs]
    return pad_sequence(inputs, batch_first=True), pad_sequence(mask, batch_first=True)


def _scored(rows: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row, position, target) of every scored token."""
    places = [
        (i, position - 1, row.sequences[0][position])
        for i, row in enumerate(rows)
        for start, end in row.scored[0]
        for position in range(start, end)
    ]
    index, position, target = torch.tensor(places).T
    return index, position, target


def _plain_mean_loss(model: Any, rows: Sequence[Example]) -> Tensor:
    ids, mask = _padded(rows)
    index, position, target = _scored(rows)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return cross_entropy(logits[index, position].float(), target)


def _plain_loss_of_rows(model: Any, rows: Sequence[Example]) -> Tensor:
    """Return the loss per token, each row by itself: what a score may depend on."""
    counts = [len(_scored([row])[0]) for row in rows]
    losses = [n * _plain_mean_loss(model, [row]) for n, row in zip(counts, rows, strict=True)]
    return torch.stack(losses).sum() / sum(counts)


@torch.no_grad()
def _plain_loss(model: Any, rows: Sequence[Example]) -> float:
    return _plain_loss_of_rows(model.eval(), rows).item()


@torch.no_grad()
def _plain_hidden(model: Any, rows: Sequence[Example]) -> Tensor:
    """Return the hidden states [N, d] that predict each scored token."""
    ids, mask = _padded(rows)
    index, position, _ = _scored(rows)
    output = base_model(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    return output.last_hidden_state[index, position]


def _plain_chain(
    folder: Path,
    config: Any,
    rows: list[Example],
    mean_loss: Callable[..., Tensor] = _plain_mean_loss,
) -> tuple[list[float], Any]:
    """Tune two links by PEFT and torch alone; return the losses and the merged model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for index, link in enumerate(config.chain.links()):
        targets = sorted(matched_modules(model, link))
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=link.rank, lora_alpha=link.alpha, target_modules=targets)
        )
        start_as_ours(wrapped, link, config.train.seed, index)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=0.9)
        for _ in range(STEPS):
            wrapped.train()
            loss = mean_loss(wrapped, rows)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model = wrapped.merge_and_unload()
    return losses, model


# --- differences, each as a share of what it may be ---


def _relative(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()


def _own_difference(model: Any, rows: list[Example]) -> float:
    """Return how far a padded batch is from its rows one by one, in plain transformers."""
    batch = _plain_hidden(model, rows)
    alone = torch.cat([_plain_hidden(model, [row]) for row in rows])
    return _if_rounding(_relative(batch, alone))


def _if_rounding(found: float) -> float:
    """Return a difference between a padded batch and its rows, if it is rounding: more where sums
    are ill-conditioned. Else the batch is what transformers computes, and nothing is added."""
    return found if found < 1e-3 else 0.0


def _engine_differences(folder: Path, rows: list[Example], own: float) -> dict[str, float]:
    """Hidden states of short rows, of all rows, and of rows with a common beginning, in float32
    and in bfloat16."""
    short = [row for row in rows if len(row.sequences[0]) < 45]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        exact = AutoModelForCausalLM.from_pretrained(folder).eval()
        if _fails(_plain_hidden, model, rows):  # plain transformers: then we must, too
            found[f"{dtype} fails as plain"] = 0.0 if _fails(_ours, model, rows) else math.inf
            continue
        for name, batch in (("short rows", short), ("rows", rows), ("tree", _tree(rows))):
            plain = _plain_hidden(model, batch)
            ours = _ours(model, batch)
            if dtype is torch.float32:
                found[f"hidden states of {name}"] = _relative(ours, plain) / (HIDDEN + OWN * own)
                continue
            # as near to the float32 model as plain transformers is in bfloat16, where experts are
            # picked by rounding now and then; a wrong formula is off by tens of roundings
            wide = _plain_hidden(exact, batch)
            rounding = (plain - wide).norm() / wide.norm()
            theirs = (ours - wide).norm() / wide.norm()
            found[f"bfloat16 {name}"] = (theirs / (8 * rounding + 1e-3)).item()
    return found


def _fails(run: Callable[..., object], *given: object) -> bool:
    try:
        run(*given)
    except Exception:  # whatever an architecture trips over
        return True
    return False


@torch.no_grad()
def _ours(model: Any, rows: list[Example]) -> Tensor:
    """Return the hidden states [N, d] that predict each scored token, by our engine."""
    with Engine(model, training=True) as engine:
        packed = engine.pack(rows)
        return engine.hidden(packed)[packed.token_row]


def _tree(rows: list[Example]) -> list[Example]:
    """Rows that all begin like the longest."""
    longest = max(rows, key=lambda row: len(row.sequences[0])).sequences[0]
    return [
        Example(row.row, (longest[:30] + row.sequences[0][-8:],), (((31, 38),),)) for row in rows
    ]


def _greedy_differs(model: Any, tokenizer: Any, rows: list[Example]) -> bool:
    """Say whether prompts answered together get other answers than one by one."""
    prompts = [row.sequences[0][:size] for row, size in zip(rows, (5, 19, 12), strict=False)]
    try:
        alone = [_answer(model, tokenizer, prompt) for prompt in prompts]
    except Exception:  # plain transformers cannot: then we must refuse
        try:
            generate_greedy(model, tokenizer, prompts, max_new_tokens=6, stop=None)
        except ModelError:
            return False
        return True
    return generate_greedy(model, tokenizer, prompts, max_new_tokens=6, stop=None) != alone


def _answer(model: Any, tokenizer: Any, prompt: Sequence[int]) -> str:
    ids = torch.tensor([prompt])
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
    model.generation_config = greedy  # whatever the model's own says of its last token
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()


def _export_differences(
    result: Result, folder: Path, run: Path, rows: list[Example], reference: float, largest: float
) -> dict[str, float]:
    work, found = run.parent, {}
    export_merged(run, work / "merged")
    merged = AutoModelForCausalLM.from_pretrained(work / "merged")
    found["merged"] = abs(_plain_loss(merged, rows) - reference) / reference / largest
    export_adapter(run, work / "adapter")
    if result.name in MISREAD:
        result.exports = "merged; PEFT misreads the adapter"
        return found
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.PeftModel.from_pretrained(base, work / "adapter")
    found["adapter"] = abs(_plain_loss(adapted, rows) - reference) / reference / largest
    result.exports = "merged, adapter"
    return found


# --- files ---


def _rows(work: Path) -> dict[str, str]:
    """Write eight training rows, short ones and ones beyond every threshold, and four test rows."""
    draw = random.Random(0)

    def text(size: int) -> str:
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(size))

    beginning = text(12)
    lengths = {"train": (4, 9, 16, 21, 27, 32, 80, 120), "test": (6, 18, 33, 100)}
    files = {}
    for split, sizes in lengths.items():
        rows = [
            {"prompt": (beginning if i % 2 else "") + text(n), "completion": " " + text(4 + i)}
            for i, n in enumerate(sizes)
        ]
        files[split] = str(work / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokens(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    assert len(tokenizer) <= VOCABULARY
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the logs of two hundred architectures out of the way."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
