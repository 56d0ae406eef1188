"""What people from other tools met in version 0.1: the command, and what each version prints.

    python benchmarks/pains/run.py                         what this version prints
    python benchmarks/pains/run.py --against OTHER/src     what version 0.1 prints, from its sources
    python benchmarks/pains/run.py --only Data export      some areas, some commands
    python benchmarks/pains/run.py --only                  none: the tables are made anew

The lines are kept in found.json, and the tables of docs/before_and_after.md made of them.

Commands are typed in a folder of tiny models and rows that is made on the spot (`make_world`), each
in a process and a copy of its own. One line of what is printed is shown: the error if there is
one, else the first line that `look` finds, else the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs/before_and_after.md"
KEPT = HERE / "found.json"
BEGIN, END = "<!-- begin: tables -->", "<!-- end: tables -->"
LONGEST = 300  # characters of a line that are shown
SECONDS = 60  # that a command may take
TEXT = "the cat sat on a mat and saw two red birds fly over a green hill "
SEEN = {"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "on a mat"}


class Pain(NamedTuple):
    """What is typed: a command line, or Python; and which line of the answer is looked at."""

    area: str
    typed: str
    look: str = ""
    code: str = ""  # Python that is run; `typed` then says it in short


CALLBACK = """
import peft, torch
from transformers import AutoModelForCausalLM as Auto, AutoTokenizer
from trl import SFTConfig, SFTTrainer
import chainlora
model, tokenizer = Auto.from_pretrained("base"), AutoTokenizer.from_pretrained("base")
keys = {}
if hasattr(chainlora, "ChainCallback"):
    keys = {"callbacks": [chainlora.ChainCallback(steps=2)],
            "peft_config": peft.LoraConfig(r=4, lora_alpha=8)}
else:
    chainlora.extend_chain(chainlora.Chain(model), chainlora.LinkConfig(rank=4, alpha=8))
from datasets import Dataset
rows = Dataset.from_list([{"text": line} for line in open("rows.jsonl")])
args = SFTConfig("sft", max_steps=4, save_steps=4, max_length=32, use_cpu=True, report_to=[],
                 learning_rate=1e-2, bf16=False, disable_tqdm=True)
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **keys)
trainer.train()
from safetensors.torch import load_file
from pathlib import Path
files = Path("sft/checkpoint-4").glob("*.safetensors")
names = [name for file in files for name in load_file(file)]
adapter = Path("sft/checkpoint-4/adapter_config.json").exists()
loader = peft.AutoPeftModelForCausalLM if adapter else Auto
ids = torch.tensor([[5, 9, 30, 7]])
again = loader.from_pretrained("sft/checkpoint-4").eval()
gap = (again(ids).logits - trainer.model.eval()(ids).logits).abs().max().item()
count = sum("base_layer" in name for name in names)
print(f"{count} of {len(names)} tensors are named base_layer; loaded by {loader.__name__}, logits "
      f"differ by {gap:.0e}")
