"""Make the lab's model where none is at hand: ``python benchmarks/lab/make_model.py [FOLDER]``.

A Llama of 0.26 M parameters in the shape of stories260k (dimension 64, 5 layers, 512 tokens),
trained for two minutes on the English of Python's language reference, which every Python has. It
knows no source code and no arithmetic, so there is something to learn from the lab's texts.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch
from texts import batches
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

VOCABULARY, LENGTH, ROWS, STEPS, LR = 512, 64, 16, 1500, 3e-3
_SPECIAL = ["<unk>", "<s>", "</s>"]  # the separator of documents is token 1, as in stories260k


def make_model(folder: Path, steps: int = STEPS) -> None:
    """Train a tokenizer and a model, and save both in `folder`."""
    documents = list(import_module("pydoc_data.topics").topics.values())
    tokenizer = _tokenizer(documents)
    stream = [i for e in tokenizer.encode_batch(documents) for i in [1, *e.ids]]
    count = len(stream) // (LENGTH + 1)
    blocks = torch.tensor(stream[: count * (LENGTH + 1)]).view(count, LENGTH + 1)
    model = _train(blocks, steps)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    model.save_pretrained(folder)  # last: the model file says that the folder is complete


def _tokenizer(documents: list[str]) -> Tokenizer:
    """Return a byte-level tokenizer trained on `documents`; it can write any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _train(blocks: torch.Tensor, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config())
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    for step, batch in enumerate(batches(blocks, ROWS, steps, seed=0)):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"model: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    return model


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    default = Path(__file__).resolve().parent / "made_model"
    make_model(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
