"""Write rows of the long sequence and a config of its 14 stages, for `chainlora compare`.

    python benchmarks/field/sequence.py runs/long --data path/to/data/sets
    chainlora compare runs/long/stages.yaml --methods combine,replay --seeds 0

The order is the paper's for seed 0, length and rate are those of the study.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml
from tasks import draw, order_of, written

HERE = Path(__file__).resolve().parent
KEYS = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "data": {"task": str(HERE / "field.yaml")},
    "chain": {"ranks": [8], "alpha": 16.0, "epochs": [1], "target_modules": "all-linear"},
    "train": {"lr": 1e-3, "batch_size": 8, "warmup_steps": 4},
}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--seed", type=int, default=0, help="draws rows and order")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stages = []
    for task in order_of(options.seed):
        files = {}
        for split, rows in draw(options.data, task, options.seed).items():
            file = folder / f"{task}-{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in written(task, rows)))
            files[split] = str(file)
        stages.append({"name": task, "data": files})
    config = KEYS | {"stages": stages, "output": str(folder / "run")}
    (folder / "stages.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    print(f"{len(stages)} tasks: {folder / 'stages.yaml'}")


if __name__ == "__main__":
    main()