"""
OWN_LOOP = """
import torch
from transformers import AutoModelForCausalLM
from chainlora import Chain, LinkConfig, extend_chain, tie_knot
chain = Chain(AutoModelForCausalLM.from_pretrained("base"))
extend_chain(chain, LinkConfig(rank=4, alpha=8))
"""
PAINS = [
    Pain(
        "Trainer and TRL",
        "the quickstart of `SFTTrainer` with a chain, and its `checkpoint-4` loaded again",
        code=CALLBACK,
    ),
    Pain(
        "Your own loop",
        '`save_chain(chain, "saved")`',
        code=OWN_LOOP + "from chainlora import save_chain\nsave_chain(chain, 'saved')\n"
        "import os; print(*sorted(os.listdir('saved')))",
    ),
    Pain(
        "Your own loop",
        '`export_adapter(chain, "adapter")`',
        code=OWN_LOOP + "tie_knot(chain)\nfrom chainlora import export_adapter\n"
        "print(export_adapter(chain, 'adapter'))",
    ),
    Pain(
        "Your own loop",
        "a step of one's own, `chain.count_step()`, and the link's `num_steps`",
        code=OWN_LOOP + "chain.count_step()\nprint(tie_knot(chain).num_steps)",
    ),
    Pain(
        "Your own loop",
        '`train("run.yaml")["steps"]`',
        code="from chainlora import train\nprint(train('run.yaml')['steps'])",
    ),
    Pain(
        "Your own loop",
        '`train(load_config("run.yaml"))`: what a script shows meanwhile',
        code="from chainlora import load_config, train\ntrain(load_config('run.yaml'))",
    ),
    Pain(
        "Your own loop",
        '`load_config("run.yaml", {"chain.ranks": [4, 2]}).chain.ranks`',
        code="from chainlora import load_config\n"
        "print(load_config('run.yaml', {'chain.ranks': [4, 2]}).chain.ranks)",
    ),
    Pain(
        "Other heads",
        "a link on `BertForSequenceClassification`, head in `extra_modules`: `save_chain`",
        code="import torch\nfrom transformers import BertConfig, BertForSequenceClassification\n"
        "from chainlora import Chain, LinkConfig, extend_chain, tie_knot\n"
        "model = BertForSequenceClassification(BertConfig(vocab_size=99, hidden_size=16, "
        "num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))\n"
        "chain = Chain(model)\n"
        "keys = {'target_modules': ('query',), 'extra_modules': ('classifier',)}\n"
        "extend_chain(chain, LinkConfig(rank=2, alpha=4, **keys))\n"
        "link = tie_knot(chain)\nfrom chainlora import load_chain, save_chain\n"
        "save_chain(chain, 'saved')\n"
        "again = load_chain('saved', BertForSequenceClassification(model.config))\n"
        "print(f'{len(again)} link, head {sorted(again.links[0].extra)}')",
    ),
    Pain("Data", "train run.yaml --data.train tools.jsonl", "train: |steps,"),
    Pain("Data", "train run.yaml --data.train parts.jsonl", "steps,"),
    Pain("Data", "train run.yaml --data.train sharegpt.jsonl", "sharegpt"),
    Pain("Data", "train run.yaml --data.train alpaca.jsonl", "alpaca"),
    Pain("Data", "train run.yaml --data.train conversational.jsonl", "conversational"),
    Pain("Data", "train run.yaml --data.train preferences.jsonl"),
    Pain(
        "Data",
        "train run.yaml --model bare --data.train chat.jsonl --data.chat_template chatml",
        "steps,",
    ),
    Pain("Data", "train run.yaml --data.train long.jsonl --data.max_length 32", "block|cut"),
    Pain(
        "Data",
        "train run.yaml --data.train long.jsonl --data.max_length 32 --data.truncation left",
        "block|cut|tokens",
    ),
    Pain("Data", "train run.yaml --data.train columns.jsonl", "nothing reads|not read"),
    Pain("Commands", "chat run --temperature 1 --seed 3 < words.txt"),
    Pain("Commands", "generate run --prompt 'the cat' --max-new-tokens 4"),
    Pain("Commands", "eval run"),
    Pain("Commands", "eval run --data rows.jsonl"),
    Pain("Commands", "export run --to adapter --rank 32 --output out"),
    Pain("Commands", "export run --to gguf --output out"),
    Pain("Commands", "inspect half", "not finished|unfinished|step 4"),
    Pain("Commands", "train run.yaml --train.log_every 2", "^step +2"),
    Pain("Commands", "`train run.yaml`, the seconds to its first line", code="FIRST"),
    Pain("Keys people know", "train run.yaml --chain.lora_r 8"),
    Pain("Keys people know", "train run.yaml --lora_alpha 16"),
    Pain("Keys people know", "train run.yaml --learning_rate 2e-4"),
    Pain("Keys people know", "train run.yaml --num_epochs 3"),
    Pain("Keys people know", "train run.yaml --micro_batch_size 2"),
    Pain("Keys people know", "train run.yaml --load_in_4bit true"),
    Pain("Keys people know", "train run.yaml --bf16 true"),
    Pain("Keys people know", "train run.yaml --packing true"),
    Pain("Keys people know", "train axolotl.yaml"),
    Pain("Keys people know", "convert-config axolotl.yaml", "batch_size"),
    Pain("Keys people know", "train run.yaml --chain.ranks 8 --chain.steps 3", "steps,"),
    Pain(
        "Experiments",
        "`experiment run experiment.yaml --output out`, while it tunes",
        r"(accuracy|validation|test|loss) .*\d\.\d",
        code="experiment run experiment.yaml --output out --backend inline",
    ),
    Pain(
        "Experiments",
        "`experiment run experiment.yaml --output out --max-cells 1`",
        "cells run",
        code="experiment run experiment.yaml --output out --backend inline --max-cells 1",
    ),
    Pain(
        "Experiments",
        "the same where the rows of the last task are not there: what had run by then",
        code="MISSING",
    ),
    Pain(
        "Experiments",
        "`grep -rlE 'scipy.stats|statsmodels' src/chainlora`, the number of files",
        code="import chainlora, pathlib, re\n"
        "files = pathlib.Path(chainlora.__file__).parent.rglob('*.py')\n"
        "print(sum(bool(re.search('scipy.stats|scipy import stats|statsmodels', f.read_text())) "
        "for f in files))",
    ),
    Pain(
        "Portability",
        "importing what measures memory where Python has no module `resource` (Windows)",
        code="import sys\nsys.modules['resource'] = None\nimport chainlora.cli\n"
        "name = 'chainlora.runs.costs' if hasattr(chainlora.cli, '__path__') else "
        "'chainlora.measures'\n__import__(name)\nprint(f'{name} is imported')",
    ),
]


# --- what the commands work on


def make_world(world: Path) -> None:
    """Make models, rows and configs."""
    sys.path[:0] = [str(ROOT / "tests")]
    from conftest import make_sentiment, make_tiny_folder

    make_tiny_folder(world / "base")
    shutil.copytree(world / "base", world / "bare")
    (world / "bare/chat_template.jinja").unlink(missing_ok=True)
    settings = world / "bare/tokenizer_config.json"
    plain = {k: v for k, v in json.loads(settings.read_text()).items() if k != "chat_template"}
    settings.write_text(json.dumps(plain))
    (world / "mood").mkdir()
    make_sentiment(world / "mood")
    user, assistant = SEEN
    call = {"type": "function", "function": {"name": "see", "arguments": {"what": "cat"}}}
    schema = {"name": "see", "description": "See.", "parameters": {"type": "object"}}
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in SEEN]
    told = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]
    rows: dict[str, dict[str, object]] = {
        "rows": {"prompt": "the cat sat", "completion": " on a mat"},
        "chat": {"messages": SEEN},
        "tools": {
            "messages": [user, {"role": "assistant", "content": "", "tool_calls": [call]}],
            "tools": [{"type": "function", "function": schema}],
        },
        "parts": {"messages": parts},
        "sharegpt": {"conversations": told},
        "alpaca": {"instruction": "say", "input": "", "output": "a mat"},
        "conversational": {"prompt": [user], "completion": [assistant]},
        "preferences": {"prompt": "the cat", "chosen": " sat", "rejected": " fly"},
        "long": {"text": TEXT * 4},
        "columns": {"prompt": "the cat", "completion": " sat", "source": "x", "id": 7},
    }
    for name, row in rows.items():
        (world / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    (world / "words.txt").write_text("the cat\n")
    data = {"train": "rows.jsonl", "validation": "rows.jsonl"}
    chain = {"ranks": [4, 4], "alpha": 8, "steps": [3, 3]}
    run = {"model": "base", "data": data, "chain": chain, "train": {"batch_size": 4}}
    axolotl = {"base_model": "base", "datasets": [{"path": "rows.jsonl", "type": "alpaca"}]}
    experiment = {
        "name": "small",
        "base": {
            "model": "base",
            "recipe": {"rank": 2, "steps": 4, "scaling": 2},
            "data": {k: f"mood/{v}.jsonl" for k, v in SPLITS.items()},
            "train": {"batch_size": 8},
        },
        "tasks": {"mood": {"data": {"task": "mood/task.yaml"}}},
        "methods": ["lora", "chain3"],
        "seeds": [0],
        "tune": {"grid": {"train.lr": [1e-3, 1e-2]}},
    }
    gone = {"data": {"task": "mood/task.yaml", "train": "gone.jsonl"}}
    configs = {
        "run": run | {"output": "out"},
        "axolotl": axolotl | {"lora_r": 8, "micro_batch_size": 2, "num_epochs": 2},
        "experiment": experiment,
        "missing": experiment | {"tasks": {**experiment["tasks"], "gone": gone}},
    }
    for name, tree in configs.items():
        (world / f"{name}.yaml").write_text(json.dumps(tree))  # JSON is YAML


SPLITS = {"train": "train", "validation": "validation", "test": "validation"}


# --- one version


def child(world: Path, names: list[str]) -> None:
    """Type the commands with the version on the path; print what is looked at, as JSON."""
    import logging

    import torch
    import transformers

    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    _apart(world, _finished_and_half, keep=("run", "half"))
    for index, pain in enumerate(PAINS):
        if pain.typed in names:
            found = _line(_apart(world, lambda pain=pain: _type(pain)), pain.look)
            print(json.dumps({"index": index, "found": found}), flush=True)


def _finished_and_half() -> None:
    """Train a run to its end, and another one until it is killed inside its second link."""
    _command("train run.yaml --output run --train.save_every 1")
    pid = os.fork()
    if pid == 0:
        from chainlora import load_config, train

        def listener(event: object) -> None:
            step = event["step"] if isinstance(event, dict) else getattr(event, "step", 0)
            if step >= 5:
                os._exit(1)

        train(
            load_config("run.yaml", [("output", "half"), ("train.save_every", "1")]),
            listener=listener,
        )
        os._exit(0)
    os.waitpid(pid, 0)


def _type(pain: Pain) -> None:
    typed, code = pain.typed, pain.code
    if code == "FIRST":
        _first_line()
    elif code == "MISSING":
        _command("experiment run missing.yaml --output out --backend inline")
        cells = [path.name for path in Path("out").rglob("result.json")]
        print(f"{len(cells)} cells had run")
    elif code.startswith("experiment"):
        _command(code)
    elif code:
        exec(code, {"__name__": "__main__"})
    elif " < " in typed:
        command, words = typed.split(" < ")
        os.dup2(os.open(words, os.O_RDONLY), 0)
        _command(command)
    else:
        _command(typed)


def _command(typed: str) -> None:
    try:
        from chainlora.cli.main import run
    except ImportError:  # version 0.1
        from chainlora.cli import run
    run(shlex.split(typed))


def _first_line() -> None:
    began = time.monotonic()
    command = [sys.executable, "-u", "-m", "chainlora", "train", "run.yaml"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    assert process.stdout is not None
    first = process.stdout.readline().strip()
    print(f"{time.monotonic() - began:.1f} s: {first}")
    process.kill()
    process.wait()


def _apart(world: Path, act: object, keep: tuple[str, ...] = ()) -> str:
    """Do something in a process and a copy of the world of its own; return what it prints."""
    with tempfile.TemporaryDirectory(dir=world.parent) as folder:
        work, said = Path(folder) / "work", Path(folder) / "said"
        shutil.copytree(world, work)
        pid = os.fork()
        if pid == 0:
            out = os.open(said, os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(work)
            try:
                act()  # type: ignore[operator]
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.stdout.flush()
            os._exit(0)
        deadline = time.monotonic() + SECONDS
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return f"no end in {SECONDS} s"
            time.sleep(0.05)
        for name in keep:
            shutil.copytree(work / name, world / name)
        return said.read_text(errors="replace").replace(f"{work}/", "")


def _line(said: str, look: str) -> str:
    said = re.sub(r" \(/\S*\)", "", said)  # where a module lies
    lines = [" ".join(line.split()) for line in re.split("[\r\n]", said)]
    lines = [line for line in lines if line]
    wrong = [line for line in lines if re.match(r"\w*(chainlora: error|Error|\w+Error):", line)]
    seen = [line for line in lines if look and re.search(look, line)]
    return (wrong or seen or lines[-1:] or ["(nothing)"])[0]


# --- both


def run(version: str, source: Path, names: list[str]) -> None:
    """Type the commands with one version of the package; keep the line that each shows."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        world = Path(folder).resolve() / "world"
        world.mkdir()
        make_world(world)
        variables = {"PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
        arguments = [sys.executable, __file__, "--child", str(world), "--names", json.dumps(names)]
        done = subprocess.Popen(
            arguments,
            env=os.environ | variables | {"CHAINLORA_CACHE": f"{folder}/cache"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert done.stdout is not None
        for line in done.stdout:
            each = json.loads(line)
            typed = PAINS[each["index"]].typed
            print(f"{typed}\n    {each['found']}", file=sys.stderr, flush=True)
            found = kept()
            found[version][typed] = each["found"]
            scratch = KEPT.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            scratch.replace(KEPT)  # another version may be read at the same time
        done.wait()


def kept() -> dict[str, dict[str, str]]:
    """Return what the versions have shown so far."""
    return json.loads(KEPT.read_text()) if KEPT.is_file() else {"before": {}, "after": {}}


def tables(before: dict[str, str], after: dict[str, str]) -> str:
    """Return a table an area, in Markdown."""
    text = []
    for area in dict.fromkeys(pain.area for pain in PAINS):
        text += [f"## {area}", "", "| typed | 0.1 | now |", "|---|---|---|"]
        for pain in (each for each in PAINS if each.area == area):
            typed = pain.typed if "`" in pain.typed or pain.code else f"`{pain.typed}`"
            cells = (_cell(found.get(pain.typed, "–")) for found in (before, after))
            text.append("| " + " | ".join([typed.replace("|", "\\|"), *cells]) + " |")
        text.append("")
    return "\n".join(text)


def _cell(line: str) -> str:
    line = line.removeprefix("chainlora: error: ").replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", type=Path, help="source folder of another version")
    parser.add_argument("--only", nargs="*", default=[""], help="areas, or parts of commands")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--names", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, json.loads(options.names))
        return
    names = [
        pain.typed
        for pain in PAINS
        if any(pain.area.startswith(word) or word in pain.typed for word in options.only)
    ]
    if names and options.against:
        run("before", options.against.resolve(), names)
    elif names:
        run("after", ROOT / "src", names)
    found = kept()
    text = tables(found["before"], found["after"])
    start, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{start}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
