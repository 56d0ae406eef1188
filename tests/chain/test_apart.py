"""Stages as adapters of their own: added up as servers do, held to the state that they are of."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers import settings
from helpers_export import fit, logits
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from chainlora import Chain, export_adapter, extend, load_run, train
from chainlora.errors import ChainLoRAError
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import mix_stages
from chainlora_gguf.to_gguf import export_gguf

TOLERANCE = 1e-5  # of logits: float32's rounding near 1 is about 1e-6


@pytest.fixture(scope="module")
def made(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A run of two stages: the second on top of the first at strength ½."""
    run = tmp_path_factory.mktemp("apart") / "chain"
    tree = settings(tiny_folder, sentiment, run)
    first = {"name": "facts", "data": tree.pop("data"), "chain": {"ranks": [4, 2]}}
    first["chain"] |= {"steps": [3, 2]}
    tree["chain"] = {"alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    train(tree | {"stages": [first]})
    more = {"name": "style", "data": first["data"], "chain": {"ranks": [3], "steps": [3]}}
    extend(run, more, beside=False)
    mix_stages(run, {"style": 0.5})
    return run


def served(base: Path, folder: Path, strengths: dict[str, float]) -> torch.Tensor:
    """Logits of a base with adapters of a folder active at once, as servers add them."""
    names = list(strengths)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, strength in strengths.items():
                module.set_scale(name, strength)
    return logits(model)


def test_the_stages_add_up_to_the_state(made, tiny_folder, tmp_path, monkeypatch):
    state = open_run(made)
    done = export_adapter(made, tmp_path / "each", each=True)
    digits = state.state.digest[:8]
    names = [f"facts-{digits}", f"style-{digits}"]
    strengths = {each["adapter"]: each["strength"] for each in done["adapters"]}
    assert strengths == dict(zip(names, [1.0, 0.5], strict=True))
    assert [each["rank"] for each in done["adapters"]] == [6, 3]
    for scales in (list(strengths.values()), [1.0, 0.0], [0.0, 0.5], [0.5, 0.0]):
        mixed = state.with_strengths(dict(zip(["facts", "style"], scales, strict=True)))
        found = served(tiny_folder, tmp_path / "each", dict(zip(names, scales, strict=True)))
        wanted = logits(load_run(mixed)[0])
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
        assert (found - logits(load_run(made, num_links=0)[0])).abs().max() > 100 * TOLERANCE
    monkeypatch.chdir(tmp_path / "each")  # the sheet's own commands
    sheet = Path("SERVING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", sheet, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code.replace("FOLDER_OF_THE_BASE", str(tiny_folder)), scope)
    wanted = logits(load_run(made)[0])
    torch.testing.assert_close(logits(scope["model"]), wanted, atol=TOLERANCE, rtol=0)
    assert f"--max-lora-rank 8 --lora-modules {names[0]}={names[0]} {names[1]}=" in sheet
    assert f"chainlora export RUN@{state.entry.key} --to adapter" in sheet


def test_stages_in_gguf_add_up_too(made, chainlora, tmp_path):
    gguf = pytest.importorskip("gguf", reason="no gguf: pip install 'chainlora[gguf]'")
    to = ("export", made, "--to", "gguf-adapter", "--output")
    done = chainlora(*to, tmp_path / "each", "--each", "--json").json
    export_gguf(made, tmp_path / "one", as_adapter=True)

    def update(file: Path) -> dict[str, np.ndarray]:
        found = {t.name: t.data for t in gguf.GGUFReader(file).tensors}
        names = [key.removesuffix(".lora_a") for key in found if key.endswith(".lora_a")]
        return {key: found[f"{key}.lora_b"] @ found[f"{key}.lora_a"] for key in names}

    whole = update(tmp_path / "one/adapter.gguf")
    parts = [
        (each["strength"], update(tmp_path / f"each/{each['adapter']}.gguf"))
        for each in done["adapters"]
    ]
    for key, wanted in whole.items():
        found = sum(strength * part[key] for strength, part in parts)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    (base, one) = (tmp_path / f"{folder}/base.gguf" for folder in ("each", "one"))
    assert base.read_bytes() == one.read_bytes()
    first, second = (each["adapter"] for each in done["adapters"])
    sheet = (tmp_path / "each/SERVING.md").read_text(encoding="utf-8")
    assert f"--lora-scaled {first}.gguf:1.0,{second}.gguf:0.5\n" in sheet
    (request,) = re.findall(r"-d '(.*)'", sheet)
    assert json.loads(request)["lora"] == [{"id": 0, "scale": 1.0}, {"id": 1, "scale": 0}]
    lines = (tmp_path / f"each/{second}.Modelfile").read_text(encoding="utf-8")
    assert lines.startswith(f"FROM ./base.gguf\nADAPTER ./{second}.gguf\n")
    assert "See [SERVING.md]" in (tmp_path / "each/README.md").read_text(encoding="utf-8")


def test_a_stage_that_is_off_is_no_part(made, tmp_path, chainlora):
    """Strengths that no entry has are said by `--stages`; other states have other names."""
    to = ("export", made, "--to", "adapter", "--each", "--output")
    assert chainlora(*to, tmp_path / "a", "--stages", "style=0.25").status == 0
    assert chainlora(*to, tmp_path / "b").status == 0
    (a,) = (path.name for path in (tmp_path / "a").iterdir() if path.is_dir())
    b = {path.name for path in (tmp_path / "b").iterdir() if path.is_dir()}
    assert a.startswith("style-")
    assert len(b) == 2
    assert a not in b
    assert "--stages style=0.25 --to" in (tmp_path / "a/SERVING.md").read_text(encoding="utf-8")
    card = (tmp_path / "a" / a / "README.md").read_text(encoding="utf-8")
    assert "a chain of 1 LoRA link(s) as one adapter of rank 3" in card


def test_what_does_not_add_up_is_refused(made, folders, sentiment, tmp_path, chainlora):
    def refused(run: Any, said: str, **keys: Any) -> None:
        with pytest.raises(ChainLoRAError, match=said):
            export_adapter(run, tmp_path / "out", each=True, **keys)
        assert not (tmp_path / "out").exists()

    keys = {"target_modules": ["q_proj"], "lora_bias": True, "ranks": [1], "steps": [1]}
    refused(fit(folders["opt"], sentiment, tmp_path / "opt", chain=keys), "got a LoRA bias in main")
    refused(open_run(made, []), "at least one link")
    refused(made, "got its first 1 links", num_links=1)
    refused(Chain(AutoModelForCausalLM.from_pretrained(folders["llama"])), "got a chain in memory")
    for words in (["gguf"], ["adapter", "--links", "1"], ["adapter", "--push-to-hub", "a/b"]):
        wrong = chainlora("export", made, "--each", "--output", "x", "--to", *words)
        assert (wrong.status, "--each writes an adapter" in wrong.err) == (2, True)


def test_llama_server_is_held_to_the_run(made, monkeypatch, capsys):
    """Where it is installed; else the example says what it needs."""
    pytest.importorskip("gguf", reason="no gguf: pip install 'chainlora[gguf]'")
    example = Path(__file__).resolve().parents[2] / "examples/serve_check.py"
    monkeypatch.setattr(sys, "argv", ["serve_check.py", str(made)])
    if shutil.which("llama-server") is None:
        with pytest.raises(SystemExit, match="No llama-server found"):
            runpy.run_path(str(example))
        return
    runpy.run_path(str(example))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["facts"] * 3 + ["style"] * 3
    for line in lines:
        _, _, equal, _, of, difference = line.split()
        assert equal == of
        assert float(difference) < 1e-3  # sums of float32 in another order
