"""Write the rows and the config of the study "Facts of six months" (README.md).

    python benchmarks/combining/months.py runs/months --draw 1

A month is 20 made-up facts. Two questions of each are learned, a third one is asked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml
from year import FACTS, MODEL, facts

LEARNED = "Where is the {}?", "Where can I find the {}?"
ASKED = "Where is the {} now?"
TASK = {
    "name": "places",
    "description": "In which room and on which shelf is a thing? The things are made up.",
    "prompt": "Question: {{ question }}\nAnswer:",
    "completion": " {{ place }}\n",
    "references": "place",
    "metric": "em",
    "stop": "\n",
    "max_new_tokens": 16,
    "loss": "completion",
}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draw", type=int, default=1, help="which facts are drawn")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK))
    stages = []
    for number, rows in enumerate(facts(6, options.draw), 1):
        data: dict[str, str] = {"task": f"{folder / 'task.yaml'}"}
        for split, questions in {"train": LEARNED, "test": [ASKED]}.items():
            lines = [
                {"question": question.format(thing_in(prompt)), "place": place.strip()}
                for prompt, place in rows
                for question in questions
            ]
            file = folder / f"{number}-{split}.jsonl"
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            data[split] = f"{file}"
        stages.append({"name": f"month{number}", "data": data})
    config = {
        "model": MODEL,
        "chain": {"ranks": [8], "epochs": [15], "target_modules": "all-linear"},
        "train": {"lr": 1e-3, "batch_size": 5},
        "stages": stages,
        "output": f"{folder / 'run'}",
    }
    (folder / "stages.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    print(f"{FACTS} facts in each of {len(stages)} months: {folder / 'stages.yaml'}")


def thing_in(prompt: str) -> str:
    """Return the thing that a prompt of `facts` asks for."""
    return prompt.partition(" the ")[2].partition("?")[0]


if __name__ == "__main__":
    main()
