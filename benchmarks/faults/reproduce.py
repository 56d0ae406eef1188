"""Each fault of version 0.1: a short script that shows it, run by this version and by another.

    python benchmarks/faults/reproduce.py                        what this version does
    python benchmarks/faults/reproduce.py --against OTHER/src    another version beside it
    python benchmarks/faults/reproduce.py --only S1 S3           some of them
    python benchmarks/faults/reproduce.py --against OTHER/src --write      into README.md

Each script is a function here; faults.yaml says which one shows which fault, and which tests hold
it. It runs in a process of its own, with tiny models made on the spot, and returns one line. What
it does not catch is shown as it came; what does not end in time is stopped, and that is said.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 60  # that a script may take
BEGIN, END = "<!-- begin: table -->", "<!-- end: table -->"
FAULTS = {each["fault"]: each for each in yaml.safe_load((HERE / "faults.yaml").read_text())}


# --- what the scripts share


def command(*arguments: object) -> tuple[int, str, str]:
    """Run the command line here; return status, output, and the last line of what it says."""
    try:
        from chainlora.cli.main import run
    except ImportError:  # version 0.1
        from chainlora.cli import run
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run([str(each) for each in arguments])
    said = [line for line in err.getvalue().splitlines() if line.startswith("chainlora:")]
    return status, out.getvalue(), (said or err.getvalue().splitlines() or [""])[-1]


def said(*arguments: object) -> str:
    """Return status and last words of a command."""
    status, _, words = command(*arguments)
    return f"status {status}" + (f", {words}" if status else "")


def settings(work: Path, output: Path | None = None, **sections: Any) -> dict[str, Any]:
    """Return a config of a run of three links on the tiny Llama with everything on."""
    data = {"train": str(work / "data/train.jsonl"), "task": str(work / "data/task.yaml")}
    tree: dict[str, Any] = {
        "model": str(work / "base"),
        "data": data | {"validation": str(work / "data/validation.jsonl")},
        "chain": {"ranks": [2, 2, 2], "alpha": 4, "steps": [2, 2, 2]},
        "train": {"lr": 1e-2, "batch_size": 4, "save_every": 1, "optimizer_reset": "prune"},
        "output": str(output or work / "run"),
    }
    for name, keys in sections.items():
        tree[name] = tree[name] | keys if isinstance(keys, dict) else keys
    return tree


def run(tree: dict[str, Any], resume: bool = False, **keys: Any) -> dict[str, Any]:
    """Train a config."""
    from chainlora import make_config, train

    return train(make_config(tree), resume=resume, **keys)


def stopped(tree: dict[str, Any], after: int) -> None:
    """Train until a step is done and saved, and die."""

    def listener(event: Any) -> None:
        if event["event"] == "step" and event["step"] > after:
            raise KeyboardInterrupt

    try:
        run(tree, listener=listener)
    except KeyboardInterrupt:
        return


def refused(act: Callable[[], object]) -> str:
    """Return "accepted", or the words in which something is refused."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def links(output: Path) -> list[bytes]:
    """Return the bytes of the weights of all links."""
    return [path.read_bytes() for path in sorted(output.glob("links/*/*.safetensors"))]


