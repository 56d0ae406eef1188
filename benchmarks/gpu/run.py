"""The GPU suite: ``python benchmarks/gpu/run.py``, one command, at most eight minutes, no hub.

On a machine with CUDA, models have the shapes of OPT-1.3B and Llama-2-7B; elsewhere everything runs
at tiny size on the CPU, so that the suite cannot rot. Weights are random: speed and laws do not
depend on them.

    laws     a chain on this device: functions over extend, tie and drop, carried = tied, weights
             one cast of the exact sum, merged = live, and training equal to that of a CPU
    speed    tokens a second, share of the device's matmul peak, peak memory, time of a knot, host
             synchronisations a step: our engine beside PEFT's layers in a plain loop, which is what
             `Trainer` runs in a step, on the same rows
    combining  a combination of four states equal to that of a CPU, its seconds and peak memory
    carried  a 4-bit base, where bitsandbytes is there: one link and eight, beside plain QLoRA

A part that fails is a result; the others go on. Writes results-DEVICE.json and .md to --out.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig
from transformers.pytorch_utils import Conv1D

from chainlora import Chain, LinkConfig
from chainlora.chain.combining import Part
from chainlora.chain.link import Factors
from chainlora.chain.solving import combine
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine

HERE = Path(__file__).resolve().parent
_CPU = torch.device("cpu")
LIMIT = 460.0  # seconds; a part that would begin later is left out, and said
_SMALL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
TINY = {
    "llama": LlamaConfig(intermediate_size=128, num_key_value_heads=2, **_SMALL),
    "opt": OPTConfig(ffn_dim=128, word_embed_proj_dim=64, dropout=0.0, **_SMALL),
    "gpt2": GPT2Config(bos_token_id=0, eos_token_id=0, **_SMALL, **_NO_DROPOUT),
}
LARGE = {
    "OPT-1.3B": OPTConfig(
        hidden_size=2048,
        ffn_dim=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        word_embed_proj_dim=2048,
        dropout=0.0,
    ),
    "Llama-2-7B": LlamaConfig(),  # the defaults are Llama-2-7B's
}


def main() -> None:
    """Run every part and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--tiny", action="store_true", help="tiny models on a GPU too")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_small = options.tiny or device.type == "cpu"
    suite = Suite(device)
    for dtype in (torch.float32, torch.bfloat16):
        for name, config in TINY.items():
            suite.part(f"laws {name} {_short(dtype)}", lambda c=config, d=dtype: laws(c, d, device))
    suite.part("training as on a CPU", lambda: same_training(device))
    suite.part("combining as on a CPU", lambda: same_combination(device))
    shapes = {"tiny Llama": TINY["llama"]} if is_small else LARGE
    rows, length, steps = (4, 32, 3) if is_small else (8, 512, 12)
    for name, config in shapes.items():
        suite.part(f"speed {name}", lambda c=config: speed(c, rows, length, steps, device))
        _free()
    name, config = next(iter(shapes.items()))
    suite.part(f"combining {name}", lambda: combining(config, rows * 8, length // 8, device))
    _free()
    if not is_small:
        suite.part("carried, 4 bits", lambda: carried(LARGE["OPT-1.3B"], rows, length, steps))
    suite.write(options.out)


class Suite:
    """What was found, and how much time is left."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.began = device, time.monotonic()
        self.parts: dict[str, Any] = {}

    def part(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run a part; note what it found, or why it did not."""
        began = time.monotonic()
        if began - self.began > LIMIT:
            self.parts[name] = {"left out": "no time was left"}
            return
        try:
            found = run()
        except Exception as error:  # a part that fails is a result
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        self.parts[name] = found | {"seconds": round(time.monotonic() - began, 1)}
        print(name, json.dumps(self.parts[name]), flush=True)

    def write(self, folder: Path) -> None:
        """Write one JSON and one table."""
        folder.mkdir(parents=True, exist_ok=True)
        kind = self.device.type
        gpu = torch.cuda.get_device_name() if kind == "cuda" else platform.machine()
        whole = {
            "device": gpu,
            "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "seconds": round(time.monotonic() - self.began),
            "versions": _versions(),
            "parts": self.parts,
        }
        (folder / f"results-{kind}.json").write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
        lines = [
            f"# GPU suite on {gpu}",
            "",
            f"`python benchmarks/gpu/run.py`, {whole['time']}, {whole['seconds']} s.",
            "",
            "| part | found |",
            "|---|---|",
            *(f"| {name} | {_shown(found)} |" for name, found in self.parts.items()),
        ]
        (folder / f"results-{kind}.md").write_text("\n".join(lines) + "\n", "utf-8")


# --- laws ---


def laws(config: Any, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return the largest difference of each law, of what rounding allows (1 is the limit)."""
    allowed = 1e-5 if dtype is torch.float32 else 3e-2  # of a logit's norm, over two layers
    model = _model(config, dtype, device)
    plain, ids = copy.deepcopy(model), _tokens(2, 24, device)
    found = {}
    chain = Chain(model)
    start = _logits(model, ids)
    pristine = {name: p.detach().clone() for name, p in model.named_parameters()}
    chain.extend(LinkConfig(rank=4, alpha=8, target_modules="all-linear"))
    found["extend"] = _difference(_logits(model, ids), start) / allowed
    _tune(chain, ids)
    before = _logits(model, ids)
    link = chain.tie()
    found["tie"] = _difference(_logits(model, ids), before) / allowed
    found["cast"] = max(
        _casts_off(chain, name, link, pristine[f"{name}.weight"]) for name in link.factors
    )
    other = Chain(plain, hold="carried")
    other.add(link)
    found["carried"] = _difference(_logits(plain, ids), _logits(model, ids)) / allowed
    chain.drop(1)
    chain.detach()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, pristine[n])]
    found["undo"] = float(len(changed))
    wrong = [name for name, value in found.items() if not value <= 1]
    return {name: round(value, 4) for name, value in found.items()} | {"wrong": len(wrong)}


@torch.no_grad()
def _casts_off(chain: Chain, name: str, link: Any, pristine: Tensor) -> float:
    """Return the error of a merged weight over that of one cast of the exact sum."""
    module = chain.model.get_submodule(name)
    layer = module.base_layer if hasattr(module, "base_layer") else module
    factors = link.factors[name]
    update = link.config.scaling * (factors.b.double() @ factors.a.double())
    update = update.T if isinstance(layer, Conv1D) else update
    exact = pristine.double() + update.to(pristine.device)
    cast = (exact.to(pristine.dtype).double() - exact).norm()
    allowed = 3 if pristine.dtype is torch.float32 else 1.01  # the sum itself is in float32
    return float((layer.weight.double() - exact).norm() / (allowed * cast))


def same_training(device: torch.device) -> dict[str, float]:
    """Return how far losses of ten steps on this device are from those on a CPU."""
    losses = []
    for place in (_CPU, device):
        model = _model(TINY["llama"], torch.float32, _CPU).to(place)
        losses.append([loss for loss, _ in _our_steps(model, _rows(4, 24), 10)])
    off = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    return {"largest relative difference of a loss": off}


# --- speed ---


def speed(config: Any, rows: int, length: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Measure our engine and a plain loop of PEFT on the same rows, in bfloat16."""
    examples = _rows(rows, length)
    model = _model(config, torch.bfloat16, device)
    _forget_peak(device)
    ours = [seconds for _, seconds in _our_steps(model, examples, steps)]
    found = {"ours tokens/s": rows * length / statistics.median(ours[1:])}
    found["ours peak GB"] = _peak(device)
    peak = _matmul_peak(device)
    flops = 6 * sum(p.numel() for p in model.parameters()) * rows * length * 2 / 3
    found["ours share of matmul peak"] = flops / statistics.median(ours[1:]) / peak
    found["knot seconds"] = _knot_seconds(model)
    found["host synchronisations a step"] = _synchronisations(model, examples, device)
    _forget_peak(device)
    theirs = [seconds for _, seconds in _peft_steps(model, examples, steps)]
    found["PEFT tokens/s"] = rows * length / statistics.median(theirs[1:])
    found["PEFT peak GB"] = _peak(device)
    found["times as fast"] = found["ours tokens/s"] / found["PEFT tokens/s"]
    return {name: _rounded(value) for name, value in found.items()}


def _our_steps(
    model: Any, examples: list[Example], steps: int, *, links: int = 1, hold: str = "tied"
) -> Iterator[tuple[float, float]]:
    """Yield (loss, seconds) of each step of a chain's last link on our engine."""
    chain = Chain(model, hold=hold)
    config = LinkConfig(rank=8, alpha=16, target_modules=_targets(model))
    for _ in range(links - 1):
        chain.extend(config)
        chain.tie()
    adapter = chain.extend(config)
    optimizer = torch.optim.AdamW(chain.parameters(), lr=1e-3)
    with Engine(model, training=True) as engine:
        engine.adapt(adapter.layers.values())
        for _ in range(steps):
            began = _now(model)
            loss, count = engine.loss(engine.pack(examples), "completion")
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item() / count, _now(model) - began
    chain.discard()
    if hold == "tied":  # a carried chain's model is not used again
        chain.detach()


def _peft_steps(model: Any, examples: list[Example], steps: int) -> Iterator[tuple[float, float]]:
    """Yield (loss, seconds) of each step of PEFT in a plain loop, as Trainer makes it."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(_targets(model)))
    wrapped = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.tensor([example.sequences[0] for example in examples], device=model.device)
    for _ in range(steps):
        began = _now(model)
        loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), _now(model) - began
    wrapped.unload()


def _knot_seconds(model: Any) -> float:
    chain = Chain(model)
    times = []
    for _ in range(3):
        chain.extend(LinkConfig(rank=8, alpha=16, target_modules=_targets(model)))
        began = _now(model)
        chain.tie()
        times.append(_now(model) - began)
    chain.drop(len(chain))
    chain.detach()
    return statistics.median(times)


def _synchronisations(model: Any, examples: list[Example], device: torch.device) -> int | None:
    """Return how often a step makes the host wait, the one for the loss included."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = _our_steps(model, examples, 3)
        next(steps), next(steps)
        caught.clear()
        torch.cuda.set_sync_debug_mode("warn")
        next(steps)
        torch.cuda.set_sync_debug_mode("default")
        list(steps)
    return sum("synchroniz" in str(warning.message).lower() for warning in caught)


def carried(config: Any, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Measure a step on a 4-bit base: PEFT alone, and ours with one link and with eight."""
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    device = torch.device("cuda")
    examples, found = _rows(rows, length), {}
    with tempfile.TemporaryDirectory() as folder:
        _model(config, torch.bfloat16, device).save_pretrained(folder)
        for name, links in (("PEFT", None), ("one link", 1), ("eight links", 8)):
            _free()
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised)
            model.requires_grad_(False)
            if links is None:
                run = _peft_steps(model, examples, steps)
            else:
                run = _our_steps(model, examples, steps, links=links, hold="carried")
            found[f"{name} s/step"] = statistics.median([s for _, s in run][1:])
    return {name: _rounded(value) for name, value in found.items()}


# --- combining ---


def same_combination(device: torch.device) -> dict[str, float]:
    """Return how far a combination on this device is from that of a CPU, as a share of its norm."""
    found = []
    for place in (_CPU, device):
        model = _model(TINY["llama"], torch.float32, _CPU).to(place)
        found.append(combine(model, _parts(model, 4, 16), 4).factors)
    pairs = [(found[0][name], found[1][name]) for name in found[0]]
    off = max(_difference(b.b.cpu() @ b.a.cpu(), a.b @ a.a) for a, b in pairs)
    return {"largest relative difference of an update": off}


def combining(config: Any, rows: int, length: int, device: torch.device) -> dict[str, Any]:
    """Measure the combination of four random states, in bfloat16."""
    model = _model(config, torch.bfloat16, device)
    parts = _parts(model, rows, length)
    _forget_peak(device)
    began = _now(model)
    combine(model, parts, 16)
    found = {"combination seconds": _now(model) - began, "peak GB": _peak(device)}
    return {name: _rounded(value) for name, value in found.items()}


def _parts(model: Any, rows: int, length: int) -> list[Part]:
    """Return four random states, drawn on the CPU, so that all devices have the same."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }

    def factors(out: int, into: int) -> Factors:
        a, b = (torch.randn(shape, generator=draw) for shape in ((4, into), (out, 4)))
        return Factors(a / into**0.5, 0.05 * b)

    tokens = torch.randint(0, 256, (4, rows, length), generator=draw).tolist()
    updates = [{name: factors(*shape) for name, shape in shapes.items()} for _ in tokens]
    pairs = zip(tokens, updates, strict=True)
    return [Part(f"part {place}", own, update) for place, (own, update) in enumerate(pairs)]


# --- models, rows, measures ---


def _model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def _targets(model: Any) -> tuple[str, ...]:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return ("q_proj", "v_proj") if "q_proj" in names else ("c_attn",)


def _tokens(rows: int, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, length), generator=generator).to(device)


def _rows(rows: int, length: int) -> list[Example]:
    tokens = _tokens(rows, length, _CPU).tolist()
    return [Example(i, (tuple(row),), (((1, length),),)) for i, row in enumerate(tokens)]


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _difference(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).double().norm() / theirs.double().norm())


def _tune(chain: Chain, ids: Tensor) -> None:
    optimizer = torch.optim.AdamW(chain.parameters(), lr=1e-2)
    for _ in range(3):
        chain.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _matmul_peak(device: torch.device) -> float:
    """Return operations a second of a large bfloat16 matmul here."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(6):
        began = _now(a)
        a @ a
        times.append(_now(a) - began)
    return 2 * size**3 / min(times)


def _now(there: Any) -> float:
    """Return the time once the device of a model or a tensor has done all it was told."""
    if there.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _shown(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "chainlora"):
        with suppress(PackageNotFoundError):
            found[name] = version(name).split("+")[0]
    return found


if __name__ == "__main__":
    main()
