"""Train by trainers of others, in each of the processes that torchrun starts
(trainer/test_trainer_processes.py).

usage: many_trainers.py JOBS, a JSON list of jobs: "model" (a folder), "output", "kind" (of
trainer), "chain" and "arguments" (of the callback and the trainer), "stop" (the step where it is
killed, and resumed), "late" (add the callback when the trainer is made). Each process writes what
it saw.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from helpers_integrations import StopAt, make_trainer, peft_model, plain_model
from transformers import AutoTokenizer

from chainlora import ChainCallback
from chainlora.errors import ChainLoRAError
from chainlora.training.processes import leave_processes

RANK = os.environ.get("RANK", "0")


def make(job: dict[str, Any], callback: ChainCallback | None) -> Any:
    folder, output = Path(job["model"]), Path(job["output"])
    tokenizer, keys = AutoTokenizer.from_pretrained(folder), job.get("arguments", {})
    if job.get("kind", "Trainer") == "Trainer":
        return make_trainer(peft_model(folder), tokenizer, output, callback, **keys)
    from helpers_trl import MAKERS

    if job["kind"] == "DPOTrainer":  # computed before, it would need rows in files (TRL's cache)
        keys = {"precompute_ref_log_probs": False, "ref_model": plain_model(folder)} | keys
    return MAKERS[job["kind"]](folder, tokenizer, output, callback, **keys)


def run(job: dict[str, Any]) -> dict[str, Any]:
    callback = ChainCallback(**job["chain"])
    try:
        trainer = make(job, None if job.get("late") else callback)
        if job.get("late"):
            trainer.add_callback(callback)
        if stop := job.get("stop"):
            trainer.add_callback(StopAt(stop))
            try:
                trainer.train()
            except KeyboardInterrupt:
                trainer = make(job, ChainCallback(**job["chain"]))
        trainer.train(resume_from_checkpoint="stop" in job)
        # what it computes, in every process
        score = trainer.evaluate()["eval_loss"]
        trainer.model.save_pretrained(f"{job['output']}/final-{RANK}")
    except ChainLoRAError as error:
        return {"error": str(error)}
    return {"score": score, "step": trainer.state.global_step, "history": trainer.state.log_history}


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        Path(f"{job['output']}.json.{RANK}").write_text(json.dumps(run(job)))
    leave_processes()


if __name__ == "__main__":
    main()
