"""A trainer on the tiny model."""

from __future__ import annotations

import pytest
from helpers_integrations import make_trainer, peft_model


@pytest.fixture
def make(tiny_folder, tokenizer, tmp_path):
    """Make a Trainer: by default on the tiny model with an untrained LoRA, in `tmp_path`."""

    def trainer(callback, model=None, output=tmp_path, **keys):
        return make_trainer(model or peft_model(tiny_folder), tokenizer, output, callback, **keys)

    return trainer


@pytest.fixture
def run(make):
    """Make a Trainer, and train."""

    def trained(callback, **keys):
        trainer = make(callback, **keys)
        trainer.train()
        return trainer

    return trained
