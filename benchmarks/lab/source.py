"""The lab's model: a tiny trained Llama, from a folder or made on the spot (`make_model.py`)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from model import Tiny
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent


def data_folder() -> Path | None:
    """Return the folder with `models` and `data`, if there is one."""
    folder = Path(os.environ.get("CHAINLORA_TEST_DATA", HERE.parents[2] / "shared"))
    return folder if folder.is_dir() else None


def model_folder(given: str | None) -> Path:
    """Return the folder of the model: the given one, stories260k, or one that is made now."""
    if given is not None:
        return Path(given)
    shared = data_folder()
    if shared is not None and (shared / "models" / "stories260k").is_dir():
        return shared / "models" / "stories260k"
    made = HERE / "made_model"
    if not (made / "model.safetensors").is_file():
        from make_model import make_model

        make_model(made)
    return made


class TextTokenizer:
    """A tokenizer of the `tokenizers` library, and the token between documents."""

    def __init__(self, folder: Path) -> None:
        self._inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.separator = 1
        self.encode_batch = self._inner.encode_batch


def load_tiny(folder: Path, length: int) -> Tiny:
    """Return the model taken apart, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Tiny(model, length)