def file(path: Path, content: object) -> Path:
    """Write a text, bytes, or rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    return path


def yaml_of(tree: dict[str, Any], path: Path) -> Path:
    """Write a config, as JSON, which is YAML."""
    return file(path, json.dumps(tree))


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """Give a file another content for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def plain_loss(folder: Path, rows: Path) -> float:
    """Return the loss per completion token of plain transformers, each row by itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, count = 0.0, 0
    for row in map(json.loads, rows.read_text().splitlines()):
        start = tokenizer(row["prompt"]).input_ids
        end = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([[*start, *end]])
        with torch.no_grad():
            logits = model(ids[:, :-1], use_cache=False).logits[0, len(start) - 1 :]
        total += torch.nn.functional.cross_entropy(
            logits.float(), ids[0, len(start) :]
        ).item() * len(end)
        count += len(end)
    return total / count


def on(work: Path, model: str, **sections: Any) -> dict[str, Any]:
    """Return a config of two links on a tiny model of another architecture."""
    rows = str(work / "rows.jsonl")
    base = {"ranks": [2, 2], "steps": [1, 1], "alpha": 4} | sections.pop("chain", {})
    return {
        "model": str(work / model),
        "data": {"train": rows, "test": rows},
        "chain": base,
        "train": {"batch_size": 8, "lr": 1e-2} | sections.pop("train", {}),
        "output": str(work / "run"),
    }


def losses(tree: dict[str, Any], **keys: Any) -> list[float]:
    """Train a config and return the losses of its steps."""
    found: list[float] = []

    def listener(event: Any) -> None:
        if event["event"] == "step":
            found.append(event["loss"])

    run(tree, listener=listener, **keys)
    return found


def first_loss(work: Path, model: str, **sections: Any) -> str:
    """Compare the loss of the first step with that of plain transformers."""
    plain = plain_loss(work / model, work / "rows.jsonl")
    ours = losses(on(work, model, **sections) | {"output": None})[0]
    return f"loss of step 1 off by {abs(ours - plain) / plain:.1e} of plain transformers'"


# --- wrong numbers


def w1(work: Path) -> str:
    return first_loss(work, "smollm3")


def w2(work: Path) -> str:
    return first_loss(work, "ministral3")


def w3(work: Path) -> str:
    return "; ".join(f"{name}: {first_loss(work, name)}" for name in ("lfm2", "jamba", "qwen3_5"))


def w3_off(work: Path) -> str:
    off = {"speedups": "off"}
    return "; ".join(
        f"{name}: {first_loss(work, name, train=off)}" for name in ("lfm2", "jamba", "qwen3_5")
    )


def w4(work: Path) -> str:
    from chainlora import export_merged

    result = run(on(work, "zamba", chain={"target_modules": ["q_proj", "v_proj"], "steps": [3, 3]}))
    export_merged(work / "run", work / "merged")
    merged = plain_loss(work / "merged", work / "rows.jsonl")
    live = result["metrics"]["test"]["loss"]
    return f"the merged checkpoint's loss is {merged:.4f}, the live model's {live:.4f}"


def w5(work: Path) -> str:
    plain = plain_loss(work / "seed_oss", work / "rows.jsonl")
    ours = losses(on(work, "seed_oss"))[0]
    kept = "drops" if abs(ours - plain) > 1e-3 * plain else "does not drop"
    return f"training {kept}: loss {ours:.4f}, without dropout {plain:.4f}"


def w6(work: Path) -> str:
    import torch

    torch.set_num_threads(2)
    tree = on(work, "phimoe", chain={"target_modules": ["q_proj"]}) | {"output": None}
    found = {losses(tree)[0] for _ in range(6)}
    return f"6 runs, {len(found)} different losses of step 1"


def w7(work: Path) -> str:
    text = "the cat sat on a mat and saw two red birds " * 40
    rows = file(work / "long.jsonl", [{"text": text}])
    tree = on(work, "base", chain={"ranks": [2], "steps": None, "epochs": [1]})
    tree["data"] = {"train": str(rows), "truncation": "left", "max_length": 64}
    plans: list[Any] = []

    def listener(event: Any) -> None:
        if event["event"] == "plan":
            plans.append(event)

    result = run(tree, listener=listener)
    told = re.findall(r"[^']*cut[^']*", str([dict(plan) for plan in plans]))
    num_words, tokens = len(text.split()), result["tokens"]
    return f"of {num_words} words, {tokens} tokens trained; said: {told or 'nothing'}"


def w7_tools(work: Path) -> str:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = file(work / "chat.jsonl", [{"messages": turns, "tools": tools}] * 4)
    tree = on(work, "base", chain={"ranks": [1], "steps": [1]})
    tree["data"] = {"train": str(rows)}
    return refused(lambda: run(tree))


def w8(work: Path) -> str:
    task = (
        'name: g\ndescription: g\nprompt: "{{ prompt }}"\ncompletion: " {{ completion }}"\n'
        'references: "[completion]"\nmetric: em\nloss: completion\n'
        "add_eos: true\nmax_new_tokens: 8\n"
    )
    task_file = file(work / "g.yaml", task)
    rows = (work / "rows.jsonl").read_text().splitlines(keepends=True)[:6]

    def answers(lines: list[str]) -> list[str]:
        data = file(work / "some.jsonl", "".join(lines))
        where = work / "answers.jsonl"
        arguments = ["eval", work / "rwkv", "--task", task_file, "--data", data]
        status, _, words = command(*arguments, "--predictions", where)
        if status:
            raise RuntimeError(words)
        return [json.loads(line)["prediction"] for line in where.read_text().splitlines()]

    together, alone = answers(rows), [answers([row])[0] for row in rows]
    wrong = sum(one != two for one, two in zip(together, alone, strict=True))
    return f"{wrong} of {len(rows)} answers differ from those of single prompts"


# --- crashes and late refusals


def c1(work: Path) -> str:
    return f"trained {run(on(work, 'mixtral'))['steps']} steps"


def c2(work: Path) -> str:
    return f"trained {run(on(work, 'olmo'))['steps']} steps"


def c3(work: Path) -> str:
    first = refused(lambda: run(on(work, "mamba", chain={"target_modules": ["out_proj"]})))
    second = refused(lambda: run(on(work, "mamba", chain={"target_modules": ["in_proj"]})))
    return f"{first}; corrected: {second}"


def c4(work: Path) -> str:
    return said("train", yaml_of(settings(work), work / "c.yaml"), "--train.speedups", "off")


def c5(work: Path) -> str:
    return said("train", yaml_of(settings(work), work / "c.yaml"), "--chain.init", "gradient")


def c6(work: Path) -> str:
    """Experts and shared experts: what PEFT makes of the adapter, beside the live model."""
    return "; ".join(f"{name}: {_adapter_of(work, name)}" for name in ("qwen2_moe", "deepseek_v3"))


def _adapter_of(work: Path, name: str) -> str:
    import peft
    from transformers import AutoModelForCausalLM

    from chainlora import export_adapter

    modules = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    tree = on(work, name, chain={"steps": [3, 3], "target_modules": modules})
    where = work / f"run-{name}"

    def loads() -> None:
        live = run(tree | {"output": str(where)})["metrics"]["test"]["loss"]
        export_adapter(where, work / f"adapter-{name}")
        base = AutoModelForCausalLM.from_pretrained(work / name)
        model = peft.PeftModel.from_pretrained(base, work / f"adapter-{name}")
        model.merge_and_unload().save_pretrained(work / f"loaded-{name}")
        for each in (work / name).glob("tokenizer*"):
            shutil.copy(each, work / f"loaded-{name}")
        loss = plain_loss(work / f"loaded-{name}", work / "rows.jsonl")
        if abs(loss - live) > 1e-3:
            raise AssertionError(f"loss {loss:.4f} with PEFT, {live:.4f} live")

    return refused(loads)


# --- silently wrong after a fault


def life(work: Callable[[], object], strike: Callable[[], object] | None = None) -> int:
    """Do some work in a process that may be killed; return how it ended."""
    child = os.fork()
    if child == 0:
        status = 0
        try:
            if strike is not None:
                strike()
            work()
        except BaseException as error:
            (Path(tempfile.gettempdir()) / "last-words").write_text(str(error))
            status = 1
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(folder: Path, matches: str, which: int = 0) -> Callable[[], None]:
    """Return what makes a process die before the n-th file operation of a kind."""
    from injection import Injection

    class Named(Injection):
        def _operation(self, name: str, path: Any, tear: Any = None) -> None:
            before = len(self.operations)
            super()._operation(name, path, tear)
            if len(self.operations) > before and re.search(matches, self.operations[-1]):
                self.seen = getattr(self, "seen", -1) + 1
                if self.seen == which:
                    os.kill(os.getpid(), signal.SIGKILL)

    return lambda: Named(folder).install()


def s1(work: Path) -> str:
    """Killed just before the manifest of each knot, without checkpoints inside links."""
    tree = settings(work, train={"save_every": None})
    run(tree | {"output": str(work / "whole")})
    wrong = kills = 0
    for which in range(6):
        shutil.rmtree(work / "run", ignore_errors=True)
        strike = killed_at(work / "run", r"rename chain\.json", which)
        if life(lambda: run(tree), strike) != -9:
            continue
        kills += 1
        ended = life(lambda: run(tree, resume=True))
        wrong += ended != 0 or links(work / "run") != links(work / "whole")
    return f"{kills} kills, {wrong} runs with other links or that cannot be resumed"


def s2(work: Path) -> str:
    tree = settings(work, chain={"steps": [6, 6, 6]})
    run(tree | {"output": str(work / "whole")})
    records = len((work / "whole/metrics.jsonl").read_text().splitlines())
    other = other_records = refusals = 0
    for turn in range(6):
        shutil.rmtree(work / "run", ignore_errors=True)
        stopped(tree, 7)
        children = []
        for wait in (0, 0.05 * turn):
            child = os.fork()
            if child == 0:
                time.sleep(wait)
                try:
                    run(tree, resume=True)
                except Exception:
                    os._exit(1)
                os._exit(0)
            children.append(child)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        refusals += sum(end == 1 for end in ends)
        other += links(work / "run") != links(work / "whole")
        lines = (work / "run/metrics.jsonl").read_text().splitlines()
        other_records += len(lines) != records
    wrong = f"links wrong in {other}, metrics wrong in {other_records}"
    return f"6 pairs: {wrong}; {refusals} processes ended with an error"


def s3(work: Path) -> str:
    path = work / "data/train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    found = []
    for what, rows in (("reordered", lines[::-1]), ("appended", lines + lines[:3])):
        shutil.rmtree(work / "run", ignore_errors=True)
        stopped(settings(work), 3)
        with changed(path, "".join(rows).encode()):
            found.append(f"{what}: {refused(lambda: run(settings(work), resume=True))}")
    return "; ".join(found)


def s4(work: Path) -> str:
    from safetensors.torch import load_file, save

    from chainlora import load_run

    run(settings(work))
    tensors = load_file(work / "base/model.safetensors")
    largest = max(tensors.values(), key=lambda tensor: tensor.numel())
    step = max(1, largest.numel() // 4096)  # version 0.1 samples every so many values
    flat = largest.view(-1)
    for offset in range(1, step):
        flat[offset::step] *= 3
    config = json.loads((work / "base/config.json").read_text())
    tokens = json.loads((work / "base/tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    one, two = list(vocabulary)[50:52]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    edits = {
        f"{1 - 1 / step:.0%} of a tensor tripled": (
            "model.safetensors",
            save(tensors, {"format": "pt"}),
        ),
        "rms_norm_eps": ("config.json", json.dumps(config | {"rms_norm_eps": 0.5}).encode()),
        "activation": ("config.json", json.dumps(config | {"hidden_act": "gelu"}).encode()),
        "tokens swapped": ("tokenizer.json", json.dumps(tokens).encode()),
    }
    accepted, words = [], ""
    for what, (name, content) in edits.items():
        with changed(work / "base" / name, content):
            end = refused(lambda: load_run(work / "run"))
        accepted += [what] if end == "accepted" else []
        words = end if end != "accepted" else words
    return f"accepted: {', '.join(accepted) or 'nothing'}" + ("" if accepted else f" ({words})")


def s5(work: Path) -> str:
    from safetensors.torch import load_file, save

    from chainlora import export_adapter, load_run

    tree = settings(work, train={"keep_best": True, "eval_every": 1, "select_metric": "loss"})
    stopped(tree, 3)
    shutil.copytree(work / "run", work / "half")
    run(tree, resume=True)
    link = work / "run/links/000/adapter_model.safetensors"
    other = work / "run/links/001/adapter_model.safetensors"
    manifest = work / "run/chain.json"
    content, text = bytearray(link.read_bytes()), manifest.read_text()
    content[-2] ^= 1
    more = load_file(link) | {
        "base_model.model.lm_head.weight": load_file(work / "base/model.safetensors")[
            "model.embed_tokens.weight"
        ]
    }
    harms = {
        "a bit of a link": (link, bytes(content)),
        "alpha 4 → 6": (manifest, re.sub(r'"alpha": 4', '"alpha": 6', text).encode()),
        "another link's weights": (link, other.read_bytes()),
        "no tensors": (link, save({})),
        "lm_head too": (link, save(more)),
    }
    accepted = []
    for what, (path, harmed) in harms.items():
        with changed(path, harmed):
            shutil.rmtree(work / "out", ignore_errors=True)
            ends = [
                refused(lambda: load_run(work / "run")),
                refused(lambda: export_adapter(work / "run", work / "out")),
                refused(lambda: run(tree, resume=True)),
            ]
        accepted += [what] if "accepted" in ends else []
    state = next((work / "half/checkpoints").rglob("optimizer.safetensors"))
    content = bytearray(state.read_bytes())
    content[-2] ^= 1
    state.write_bytes(content)
    half = tree | {"output": str(work / "half")}
    end = refused(lambda: run(half, resume=True))
    if end == "accepted" and links(work / "half") != links(work / "run"):
        accepted.append("a bit of the optimizer's state (other links)")
    verbs = "`eval`, `export` or `--resume`"
    return f"of {len(harms) + 1}, accepted by {verbs}: {', '.join(accepted) or 'none'}"


def experiment(work: Path) -> Path:
    """Write an experiment of one cell."""
    files = {
        key: str(work / f"data/{name}.jsonl")
        for key, name in (("train", "train"), ("validation", "validation"), ("test", "validation"))
    }
    tree = {
        "name": "one",
        "base": {
            "model": str(work / "base"),
            "recipe": {"rank": 2, "steps": 2, "scaling": 2},
            "data": files,
            "train": {"batch_size": 4},
        },
        "tasks": {"mood": {"data": {"task": str(work / "data/task.yaml")}}},
        "methods": ["lora"],
        "seeds": [0],
    }
    return yaml_of(tree, work / "experiment.yaml")


def run_experiment(work: Path, *more: object) -> tuple[int, str, str]:
    """Run it into work/out."""
    return command(
        "experiment", "run", experiment(work), "--output", work / "out", "--workers", 1, *more
    )


def score(work: Path) -> str:
    """Return the score in the results."""
    lines = (work / "out/results.jsonl").read_text().splitlines()
    return str(next((json.loads(each).get("score") for each in lines if '"cell"' in each), "none"))


def s6(work: Path) -> str:
    status, _, words = run_experiment(work)
    if status:
        return words
    true = score(work)
    (path,) = (work / "out").glob("cells/*/result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"score": 0.999}))
    (work / "out/results.jsonl").unlink()
    status, _, _ = run_experiment(work)
    return f"status {status}; score {true}, edited to 0.999, reported as {score(work)}"


def s7(work: Path) -> str:
    return said(
        "train", yaml_of(settings(work), work / "c.yaml"), "--output", work / "rnu", "--resume"
    )


def s7_lr(work: Path) -> str:
    return said("train", yaml_of(settings(work), work / "c.yaml"), "--train.lr", "true")


def s7_int8(work: Path) -> str:
    import torch
    from safetensors.torch import load_file, save

    tensors = load_file(work / "base/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = (tensors[name] * 100).to(torch.int8)
    with changed(work / "base/model.safetensors", save(tensors, {"format": "pt"})):
        return refused(lambda: run(settings(work)))


# --- security


def x1(work: Path) -> str:
    run_experiment(work)
    lines = (work / "out/results.jsonl").read_text().splitlines()
    cell = json.loads(lines[-1]) | {"cell": "../../../x"}
    shutil.rmtree(work / "out")
    text = "\n".join([*lines[:-1], json.dumps(cell)]) + "\n"
    file(work / "deep/er/out/results.jsonl", text)
    reused = file(work / "other/results.jsonl", text)
    found = []
    for more in ((), ("--reuse", reused)):
        before = set(work.rglob("*"))
        arguments = ["--output", work / "deep/er/out", "--workers", 1, *more]
        found.append(said("experiment", "run", experiment(work), *arguments))
        new = {path for path in set(work.rglob("*")) - before if "cache" not in path.parts}
        outside = sorted(str(path.relative_to(work)) for path in new if "out" not in path.parts)
        found.append(f"written outside the output: {', '.join(outside[:2]) or 'nothing'}")
    return "; ".join(found)


ALIASES = "a0: &a0 [x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 10)
)


def x2_yaml(work: Path) -> str:
    return said("train", file(work / "c.yaml", f"{ALIASES}model: *a9\n"))


def x2_pattern(work: Path) -> str:
    tree = settings(work, chain={"target_modules": r"(([a-z_.0-9]+)+)+X"})
    return said("train", yaml_of(tree, work / "c.yaml"))


def x2_template(work: Path) -> str:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    text = (work / "data/task.yaml").read_text().replace("{{ text }}", loop + "{{ text }}")
    tree = settings(work, data={"task": str(file(work / "t.yaml", text))})
    return said("train", yaml_of(tree, work / "c.yaml"))


# --- lost work


def l1(work: Path) -> str:
    run(settings(work, work / "whole"))
    lost = kills = 0
    words = ""
    for which in range(0, 18, 2):
        shutil.rmtree(work / "run", ignore_errors=True)
        strike = killed_at(
            work / "run", r"os\.(remove|rmdir) (checkpoints|[0-9a-z]+\.)|os\.remove [a-z]", which
        )
        if life(lambda: run(settings(work)), strike) != -9:
            continue
        kills += 1
        ended = refused(lambda: run(settings(work), resume=True))
        if ended != "accepted" or links(work / "run") != links(work / "whole"):
            lost, words = lost + 1, ended
    return f"{kills} kills, {lost} runs lost" + (f": {words}" if lost else "")


def l2(work: Path) -> str:
    """A rate at which one step leaves weights that are not finite, though its loss was."""
    tree = settings(work, chain={"steps": [3, 3, 3]}, train={"lr": 1e38, "max_grad_norm": None})
    high = yaml_of(tree, work / "high.yaml")
    status, _, words = command("train", high)
    lower = said("train", high, "--resume", "--train.lr", "1e-3")
    return f"status {status}, {words}; --resume with a lower rate: {lower}"


def l3(work: Path) -> str:
    stopped(settings(work), 3)
    path = work / "run/metrics.jsonl"
    with path.open("a") as more:
        more.write('{"event": "step", "step": 4, "half": ')
    inode = path.stat().st_ino
    run(settings(work), resume=True)
    return "rewritten in place" if path.stat().st_ino == inode else "replaced whole"


def l4(work: Path) -> str:
    run_experiment(work)
    path = work / "out/results.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    first = run_experiment(work)
    (cell,) = (work / "out").glob("cells/*/result.json")
    cell.write_bytes(cell.read_bytes()[:40])
    second = run_experiment(work)
    return "; ".join(
        f"{what}: status {end[0]}" + (f", {end[2]}" if end[0] else "")
        for what, end in (("torn results", first), ("torn cell", second))
    )


# --- unclear


def harmed(work: Path, kind: str, at: int, *arguments: object) -> str:
    """Run a command whose file operations fail from one on."""
    from injection import Injection

    words = work / "words"
    injection = Injection(work / "run", kind, at, lasting=True)

    def act() -> None:
        file(words, said(*arguments))

    life(act, injection.install)
    return words.read_text() if words.is_file() else "no word"


def disk_full(work: Path) -> str:
    return harmed(work, "ENOSPC", 12, "train", yaml_of(settings(work), work / "c.yaml"))


def read_only(work: Path) -> str:
    return harmed(work, "EROFS", 0, "train", yaml_of(settings(work), work / "c.yaml"))


def io_error(work: Path) -> str:
    return harmed(work, "EIO", 30, "train", yaml_of(settings(work), work / "c.yaml"))


def to_output(work: Path, output: object) -> str:
    """Train into an output."""
    return said("train", yaml_of(settings(work), work / "c.yaml"), "--output", output)


OUTPUTS = "test_store_resume.py::test_output_that_cannot_be_made_is_refused_before_the_model_loads"


def dangling(work: Path) -> str:
    (work / "gone").symlink_to(work / "nothing")
    return to_output(work, work / "gone")


def below_a_file(work: Path) -> str:
    return to_output(work, file(work / "mine", "") / "run")


def long_path(work: Path) -> str:
    return to_output(work, work / ("x" * 300))


def nul_path(work: Path) -> str:
    tree = settings(work) | {"output": str(work / "a") + "\0b"}
    return said("train", yaml_of(tree, work / "c.yaml"))


def on_row(work: Path, row: str) -> str:
    """Train on rows one of which is odd."""
    rows = (work / "data/train.jsonl").read_text() + row + "\n"
    tree = settings(work, data={"train": str(file(work / "odd.jsonl", rows))})
    return said("train", yaml_of(tree, work / "c.yaml"))


VALUES = "test_data_sources.py::test_values_that_no_tokenizer_takes_are_named_by_file_and_line"


def surrogate(work: Path) -> str:
    return on_row(work, '{"text": "a \\ud800", "label": 0}')


def huge(work: Path) -> str:
    return on_row(work, '{"text": "a", "label": ' + "9" * 5000 + "}")


YAML = "test_yaml_text.py::test_what_yaml_can_do_wrong_is_one_line_at_once"


def no_date(work: Path) -> str:
    return said("train", file(work / "c.yaml", "model: 2020-13-45"))


def no_number(work: Path) -> str:
    return said("train", file(work / "c.yaml", "model: 0x_"))


def no_bool(work: Path) -> str:
    return said("train", file(work / "c.yaml", "model: !!bool foo"))


def deep(work: Path) -> str:
    return said("train", file(work / "c.yaml", "a: " + "[" * 100_000))


def other_bytes(work: Path) -> str:
    rows = (work / "data/train.jsonl").read_bytes() + b'{"text": "\xff\xfe", "label": 0}\n'
    tree = settings(work, data={"train": str(file(work / "odd.jsonl", rows))})
    return said("train", yaml_of(tree, work / "c.yaml"))


def resumed_without(work: Path, pattern: str, content: bytes | None) -> str:
    """Resume a run one of whose files is missing or damaged; say if the links are right."""
    run(settings(work, work / "whole"))
    stopped(settings(work), 3)
    for path in (work / "run").glob(pattern):
        path.unlink() if content is None else path.write_bytes(content)
    end = said("train", yaml_of(settings(work), work / "c.yaml"), "--resume")
    if end == "status 0":
        end += ", links " + ("right" if links(work / "run") == links(work / "whole") else "wrong")
    return end


STATE = "test_store_resume.py::test_a_damaged_checkpoint_falls_back_to_the_knot"


def no_optimizer(work: Path) -> str:
    return resumed_without(work, "checkpoints/*/optimizer.safetensors", None)


def bad_optimizer(work: Path) -> str:
    return resumed_without(work, "checkpoints/*/optimizer.safetensors", b"half")


def no_moments(work: Path) -> str:
    stopped(settings(work), 2)
    for path in [*(work / "run").rglob("moments.safetensors"), *(work / "run").glob("moments/*")]:
        path.unlink()
    shutil.rmtree(work / "run/checkpoints", ignore_errors=True)
    return said("train", yaml_of(settings(work), work / "c.yaml"), "--resume")


def bad_progress(work: Path) -> str:
    stopped(settings(work), 3)
    for path in (work / "run").glob("checkpoints/*/progress.json"):
        path.write_text('{"step": "three"}')
    manifest = work / "run/chain.json"
    manifest.write_text(re.sub(r'"step": \d+', '"step": "three"', manifest.read_text(), count=1))
    return said("train", yaml_of(settings(work), work / "c.yaml"), "--resume")


def gguf(work: Path) -> str:
    tree = settings(work) | {"model": str(file(work / "m.gguf", b"GGUF\3\0\0\0"))}
    return said("train", yaml_of(tree, work / "c.yaml"))


def no_heads(work: Path) -> str:
    config = json.loads((work / "base/config.json").read_text()) | {"num_attention_heads": 0}
    with changed(work / "base/config.json", json.dumps(config).encode()):
        return said("train", yaml_of(settings(work), work / "c.yaml"))


def ctrl_c(work: Path) -> str:
    config = yaml_of(settings(work), work / "c.yaml")
    tracebacks = quiet = 0
    for wait in (number / 50 for number in range(1, 21)):
        child = subprocess.Popen(
            [sys.executable, "-m", "chainlora", "train", config], stderr=subprocess.PIPE, text=True
        )
        time.sleep(wait)
        child.send_signal(signal.SIGINT)
        words = child.communicate()[1]
        tracebacks += "Traceback" in words and "chainlora" in words
        quiet += "chainlora: interrupted" in words
    return f'20 times: {tracebacks} tracebacks, {quiet} times "chainlora: interrupted"'


def advice(work: Path) -> str:
    config = experiment(work)
    arguments = ["experiment", "run", config, "--output", work / "out", "--workers", "1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "chainlora", *arguments], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 40
    while not (work / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    words = child.communicate()[1].splitlines()
    return next(
        (line for line in words if "interrupted" in line), words[-1] if words else "no word"
    )


def sets(work: Path) -> str:
    found = set()
    for seed in ("1", "2", "3"):
        tree = settings(
            work,
            work / seed,
            chain={
                "ranks": [2],
                "steps": [1],
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            },
        )
        arguments = [
            sys.executable,
            "-m",
            "chainlora",
            "train",
            yaml_of(tree, work / f"{seed}.yaml"),
        ]
        subprocess.run(
            arguments, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True
        )
        found.add((work / seed / "links/000/adapter_config.json").read_bytes())
    return f"3 processes, {len(found)} different files"


def clock(work: Path) -> str:
    now, began = time.time, time.monotonic()
    time.time = lambda: now() - 86_400 * (time.monotonic() - began > 0.2)
    seconds = run(settings(work))["wall_s"]
    return "no negative seconds" if seconds >= 0 else f"{seconds} seconds"


def power(work: Path) -> str:
    from injection import Injection

    run(settings(work, work / "whole"))
    tree = settings(work, work / "a/run")
    lost = strikes = 0
    for at in range(6, 102, 8):
        shutil.rmtree(work / "a", ignore_errors=True)
        (work / "a").mkdir()
        if life(lambda: run(tree), Injection(work / "a", "power", at).install) != -9:
            continue
        strikes += 1
        shutil.rmtree(work / "a")
        (work / "a.durable").rename(work / "a")
        ended = life(lambda: run(tree, resume=(work / "a/run").exists()))
        lost += ended != 0 or links(work / "a/run") != links(work / "whole")
    return f"{strikes} losses of power, {lost} runs lost or wrong"


# --- the table


def make_world(work: Path) -> None:
    """Make what the scripts work on: a tiny Llama with its rows, and the other architectures."""
    from architectures.checks import _save as save
    from architectures.tiny import ORIGINAL, tiny_model
    from conftest import make_sentiment, make_tiny_folder

    make_tiny_folder(work / "base")
    (work / "data").mkdir()
    make_sentiment(work / "data")
    letters = "the cat sat on a mat and saw two red birds fly over a green hill "
    rows = [
        {"prompt": (letters * 2)[n : 2 * n + 4], "completion": " " + letters[:k]}
        for k, n in enumerate((4, 9, 16, 21, 25, 27, 33, 49), start=4)
    ]
    file(work / "rows.jsonl", rows)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    scaled = {"original_max_position_embeddings": ORIGINAL, "llama_4_scaling_beta": 0.5}
    whole = {"use_sliding_window": False, "layer_types": ["full_attention"] * 4}
    for name, changes in {
        "smollm3": whole,
        "ministral3": {"rope_parameters": yarn | scaled},
        "lfm2": {"enlarged": False},
        "jamba": {"enlarged": False},
        "qwen3_5_text": {"enlarged": False},
        "zamba": {},
        "seed_oss": {"residual_dropout": 0.2},
        "phimoe": {"router_jitter_noise": 0.2, "input_jitter_noise": 0.2},
        "rwkv": {},
        "mixtral": {},
        "qwen2_moe": {},
        "deepseek_v3": {},
        "olmo": {"clip_qkv": 0.5},
        "mamba": {},
    }.items():
        save(tiny_model(name, **changes), work / name.removesuffix("_text"))


def child(work: Path, names: list[str]) -> None:
    """Run scripts with the version on the path, each in a process and a folder of its own."""
    import logging

    sys.path[:0] = [str(ROOT / "tests/faults")]
    import torch

    import chainlora  # noqa: F401
    from chainlora import make_config, train  # noqa: F401

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background ignores it
    for name in names:
        print(json.dumps({"name": name, "found": _apart(work, name)}), flush=True)


def _apart(world: Path, name: str) -> str:
    with tempfile.TemporaryDirectory(dir=world.parent) as folder:
        work = Path(folder).resolve()
        for each in world.iterdir():  # models that no script changes are linked
            if each.name in ("base", "data"):
                shutil.copytree(each, work / each.name)
            else:
                (work / each.name).symlink_to(each)
        answer = work / "answer"

        def act() -> None:
            os.setpgid(0, 0)
            os.environ["CHAINLORA_CACHE"] = str(work / "cache")
            with (work / "noise").open("w") as noise:
                os.dup2(noise.fileno(), 1)
                os.dup2(noise.fileno(), 2)
            try:
                text = globals()[FAULTS[name]["script"]](work)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            answer.write_text(text)

        process = os.fork()
        if process == 0:
            act()
            os._exit(0)
        deadline = time.monotonic() + SECONDS
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return f"no end in {SECONDS} s, stopped"
            time.sleep(0.02)
        text = answer.read_text() if answer.exists() else "the process died"
        return " ".join(text.replace(f"{work}/", "").replace(str(work), ".").split())


def outcomes(source: Path, work: Path, names: list[str]) -> dict[str, str]:
    """Run the scripts with one version of the package."""
    environment = os.environ | {
        "PYTHONPATH": str(source),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(work.parent),
    }
    arguments = [sys.executable, __file__, "--child", work, "--only", *names]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = {}
    for line in process.stdout:
        each = json.loads(line)
        found[each["name"]] = each["found"]
        print(f"{each['name']}: {each['found']}", file=sys.stderr, flush=True)
    process.wait()
    return found


def cell(text: str, most: int = 230) -> str:
    """Return a text as a cell of a table."""
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= most else text[: most - 1] + "…"


def table(names: list[str], before: dict[str, str], after: dict[str, str]) -> str:
    """Return the table in Markdown."""
    rows = ["| fault | held by | 0.1 | now |", "|---|---|---|---|"]
    for name in names:
        known = FAULTS[name]
        title = f"**{name}** {known.get('what', '')}".strip()
        tried = ", ".join(f"`{test}`" for test in known["tests"])
        found = (cell(each.get(name, "–")) for each in (before, after))
        rows.append("| " + " | ".join([cell(title), cell(tried, 400), *found]) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", type=Path, help="source folder of another version")
    parser.add_argument("--only", nargs="+", help="names of faults, or what they begin with")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [name for name in FAULTS if not options.only or name in options.only]
    if options.child:
        child(options.child, names)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(ROOT / "tests")]
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        world = Path(folder).resolve() / "world"
        world.mkdir()
        make_world(world)
        before = outcomes(options.against.resolve(), world, names) if options.against else {}
        after = outcomes(ROOT / "src", world, names)
    kept = HERE / "reproduce.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {"before": {}, "after": {}}
    found = {"before": found["before"] | before, "after": found["after"] | after}
    text = table(list(FAULTS), found["before"], found["after"])
    print(text)
    if options.write:
        kept.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        path = HERE / "README.md"
        start, rest = path.read_text().split(BEGIN)
        path.write_text(f"{start}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
