"""What a chain costs past these machines: ``python benchmarks/scale/cost_model.py``.

Formulas for memory, traffic, knots and disk, each term beside a measurement at small size
(`--check`, a minute on two cores), and their values for Llama-2-7B and a 70B model on 1, 8 and 64
GPUs. Writes cost_model.json and cost_model.md beside this file. Sizes are in bytes, decimal.

Not in the model: activations, which depend on neither chain nor engine (benchmarks/speed).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
F32, BF16, INT64, INT32 = 4, 2, 8, 4
LINE = 40  # what else a store has of a row: its number, its size and its span, as JSON
BRANCH_RANK = 64  # most that deposits of a carried link of rank 8 are stacked to
KEPT_EPOCHS = 3  # orders of rows in memory


@dataclass(frozen=True)
class Machine:
    """What a process computes and moves in a second: numbers to replace by those at hand."""

    matmul: float = 4e14  # FLOP/s sustained in bfloat16: 40 % of an H100's peak
    host: float = 1e10  # bytes/s of host memory that a process merges at, on one thread
    disk: float = 2e9  # bytes/s of a checkpoint read for the first time


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's shape."""

    name: str
    layers: int
    hidden: int
    width: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(out, in) of the linear layers of one decoder layer."""
        kv = self.hidden // self.heads * self.kv_heads
        h, w = self.hidden, self.width
        return [(h, h), (kv, h), (kv, h), (h, h), (w, h), (w, h), (h, w)]

    @property
    def adapted(self) -> int:
        """Weights that links on all linear layers change."""
        return self.layers * sum(out * inner for out, inner in self.projections)

    @property
    def embedding(self) -> int:
        """Entries of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        ends = self.embedding * (1 if self.tied else 2)
        return self.adapted + ends + (2 * self.layers + 1) * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of a decoder layer."""
        return self.adapted // self.layers + 2 * self.hidden

    @property
    def unit(self) -> int:
        """Parameters of the largest module that FSDP2 gathers at once."""
        return max(self.layer, self.embedding)

    def lora(self, rank: int) -> int:
        """Parameters of a link on all linear layers."""
        return self.layers * sum(rank * (out + inner) for out, inner in self.projections)


@dataclass(frozen=True)
class Run:
    """A chain on some processes."""

    shape: Shape
    processes: int = 1
    shards: bool = False
    rank: int = 8
    links: int = 4
    hold: str = "tied"
    soft: bool = False

    @property
    def parts(self) -> int:
        """Parts that weights are cut into."""
        return self.processes if self.shards else 1

    # --- memory of a process, on its device ---

    def weights(self) -> float:
        """Bytes of the base weights."""
        return BF16 * self.shape.parameters / self.parts

    def gathered(self) -> float:
        """Bytes of weights that are whole beside the shares: a module, and the layer that is
        fetched meanwhile, each with the buffer that it arrives in."""
        return 2 * BF16 * (self.shape.unit + self.shape.layer) if self.shards else 0

    def link(self) -> float:
        """Bytes of the live link: factors, gradients, two moments; and their sum in one piece,
        where processes exchange it."""
        return F32 * self.shape.lora(self.rank) * (5 if self.processes > 1 else 4)

    def branch(self) -> float:
        """Bytes of the frozen branch, in the last link."""
        if self.hold == "tied":
            return 0
        rank = self.rank * (self.links - 1) + (BRANCH_RANK if self.soft else 0)
        return F32 * self.shape.lora(1) * rank

    def memory(self) -> float:
        """Bytes of a process on its device, without activations."""
        return self.weights() + self.gathered() + self.link() + self.branch()

    def host(self) -> float:
        """Bytes of a process's host memory that live between knots: exact weights of soft knots."""
        exact = self.hold == "tied" and self.soft
        return F32 * self.shape.adapted / self.parts if exact else 0

    # --- the knot after the last link ---

    def knot_read(self) -> float:
        """Bytes of pristine weights that a process reads."""
        return BF16 * self.shape.adapted / self.parts if self.hold == "tied" else 0

    def knot_written(self) -> float:
        """Bytes of weights, or of the frozen branch, that a process writes."""
        if self.hold == "tied":
            return BF16 * self.shape.adapted / self.parts
        return F32 * self.shape.lora(1) * self.rank * self.links

    def knot_traffic(self) -> float:
        """Bytes of host memory that a knot reads and writes: a weight is read, widened (written),
        read and written once a link, and read to be rounded."""
        if self.hold == "carried":
            return 2 * self.knot_written()
        per_weight = BF16 + F32 + 2 * F32 * self.links + F32 + BF16
        return per_weight * self.shape.adapted / self.parts

    def knot_seconds(self, machine: Machine, *, cached: bool = True) -> float:
        """Seconds of a knot; `cached`: the checkpoint is in the system's memory."""
        reading = 0.0 if cached else self.knot_read() / machine.disk
        return reading + self.knot_traffic() / machine.host

    def soft_knot_seconds(self, machine: Machine) -> float:
        """Seconds of one soft knot: exact weights are read and written, and rounded into those of
        the model; carried, the branch is filled again."""
        if self.hold == "carried":
            return 2 * self.branch() / machine.host
        return (2 * F32 + F32 + BF16) * self.shape.adapted / self.parts / machine.host

    # --- a step ---

    def step_sum(self) -> float:
        """Bytes that each process gives into the sum of gradients."""
        return F32 * self.shape.lora(self.rank) if self.processes > 1 else 0

    def step_gathered(self) -> float:
        """Bytes of weights that each process gets in a micro-batch, from itself too: forward all
        of them, backward all but the embedding."""
        if not self.shards:
            return 0
        once = BF16 * self.shape.parameters
        back = once if self.shape.tied else once - BF16 * self.shape.embedding
        return once + back

    def step_seconds(self, machine: Machine, tokens: int) -> float:
        """Seconds of computing a step of so many tokens: forward, and backward to the inputs of
        frozen weights."""
        return 4 * self.shape.parameters * tokens / self.processes / machine.matmul

    # --- disk ---

    def link_file(self) -> float:
        """Bytes of one link."""
        return F32 * self.shape.lora(self.rank)

    def checkpoint(self) -> float:
        """Bytes of a checkpoint inside a link: factors, two moments, and what soft knots tied."""
        deposits = 0.0
        if self.soft:
            branch = F32 * self.shape.lora(1) * BRANCH_RANK
            deposits = F32 * self.shape.adapted if self.hold == "tied" else branch
        return 3 * F32 * self.shape.lora(self.rank) + deposits

    def directory(self) -> float:
        """Bytes of a run directory while the last link is tuned."""
        return self.link_file() * (self.links - 1) + self.checkpoint()


