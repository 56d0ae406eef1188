"""Chains in GGUF: read back by transformers, run by llama.cpp where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import make_tiny_folder, write_rows
from helpers_tasks import write_task
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import Chain, LinkConfig, extend, load_run, save_chain, train
from chainlora.config.template_names import NAMES, template_text
from chainlora.errors import ModelError
from chainlora.models.loading import load_model
from chainlora_gguf import export_gguf
from chainlora_gguf.modelfile import cut_template

gguf = pytest.importorskip("gguf", reason="no gguf: pip install 'chainlora[gguf]'")

_LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"rope_type": "llama3", "original_max_position_embeddings": 8192, "rope_theta": 5e5}
_LINEAR = {"factor": 4.0, "rope_type": "linear", "rope_theta": 1e4}
# (class of config, keys); what llama.cpp has in code, a tiny model must have too.
MODELS = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama untied": ("Llama", {"tie_word_embeddings": False, "head_dim": 16}),
    "llama with RoPE of 3": ("Llama", {"rope_parameters": _LLAMA3, "head_dim": 64}),
    "qwen2 with linear RoPE": ("Qwen2", {"rope_parameters": _LINEAR}),
    "mistral": ("Mistral", {"sliding_window": 48}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 256, "sliding_window": 8}),
    "gemma3": ("Gemma3Text", {"head_dim": 256, "sliding_window": 8}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
}
UNREAD = ("gemma",)  # transformers does not read these out of GGUF
TEXT = "the cat sat on a mat and saw two red birds fly over 12 green hills; it's good"


def make_base(folder: Path, name: str, template: object = None, **more: object) -> Path:
    """A tiny model of a class, whose norms and biases are not what they begin as."""
    kind, keys = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_folder(folder))
    if template is not None:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        num_hidden_layers=7 if kind == "Gemma3Text" else 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # the embedding has rows to spare, as many have
        **{"intermediate_size": 64, "vocab_size": len(tokenizer) + 3} | keys | more,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder)
    return folder


def make_chain(folder: Path, base: Path, target_modules: object = "all-linear", **keys) -> Path:
    """A saved chain of two links that change much."""
    model = AutoModelForCausalLM.from_pretrained(base)
    chain = Chain(model, checkpoint=base)
    for rank in (4, 2):
        chain.extend(LinkConfig(rank=rank, alpha=rank, target_modules=target_modules, **keys))
        for parameter in chain.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1
        chain.tie()
    save_chain(chain, folder)
    return folder


@torch.no_grad()
def logits(model, ids: list[int]) -> torch.Tensor:
    return model.eval()(torch.tensor([ids])).logits[0]


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    found = gguf.GGUFReader(file).tensors
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in found}


def facts_of(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("name", MODELS)
def test_gguf_is_the_model(name, tmp_path, cache):
    """Merged, and as a LoRA on its base: the same function, to float32's rounding; as transformers
    reads it, and as llama.cpp does where it is installed."""
    folder, base = tmp_path, make_base(tmp_path / "base", name)
    run = make_chain(folder / "chain", base)
    done = export_gguf(run, folder / "merged", kind="f32")
    assert (done["to"], done["type"], done["links"]) == ("gguf", "f32", 2)
    export_gguf(run, folder / "lora", as_adapter=True)
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"][:48]
    wanted = logits(load_run(run)[0], ids)
    merged, plain = (tensors_of(folder / file) for file in ("merged/model.gguf", "lora/base.gguf"))
    facts = facts_of(folder / "merged/model.gguf")
    (context,) = (value for key, value in facts.items() if "context_length" in key)
    assert context == (48 if name == "mistral" else 64)  # of a window, where llama.cpp has none
    assert f"PARAMETER num_ctx {context}\n" in (folder / "merged" / "Modelfile").read_text()
    lora = tensors_of(folder / "lora" / "adapter.gguf")
    assert lora
    for key in plain:  # as llama.cpp adds a LoRA: alpha is the rank
        if f"{key}.lora_a" in lora:
            plain[key] = plain[key] + lora[f"{key}.lora_b"] @ lora[f"{key}.lora_a"]
        assert np.allclose(merged[key], plain[key], atol=1e-5), key
    if name in UNREAD:
        state = load_run(run)[0].state_dict()
        assert np.array_equal(merged["token_embd.weight"], state["model.embed_tokens.weight"])
        assert np.array_equal(merged["output_norm.weight"], state["model.norm.weight"] + 1)
        query = state["model.layers.1.self_attn.q_proj.weight"]
        assert np.array_equal(merged["blk.1.attn_q.weight"], query)
    else:
        read, _ = load_model(folder / "merged" / "model.gguf", "float32")
        assert torch.allclose(logits(read, ids), wanted, atol=1e-4)
        was = load_model(folder / "base", "float32")[0].config.rope_parameters
        assert read.config.rope_parameters == was
    if find_spec("llama_cpp"):
        assert_llama_cpp_computes(wanted, folder, ids)


def assert_llama_cpp_computes(wanted: torch.Tensor, folder: Path, ids: list[int]) -> None:
    from llama_cpp import Llama

    for file, adapter in [("merged/model.gguf", None), ("lora/base.gguf", "lora/adapter.gguf")]:
        llama = Llama(
            str(folder / file),
            lora_path=adapter and str(folder / adapter),
            n_ctx=64,
            logits_all=True,
            verbose=False,
        )
        assert llama.tokenize(TEXT.encode())[:48] == ids
        llama.eval(ids)
        # llama.cpp keeps keys and values in float16
        assert torch.allclose(torch.tensor(llama.scores[: len(ids)]), wanted, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(("kind", "bits"), [("f32", 32), ("f16", 16), ("bf16", 16), ("q8_0", 8.5)])
def test_a_kind_rounds_as_it_says_and_is_as_large(tmp_path, kind, bits):
    base = make_base(tmp_path / "base", "llama", intermediate_size=40)
    run = make_chain(tmp_path / "chain", base, ["q_proj", "down_proj"])
    export_gguf(run, tmp_path / "new/out", kind=kind)
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "new/out/model.gguf").tensors}
    assert found["token_embd.weight"].n_bytes * 8 == found["token_embd.weight"].n_elements * bits
    assert found["output_norm.weight"].tensor_type.name == "F32"
    fits = "F16" if kind == "q8_0" else kind.upper()  # 40 is no multiple of 32
    assert found["blk.0.ffn_down.weight"].tensor_type.name == fits
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "new/out", gguf_file="model.gguf")
    # half a step, relative to a row's largest value; the scale of Q8_0 is a float16
    half = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.5 / 127 + 2**-11}[kind]
    wanted = load_run(run)[0].state_dict()
    for key, value in read.state_dict().items():
        bound = half * wanted[key].abs().amax(-1, keepdim=True) + 2**-24  # float16's smallest value
        assert ((value - wanted[key]).abs() <= bound).all(), key


def test_float64_becomes_float32(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    AutoModelForCausalLM.from_pretrained(base).double().save_pretrained(base)
    run = make_chain(tmp_path / "run", base)
    assert export_gguf(run, tmp_path / "out")["type"] == "f32"


def test_a_tokenizer_of_sentencepiece_is_the_same(tmp_path, shared_models):
    run = make_chain(tmp_path / "chain", shared_models / "stories260k", ["v_proj"])
    export_gguf(run, tmp_path / "out")  # which compares them
    facts = facts_of(tmp_path / "out/model.gguf")
    assert facts["tokenizer.ggml.model"] == "llama"
    assert facts["tokenizer.ggml.add_bos_token"]


def with_gemmas_tokenizer(base: Path, model: str) -> Path:
    """Give a tiny model a tokenizer as Gemma's: sentencepiece's BPE, without a blank in front."""
    core = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    core.train_from_iterator([TEXT] * 2, trainer)
    tree = json.loads(core.to_str())["model"]
    tokenizer = transformers.GemmaTokenizer(tree["vocab"], list(map(tuple, tree["merges"])))
    make_base(base, model, vocab_size=len(tokenizer))
    (base / "tokenizer.json").unlink()
    tokenizer.save_pretrained(base)
    return base


@pytest.mark.parametrize("model", ["gemma", "gemma2"])
def test_a_tokenizer_of_gemma_is_the_same(tmp_path, model):
    """Gemma 3 for text has a special token without a row in the embedding."""
    base = with_gemmas_tokenizer(tmp_path / "base", model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    export_gguf(make_chain(tmp_path / "chain", base, ["v_proj"]), tmp_path / "out")
    facts = facts_of(tmp_path / "out/model.gguf")
    assert (facts["general.architecture"], facts["tokenizer.ggml.model"]) == (model, "llama")


def test_a_tokenizer_of_another_kind_is_refused_before_weights_are_read(tmp_path):
    base = with_gemmas_tokenizer(tmp_path / "base", "llama")
    run = make_chain(tmp_path / "chain", base, ["v_proj"])
    (base / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="must reproduce its tokenizer"):
        export_gguf(run, tmp_path / "out")


PHI3 = {"</s>": True, "<|end|>": True, "<s>": False, "<|endoftext|>": False, "<unk>": False}


@pytest.mark.parametrize(
    ("model", "folder", "tokens", "name"),
    [
        ("llama", "my-PHI3-notes", {}, "my-Phi 3-notes"),
        ("llama", "phi-3", {"<|end|>": True}, "Phi 3"),
        ("phi3", "notes", PHI3, "Phi-3 notes"),
    ],
)
def test_a_folders_name_does_not_change_what_llama_cpp_does(tmp_path, model, folder, tokens, name):
    """llama.cpp strips blanks after special tokens where the model's name contains phi3."""
    base = make_base(tmp_path / folder, model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    added = [AddedToken(token, rstrip=strips, special=True) for token, strips in tokens.items()]
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(base)
    export_gguf(make_chain(tmp_path / "chain", base, ["o_proj"]), tmp_path / "out", as_adapter=True)
    for file in ("base.gguf", "adapter.gguf"):
        assert facts_of(tmp_path / "out" / file)["general.name"] == name


def test_chat_templates_for_chats_and_tools_are_kept(tmp_path):
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    base = make_base(tmp_path / "base", "llama", templates)
    export_gguf(make_chain(tmp_path / "chain", base, ["v_proj"]), tmp_path / "out")
    found = load_model(tmp_path / "out/model.gguf", torch.float32)[1]
    assert found.chat_template == templates


REFUSED = {
    "another class": ("llama", {"model_type": "olmo"}, "must be one of llama, mistral"),
    "activation": ("llama", {"hidden_act": "relu"}, "have the activation silu (got relu)"),
    "biases": ("llama", {"attention_bias": True}, "have no attention_bias"),
    "RoPE": ("llama", {"rope_parameters": _LINEAR | {"rope_type": "dynamic"}}, "(got dynamic)"),
    "Llama 3's RoPE": ("qwen2", {"rope_parameters": _LLAMA3}, "default or linear (got llama3)"),
    "attention scale": ("gemma2", {"query_pre_attn_scalar": 8}, "scale attention by its head_dim"),
    "caps": ("gemma3", {"final_logit_softcapping": 30.0}, "have the logit caps of its kind"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused_by_name(tmp_path, case):
    name, keys, words = REFUSED[case]
    if case == "another class":
        base = make_tiny_folder(tmp_path / "base")
        config = transformers.OlmoConfig(vocab_size=400, hidden_size=32, intermediate_size=64,
                                         num_hidden_layers=1, num_attention_heads=4)  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    else:
        base = make_base(tmp_path / "base", name, **keys)
    run = make_chain(tmp_path / "chain", base, ["v_proj"])
    with pytest.raises(ModelError) as caught:
        export_gguf(run, tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama untied", {"target_modules": ["lm_head"]}),
        ("qwen2", {"target_modules": ["v_proj"], "lora_bias": True}),
    ],
)
def test_what_a_lora_of_llama_cpp_cannot_hold_is_refused(tmp_path, name, keys):
    run = make_chain(tmp_path / "chain", make_base(tmp_path / "base", name), **keys)
    with pytest.raises(ModelError, match="adapt only linear maps of layers"):
        export_gguf(run, tmp_path / "out", as_adapter=True)


# --- Ollama


@pytest.mark.parametrize("template", [*NAMES, "the model's", "alternating", "of its own kind"])
def test_the_template_for_ollama_says_what_the_chat_template_does(tiny_folder, template):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    if template in NAMES:
        tokenizer.chat_template = template_text(template)
    if template == "alternating":  # as Gemma's: no system message
        refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        tokenizer.chat_template = refusal + tokenizer.chat_template
    if template == "of its own kind":  # counts turns, which pieces cannot
        tokenizer.chat_template = tokenizer.chat_template.replace("<s>", "{{ messages | length }}")
    chat = cut_template(tokenizer)
    if template == "of its own kind":
        assert chat is None
        return
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": c} for r, c in zip(roles, "abc", strict=True)]
    keys = {"tokenize": False, "add_generation_prompt": True}
    assert chat.text("abc") == tokenizer.apply_chat_template(messages, **keys)
    assert chat.stop
    go = chat.in_go()
    assert go.count("{{ .Content }}") == 2
    assert ("{{ .System }}" in go) == (template != "alternating")
    assert go.count("{{ end }}") == go.count("{{ if") + go.count("{{ range")


def test_what_ends_no_turn_stops_nothing(tmp_path):
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    base = make_base(tmp_path / "base", "llama", template)
    export_gguf(make_chain(tmp_path / "chain", base, ["q_proj"]), tmp_path / "out")
    assert "PARAMETER stop" not in (tmp_path / "out/Modelfile").read_text()


def test_a_chat_template_that_fails_is_left_out_of_the_modelfile(tmp_path, caplog):
    template = "{% for m in messages %}{{ m.content + user.name }}{% endfor %}"
    base = make_base(tmp_path / "base", "llama", template)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat", "completion": " sat"}] * 4)
    tree = {"model": str(base), "data": {"train": str(rows)}, "output": str(tmp_path / "run")}
    train(tree | {"chain": {"ranks": [2], "steps": [1], "target_modules": ["q_proj"]}})
    export_gguf(tmp_path / "run", tmp_path / "out")
    assert "TEMPLATE" not in (tmp_path / "out/Modelfile").read_text()
    assert "the Modelfile has no TEMPLATE" in caplog.text
    assert "'user' is undefined" in caplog.text


def test_the_modelfile_is_for_the_rows(chainlora, tiny_folder, sentiment, tmp_path):
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    chats = write_rows(tmp_path / "rows.jsonl", [{"messages": said}] * 4)
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": "the cat", "completion": " sat"}] * 4)
    task = {"task": str(sentiment / "task.yaml"), "train": str(sentiment / "train.jsonl")}
    for name, data in [("chats", {"train": str(chats), "chat_template": "chatml"}), ("task", task)]:
        tree = {"model": str(tiny_folder), "data": data, "output": str(tmp_path / name)}
        train(tree | {"chain": {"ranks": [2], "steps": [1]}})
    chat = chainlora(f"export {tmp_path}/chats --to gguf-adapter --output {tmp_path}/a")
    assert chat.status == 0, chat.err
    assert "adapter.gguf" in chat.out
    lines = (tmp_path / "a/Modelfile").read_text()
    head = "FROM ./base.gguf\nADAPTER ./adapter.gguf\n"
    assert lines.startswith(f'{head}TEMPLATE """{{{{ if .System }}}}')
    assert '\nPARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 128\n' in lines
    rest = {"data": {"train": str(plain)}, "chain": {"ranks": [2], "steps": [1]}}
    extend(tmp_path / "chats", {"name": "plain", **rest}, beside=False)
    for state in ("main", "plain"):
        export_gguf(f"{tmp_path}/chats@{state}", tmp_path / state)
        assert ("im_start" in (tmp_path / state / "Modelfile").read_text()) == (state == "main")
    words = f"export {tmp_path}/task --gguf-type q8_0 --output {tmp_path}/b --to"
    assert chainlora(f"{words} gguf").status == 0
    assert (tmp_path / "b" / "Modelfile").read_text() == (
        'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER num_ctx 128\n'
    )


def test_the_modelfile_ends_answers_where_the_task_does(tiny_folder, tmp_path):
    """Rows of such a task teach no end of the text."""
    asked = {"completion": " {{ a }}\n", "references": "[a]", "metric": "em", "stop": "\n"}
    plain = {"labels": None, "loss": "completion"}
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the cat", "a": "sat"}] * 4)
    data = {"task": str(write_task(tmp_path, **asked, **plain)), "train": str(rows)}
    tree = {"model": str(tiny_folder), "data": data, "output": str(tmp_path / "run")}
    train(tree | {"chain": {"ranks": [2], "steps": [1]}, "start_data": "none"})
    export_gguf(tmp_path / "run", tmp_path / "out")
    assert (
        '\nPARAMETER stop """\n"""\nPARAMETER num_ctx' in (tmp_path / "out/Modelfile").read_text()
    )
