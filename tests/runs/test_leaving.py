"""What leaves the machine: every file of every export, walked for places on this machine,
templates, modes, links, and text that would be markup."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_tiny_folder, write_rows
from helpers import sign, stage_dir
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import Chain, LinkConfig, export_adapter, export_merged, train
from chainlora.config.template_names import template_text
from chainlora.errors import ModelError, RunError
from chainlora.runs.cards import Naming, is_of_another
from chainlora_gguf.from_gguf import build_tokenizer, read_metadata
from chainlora_gguf.to_gguf import export_gguf

TOOLS = [{"type": "function", "function": {"name": "hill", "parameters": {"type": "object"}}}]
CHAT = [{"role": "user", "content": "the cat sat on a green hill"}]
MARKUP = "<script>alert(1)</script>`|"


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory) -> Path:
    """A run on chats with tools, by a template that is not the base's, its versions markup."""
    folder = tmp_path_factory.mktemp("private")
    base = make_tiny_folder(folder / "base", max_position_embeddings=1024)
    for name in ("LICENSE", "LICENSE-MODEL"):  # the second is DeepSeek's
        (base / name).write_text("Do as you like.")
    said = {"role": "assistant", "content": "two red birds fly"}
    rows = [{"messages": [*CHAT, said], "tools": TOOLS}] * 4
    tree = {
        "model": str(base),
        "data": {"train": str(write_rows(folder / "rows.jsonl", rows)), "chat_template": "chatml"},
        "chain": {"ranks": [4, 2], "steps": [3, 3]},
        "train": {"lr": 1e-2, "batch_size": 4},
        "output": str(folder / "run"),
        "start_data": "none",
    }
    train(tree)
    sign(folder / "run", lambda tree: _versions(tree).update(torch=MARKUP))
    return folder / "run"


def _versions(tree: dict[str, Any]) -> dict[str, str]:
    return tree["entries"][0]["training"]["versions"]


def _gguf(run: Path, out: Path, **keys: object) -> None:
    pytest.importorskip("gguf", reason="no gguf: pip install 'chainlora[gguf]'")
    export_gguf(run, out, **keys)


PUSHED = Naming("me/chain", "tiny/llama", "apache-2.0")
EXPORTS: dict[str, Callable[[Path, Path], object]] = {
    "adapter": export_adapter,
    "compressed": lambda run, out: export_adapter(run, out, rank=2),
    "after one link": lambda run, out: export_adapter(run, out, num_links=1),
    "merged": export_merged,
    "merged after no link": lambda run, out: export_merged(run, out, num_links=0),
    "adapter for the Hub": lambda run, out: export_adapter(run, out, naming=PUSHED),
    "merged for the Hub": lambda run, out: export_merged(run, out, naming=Naming("me/chain")),
    "gguf": lambda run, out: _gguf(run, out, kind="q8_0"),
    "gguf adapter for the Hub": lambda run, out: _gguf(run, out, as_adapter=True, naming=PUSHED),
}