def store(rows: float, tokens: int) -> float:
    """Bytes on disk of tokenised rows of one sequence with one scored span."""
    return rows * (INT32 * tokens + 2 * INT64 + LINE)


def order(rows: float) -> float:
    """Bytes of memory of the order of an epoch."""
    return INT64 * rows


LLAMA_7B = Shape("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000)
LLAMA_70B = Shape("70B", 80, 8192, 28672, 64, 8, 32000)


# --- checks ---


def check(folder: Path) -> list[tuple[str, float, float]]:
    """Return (term, by the model, measured)."""
    os.environ.setdefault("RANK", "0")
    import child
    import run as runs
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small = Shape("small", 4, 128, 352, 4, 2, 256)
    runs.make_model(folder / "model", runs.llama(256, 128, 352, 4, 4, 2), torch.bfloat16)
    runs.make_rows(folder)
    keys = {"dtype": "bfloat16"}
    two = [runs.job(folder, "ddp", keys, traffic=True)]
    two += [runs.job(folder, "fsdp", keys | {"shard": "fsdp2"}, traffic=True)]
    runs.launch(2, folder, two)
    told = {"one": child.run(runs.job(folder, "one", keys, stop=8, traffic=True))["traffic"]}
    for name in ("ddp", "fsdp"):
        told[name] = json.loads((folder / f"{name}.json.0").read_text())["traffic"]
    one, ddp = Run(small, links=2), Run(small, 2, links=2)
    fsdp = Run(small, 2, shards=True, links=2)
    with torch.device("meta"):
        large = LlamaForCausalLM(LlamaConfig())  # the defaults are Llama-2-7B's
    link = next((folder / "one/links").iterdir())
    checkpoint = next((folder / "one/stages/main/checkpoints").iterdir())
    return [
        ("parameters, 7B", LLAMA_7B.parameters, float(large.num_parameters())),
        ("parameters, small", small.parameters, small_parameters(folder / "model")),
        ("a link on disk", one.link_file(), size(link)),
        ("a checkpoint on disk", one.checkpoint(), size(checkpoint)),
        ("read at a knot, one", one.knot_read(), told["one"]["read"]),
        ("written at a knot, one", one.knot_written(), told["one"]["written"]),
        ("read at a knot, FSDP2 2", fsdp.knot_read(), told["fsdp"]["read"]),
        ("written at a knot, FSDP2 2", fsdp.knot_written(), told["fsdp"]["written"]),
        ("gradients a step, DDP 2", ddp.step_sum(), told["ddp"]["summed"]),
        ("gradients a step, FSDP2 2", fsdp.step_sum(), told["fsdp"]["summed"]),
        ("gathered a step, FSDP2 2", fsdp.step_gathered(), told["fsdp"]["gathered"]),
        *check_data(folder),
        *check_memory(runs),
        check_knot(runs),
    ]


def small_parameters(folder: Path) -> float:
    """Return the number of parameters stored in a folder."""
    from safetensors.torch import load_file

    tensors = [load_file(path) for path in folder.glob("*.safetensors")]
    return float(sum(t.numel() for part in tensors for t in part.values()))


def size(folder: Path) -> float:
    """Return the bytes of tensors in a folder, headers of files included."""
    return float(sum(path.stat().st_size for path in folder.glob("*.safetensors")))


def check_data(folder: Path) -> list[tuple[str, float, float]]:
    """Compare the size of tokenised rows, and of an order."""
    import numpy as np

    from chainlora.data.examples import Example
    from chainlora.data.mixture import epoch_order
    from chainlora.data.rows import flatten

    rows, tokens = 5000, 60
    line = tuple(range(tokens))
    arrays = flatten([Example(i, (line,), (((tokens // 2, tokens),),)) for i in range(rows)])
    held = epoch_order(np.zeros(10**6, np.int32), 8, 0, 0, False)
    return [
        ("rows on disk", store(rows, tokens), float(sum(a.nbytes for a in arrays.values()))),
        ("order of an epoch", order(10**6), float(held.rows.nbytes)),
    ]


def check_memory(runs: Any) -> list[tuple[str, float, float]]:
    """Compare memory with what run.py has measured: of FSDP2, above the start."""
    path = HERE / "results.json"
    measured = json.loads(path.read_text()).get("memory") if path.is_file() else None
    if measured is None:
        return []
    c = runs.LARGE
    heads = (c.num_attention_heads, c.num_key_value_heads)
    shape = Shape("0.33B", c.num_hidden_layers, c.hidden_size, c.intermediate_size, *heads, 32000)
    found = []
    for count in (2, 4):
        run = Run(shape, count, shards=True, links=2)
        level = max(each["levels"]["loading"] for each in measured[str(count)])
        peak = max(each["peaks"]["step"] for each in measured[str(count)])
        found += [
            (f"weights of a process, FSDP2 {count}", run.weights(), float(level)),
            (f"most in a step, FSDP2 {count}", run.memory(), float(peak)),
        ]
    return found


def check_knot(runs: Any) -> tuple[str, float, float]:
    """Compare the seconds of a knot with the rate at which one block is widened and merged into,
    on one thread: processor time."""
    import torch
    from transformers import LlamaForCausalLM

    from chainlora import Chain, LinkConfig

    torch.set_num_threads(1)
    block, b, a = torch.ones(4096, 4096).bfloat16(), torch.ones(4096, 8), torch.ones(8, 4096)
    began = time.process_time()
    for _ in range(3):
        block.float().addmm_(b, a)
    host = 3 * (BF16 + 3 * F32) * block.numel() / (time.process_time() - began)
    shape = Shape("wide", 2, 2048, 5504, 16, 16, 256)
    config = runs.llama(256, 2048, 5504, 2, 16, 16)
    chain = Chain(LlamaForCausalLM(config).to(torch.bfloat16))
    links = 3
    for _ in range(links):
        chain.extend(LinkConfig(rank=8, target_modules="all-linear"))
        began = time.process_time()
        chain.tie()
        seconds = time.process_time() - began
    predicted = Run(shape, links=links).knot_seconds(Machine(host=host))
    return ("seconds of a knot", predicted, seconds)


# --- tables ---


def report(checks: list[tuple[str, float, float]]) -> str:
    """Return the tables."""
    lines = ["# Cost model", "", "`python benchmarks/scale/cost_model.py --check`.", ""]
    if checks:
        lines += ["| term | model | measured | measured / model |", "|---|---|---|---|"]
        lines += [
            row(name, number(model), number(found), f"{found / model:.3f}")
            for name, model, found in checks
        ]
        worst = max(checks, key=lambda each: abs(math.log(each[2] / each[1])))
        lines += ["", f"Largest disagreement: {worst[0]}, {worst[2] / worst[1]:.2f}.", ""]
    for shape in (LLAMA_7B, LLAMA_70B):
        lines += [*memory_table(shape), *knot_table(shape), *disk_table(shape)]
    return "\n".join([*lines, *data_lines()])


def memory_table(shape: Shape) -> list[str]:
    """Memory and traffic under each engine."""
    lines = [
        f"## {shape.name}: memory a GPU and traffic, GB",
        "",
        "Four links of rank 8 on all linear layers, bfloat16, without activations.",
        "",
        "| engine | weights | gathered | live link | branch if carried | sum, tied | sum, carried "
        "| host, soft and tied | gathered a micro-batch | gradients a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, count, shards in engines():
        tied = Run(shape, count, shards)
        carried = Run(shape, count, shards, hold="carried")
        exact = "–" if shards else gigabytes(Run(shape, count, soft=True).host())
        cells = [tied.weights(), tied.gathered(), tied.link(), carried.branch()]
        cells += [tied.memory(), carried.memory()]
        traffic = [tied.step_gathered(), tied.step_sum()]
        lines.append(row(name, *map(gigabytes, cells), exact, *map(gigabytes, traffic)))
    return [*lines, ""]


def soft_knots(shape: Shape, steps: float, tokens: float) -> int:
    """How many soft knots `knots: auto` ties in a link of rank 8 that learns all its tokens."""
    from chainlora.config.schema import KnotConfig
    from chainlora.knots.numbers import spacing

    return int(steps / spacing(KnotConfig(), int(steps), tokens / steps / shape.lora(8)).every)


def knot_table(shape: Shape) -> list[str]:
    """The last knot of four, and its share of a run over 10⁹ rows."""
    rows, tokens, batch = 1e9, 256, 256
    machine, knots = Machine(), soft_knots(shape, rows / 4 / batch, rows / 4 * tokens)
    lines = [
        f"### {shape.name}: the fourth knot",
        "",
        f"Host memory {machine.host:.0e} bytes/s a process, disk {machine.disk:.0e}, "
        f"{machine.matmul:.0e} FLOP/s a GPU. 10⁹ rows of {tokens} tokens, once, {batch} a step, in "
        f"four links. Soft knots, as `knots: auto` plans them: {knots:,} a link.",
        "",
        "| engine | read, GB | written, GB | tied, s | first read from disk, s | carried, s "
        "| days of a run | share of whole knots | of soft knots, tied | of soft, carried |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, count, shards in engines():
        tied = Run(shape, count, shards)
        carried = Run(shape, count, shards, hold="carried", soft=True)
        link = rows / 4 / batch * tied.step_seconds(machine, tokens * batch)
        knot = tied.knot_seconds(machine)
        soft = "–" if shards else f"{knots * tied.soft_knot_seconds(machine) / link:.1e}"
        moved = gigabytes(tied.knot_read()), gigabytes(tied.knot_written())
        first, other = tied.knot_seconds(machine, cached=False), carried.knot_seconds(machine)
        seconds = f"{knot:.2g}", f"{first:.2g}", f"{other:.2g}"
        shares = f"{knot / link:.1e}", soft
        shares += (f"{knots * carried.soft_knot_seconds(machine) / link:.1e}",)
        lines.append(row(name, *moved, *seconds, f"{4 * link / 86400:,.0f}", *shares))
    return [*lines, ""]


def disk_table(shape: Shape) -> list[str]:
    """Files of a run."""
    lines = [
        f"### {shape.name}: disk, GB",
        "",
        "| knots | a link | a checkpoint | run directory in the fourth link |",
        "|---|---|---|---|",
    ]
    for name, keys in (
        ("whole", {}),
        ("soft, tied", {"soft": True}),
        ("soft, carried", {"soft": True, "hold": "carried"}),
    ):
        run = Run(shape, **keys)  # type: ignore[arg-type]
        cells = (run.link_file(), run.checkpoint(), run.directory())
        lines.append(row(name, *map(gigabytes, cells)))
    return [*lines, ""]


def data_lines() -> list[str]:
    """10⁹ rows."""
    rows = 1e9
    return [
        "## 10⁹ rows",
        "",
        f"Tokenised rows of 256 tokens: {store(rows, 256) / 1e12:.2f} TB on disk, mapped into "
        f"memory. In memory, in each process: the order of an epoch, {order(rows) / 1e9:.0f} GB "
        f"({KEPT_EPOCHS * order(rows) / 1e9:.0f} GB with the first and the next one), and the "
        f"lengths of rows, {INT32 * rows / 1e9:.0f} GB.",
        "",
    ]


def engines() -> list[tuple[str, int, bool]]:
    """(name, processes, whether they share the model)."""
    many = [(f"{kind} {n}", n, kind == "FSDP2") for n in (8, 64) for kind in ("DDP", "FSDP2")]
    return [("one", 1, False), *many]


def row(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def gigabytes(value: float) -> str:
    """Return bytes as GB."""
    return f"{value / 1e9:.2f}" if value < 1e10 else f"{value / 1e9:.0f}"


def number(value: float) -> str:
    """Return a quantity for a table."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Compute, check where asked, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path = HERE / "cost_model.json"
    if options.check:
        with tempfile.TemporaryDirectory() as scratch:
            path.write_text(json.dumps(check(Path(scratch)), indent=1) + "\n")
    checks = json.loads(path.read_text()) if path.is_file() else []
    (HERE / "cost_model.md").write_text(report([(n, float(m), float(f)) for n, m, f in checks]))


if __name__ == "__main__":
    main()