@pytest.mark.parametrize("export", EXPORTS)
def test_every_file_of_an_export_can_leave(chat_run, tmp_path, export):
    before = os.umask(umask := 0o027)
    try:
        EXPORTS[export](chat_run, tmp_path / "out")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if not path.is_dir()]
    weights = next((path for path in files if path.name in ("model.gguf", "base.gguf")), None)
    names = {"README.md", "LICENSE", "LICENSE-MODEL", "Modelfile" if weights else "tokenizer.json"}
    assert names <= {path.name for path in files}
    for path in files:
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name
        content = path.read_bytes()
        for place in (chat_run.parent, tmp_path, Path.home(), Path.cwd()):
            assert str(place).encode() not in content, path.name
    if weights is None:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
        assert not {"is_local", "local_files_only"} & said.keys()  # of who loaded it here
    else:
        tokenizer = build_tokenizer(weights, read_metadata(weights))
    assert tokenizer.chat_template.endswith(template_text("chatml"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Chat template: `chatml`" in card
    _, front, text = card.split("---", 2)
    assert yaml.safe_load(front)["library_name"] in ("peft", "transformers", "gguf")
    assert "<script" not in MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text)


def test_the_card_of_an_adapter_serves_it_on_its_own_base(chat_run, tmp_path):
    """Never on the merged model, which would have the update twice."""
    export_adapter(chat_run, tmp_path / "here")
    export_adapter(chat_run, tmp_path / "hub", naming=PUSHED)
    for name, base, adapter in [
        ("here", "FOLDER_OF_THE_BASE", "THIS_FOLDER"),
        ("hub", "tiny/llama", "me/chain"),
    ]:
        card = (tmp_path / name / "README.md").read_text()
        assert f"vllm serve {base} --enable-lora" in card
        assert f"--lora-modules chain={adapter}" in card
        assert f'AutoModelForCausalLM.from_pretrained("{base}")' in card
        assert f'PeftModel.from_pretrained(base, "{adapter}")' in card
    assert not is_of_another(tmp_path / "here")
    (tmp_path / "README.md").write_text("# By a trainer\n\nLibrary: peft")
    assert is_of_another(tmp_path)


@pytest.mark.parametrize("name", [None, "me/chain"])
def test_names_in_a_card_are_text(chat_run, tmp_path, name):
    """Whatever they contain: an end of the front matter, of a code block, HTML, Jinja."""
    hostile = f"x/```\n---\n{MARKUP} {{{{ 'jin' ~ 'ja' }}}} \x85\u2028- y: $(z)"
    export_adapter(chat_run, tmp_path / "out", naming=Naming(name, hostile, hostile))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "license": hostile,
        "pipeline_tag": "text-generation",
        "tags": ["chain-of-lora", "lora"],
    } | ({} if name else {"base_model": hostile})
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    first = "`chain`" if name else "Model card"
    assert headings == [first, "The chain", "Lineage", "Use", "Licence"]
    assert [token.info for token in tokens if token.type == "fence"] == ["text", "python", "sh"]
    inline = [child for token in tokens for child in token.children or ()]
    assert "<script>" in "".join(t.content for t in inline if t.type == "code_inline")
    assert not any("html" in token.type or token.type == "hr" for token in [*tokens, *inline])
    assert "jinja" not in card.text


# --- doors


@pytest.mark.parametrize(
    "name", ["LICENSE.txt", "chat_template.jinja", "generation_config.json", "vocab.txt"]
)
@pytest.mark.parametrize("export", [export_adapter, export_merged])
def test_a_link_in_the_base_leads_no_file_into_an_export(chat_run, tmp_path, name, export):
    base, secret = chat_run.parent / "base", tmp_path / "secret"
    secret.write_text('{"secret": 1}')
    path = base / name
    kept = path.read_bytes() if path.is_file() else None
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    try:
        with pytest.raises(
            (ModelError, RunError), match=rf"must lie in its folder .*{name}|another {name}"
        ):
            export(chat_run, tmp_path / "out")
    finally:
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_its_own(chat_run, tmp_path):
    cache = tmp_path / "models--tiny--llama"
    snapshot = Path(shutil.copytree(chat_run.parent / "base", cache / "snapshots" / "abc"))
    (cache / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    chain = Chain(AutoModelForCausalLM.from_pretrained(snapshot), checkpoint=snapshot)
    chain.extend(LinkConfig(rank=2, target_modules=("q_proj",)))
    export_adapter(chain, tmp_path / "out")
    copied = tmp_path / "out" / "LICENSE"
    assert copied.read_text() == "Do as you like."
    assert not copied.is_symlink()


def test_a_received_run_reads_no_file_as_its_template(chat_run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("{{ messages }} secret")
    run = Path(shutil.copytree(chat_run, tmp_path / "run"))
    path = stage_dir(run) / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["data"]["chat_template"] = str(secret)
    path.write_text(yaml.safe_dump(tree))
    sign(run)
    for export in (export_adapter, export_merged):
        with pytest.raises(RunError, match=r"chat_template` of a run must be a name or a text"):
            export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_missed_in_words(chat_run, tmp_path, caplog):
    base = chat_run.parent / "base"
    base.rename(base.with_name("moved"))
    try:
        export_adapter(chat_run, tmp_path / "out")
    finally:
        base.with_name("moved").rename(base)
    assert "the export gets no licence and no tokenizer" in caplog.text
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
