"""The config: what is refused and in which words, what an override means, and that a dumped config
is the same one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from chainlora import LinkConfig, RunConfig, load_config, make_config
from chainlora.config.json_schema import config_sections
from chainlora.config.reading import set_key
from chainlora.errors import ConfigError
from chainlora.runs.paths import split_address

TREE = {"model": "m", "data": {"train": "x.jsonl"}, "chain": {"ranks": [8], "steps": [1]}}


def test_a_name_of_digits_is_a_text():
    for key in ("output", "model"):
        for name in ("2026-01-05", "2026", "1e3"):
            assert getattr(config((key, name)), key) == name


def config(*overrides: tuple[str, object]) -> RunConfig:
    tree = yaml.safe_load(yaml.safe_dump(TREE))
    for key, value in overrides:
        set_key(tree, key, value)
    return make_config(tree)


# Key and value by the command line, and how the message begins.
WRONG = [
    ("chain.rank", "[8]", "unknown key `chain.rank`; did you mean 'ranks'?"),
    ("train.learning", "1", "unknown key `train.learning`; known: batch_size, "),
    ("model", "{a: x, 0: y}", "`model` must be a name, or a section of name and quantize (got"),
    ("chain.plateau.of", "loss", "unknown key `chain.plateau`; there is no such key here: a link "),
    ("train.optimizer_reset", "prune", "unknown key `train.optimizer_reset`; there is no such k"),
    ("train.accept_links", "better", "unknown key `train.accept_links`; there is no such key here"),
    ("lr", "1e-3", "unknown key `lr`; did you mean 'train.lr'?"),
    ("rank", "8", "unknown key `rank`; did you mean 'chain.ranks'?"),
    ("chain.ranks", "x", "`chain.ranks` must be a list (got 'x')"),
    ("train.betas", "0.9", "`train.betas` must be a list (got 0.9)"),  # of two
    ("chain.lora_r", "8", "unknown key `chain.lora_r`; here it is `chain.ranks` (one rank p"),
    ("sample_packing", "true", "unknown key `sample_packing`; there is no such key here: not need"),
    ("optim", "adamw_bnb_8bit", "unknown key `optim`; here it is `train.optimizer: adamw_8bit`"),
    ("load_in_4bit", "true", "unknown key `load_in_4bit`; here it is `quantize: nf4`"),
    ("chain.target_modules", "all", "`target_modules` must name modules (got all); use all-linear"),
    ("data.fields", "{query: prompt}", "`data.fields` must name fields of format auto: prom"),
    ("data", "{train: x, format: text, fields: {prompt: q}}", "`data.fields` must name fields of"),
    (
        "data",
        "{task: t, train: r, fields: {text: q}}",
        "`data.fields` cannot be used with a t",
    ),
    ("data.chat_template", "qwen", "`data.chat_template` must be a name, a file or a Jinja text ("),
    ("fp16", "true", "unknown key `fp16`; there is no such key here: train.dtype is float32"),
    ("chain.ranks", "[8, a]", "`chain.ranks` must be a whole number (got 'a' at position 1)"),
    ("chain.ranks", "[0]", "`chain.ranks` must be at least 1 (got 0 at position 0)"),
    ("chain.ranks", "[8, 8]", "`ranks` and `steps` must have the same length (got 2 and 1); give"),
    ("chain.ranks", "[8", "the value of `chain.ranks` must be YAML (got '[8': expected ',' or ']'"),
    ("chain.epochs", "[1]", "give one of `epochs`, `steps` and `tokens` (got epochs"),
    ("chain.alpha", "x", "`chain.alpha` must be a number or a list (got 'x')"),
    ("chain.alpha", "[1, 2]", "`alpha` must be one number, or one per link (got (1.0, 2.0) for"),
    ("chain.target_modules", "[]", "`target_modules` must name at least one module (got none)"),
    ("chain.target_modules", "['']", "`target_modules` must hold names (got an empty name); remo"),
    ("chain.target_modules", "'*proj('", "`target_modules` must be a list of names, all-linear or"),
    ("chain.hold", "tide", "`chain.hold` must be 'tied' or 'carried' (got 'tide'); its"),
    ("chain.knots", "bogus", "`chain.knots` must be auto, null or a section of keys (got 'bogus')"),
    ("train.eps", "1e-300", "`train.eps` must be at least 1e-30 (got 1e-300)"),  # 0 in float32
    ("chain.knots", "{every: 99, time_constant: 1}", "`knots.time_constant` must leave a part of"),
    ("chain", "5", "`chain` must be a section of keys (got 5)"),
    ("model.name", "m", "`model.name` must name a key inside a section (got 'model', which is a"),
    ("model", "null", "`model` must be a text (got None)"),
    ("train.lr", "0", "`train.lr` must be above 0 (got 0); its default is 0.001"),
    ("train.lr", "high", "`train.lr` must be a number (got 'high'); its default is 0.001"),
    ("train.loss", "[nll]", "`train.loss` must be a text (got ['nll']); its default is null"),
    ("train.schedule", "lin", "`train.schedule` must be 'linear', 'cosine' or 'constant' (got 'li"),
    ("train.betas", "[0.9]", "`train.betas` must be given (got none at position 1); add it"),
    ("train.betas", "[0.9, 1]", "`train.betas` must be below 1 (got 1 at position 1); its defa"),
    ("train.keep_best", "true", "`early_stop` and `keep_best` need validation rows (got none); gi"),
    ("data.shots", "2", "`data.shots` needs a task, whose rows are the demonstrations (got 2"),
    *(
        ("data.validation", value, "`data.validation` must be a file, a share between 0 and 1, or")
        for value in ("0", "true", "1.5")
    ),
    ("data", "{train: a, validation: 9, num_validation: 3}", "`data.validation` as a share or num"),
    ("data.train", "[]", "`data.train` must name a file (got an empty list); e.g. [my.jsonl]"),
    ("data.train", "5", "`data.train` must be a text or a list (got 5)"),
    ("data.train", "[a, {path: b, weight: 0}]", "`data.train.weight` must be above 0 (got 0 at p"),
    ("data.train", "[{weight: 2}]", "`data.train.path` must be given (got none); add it"),
    ("data.train", "[{path: a, wight: 2}]", "unknown key `data.train.0.wight`; did you mean 'weig"),
    ("data.[x]", "1", "unknown key `data.[x]`; known: "),
    ("data.train", "null", "`data` must name a `train` file (got none); e.g. train: my.jsonl"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_what_is_wrong_is_said_with_rule_value_and_remedy(key, value, message):
    with pytest.raises(ConfigError) as raised:
        config((key, value))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_each_length_has_a_rank_by_default():
    for chain, ranks in {"{epochs: [1, 1]}": (8, 8), "{steps: 3}": (8,), "{}": (8,)}.items():
        assert config(("chain", chain)).chain.ranks == ranks


NUMBERS = [
    f"{prefix}{key}"
    for prefix, model in config_sections().items()
    for key, field in model.model_fields.items()
    if re.match(r"(?!dict).*\b(int|float)\b", str(field.annotation))
]


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_no_key_can_mean_is_refused_by_name(key):
    """Some ended as unexpected errors, hours later; `lr: true` named no section."""
    words = [True] * (key != "data.keep_rows")
    for value in (*words, -1e300, 1e300, -(10**400), 10**400, float("nan")):
        with pytest.raises(ConfigError, match=rf"`{key}` must be .* \(got ") as raised:
            config((key, value))
        assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("chain: {init: pissa}", r"`chain.init` must be .*\(got 'pissa'\); its default is kaiming"),
        ("chain: {knots: auto, lora_bias: true}", "`knots` need plain LoRA links"),
        ("train: {keep_best: true, eval_at_knots: false}", "need evaluations at knots"),
        ("train: {dpo_beta: 0.2}", r"`train.dpo_beta` needs loss: dpo \(got loss: null\); set"),
        ("train: {orpo_beta: 0.2}", "`train.orpo_beta` needs loss: orpo"),
        ("chain: {init_batches: 2}", r"`chain.init_batches` needs init: gradient \(got init: kai"),
        ("train: {restart_warmup_steps: 5}", "needs restart_schedule: true .got restart_schedule:"),
        ("data: {train: null, task: x}", "`data` must name a `train` file .got only task: x"),
        ("data: {task: rte, format: chat}", "`data.format` cannot be used with a task"),
        ("data: {train: [x, y, x]}", "`data.train` must name different files"),
        ("quantize: nf4", r"merged links without loss \(got hold: tied\); set chain.hold: carried"),
    ],
)
def test_combinations_that_cannot_work_are_refused_before_a_link_begins(keys, message):
    tree = yaml.safe_load(keys)
    whole = TREE | {key: value for key, value in tree.items() if key == "quantize"}
    for key in ("data", "chain", "train"):
        whole[key] = TREE.get(key, {}) | tree.get(key, {})
    whole["data"] |= {"validation": "v"}
    with pytest.raises(ConfigError, match=message) as raised:
        make_config(whole)
    assert "(got " in str(raised.value)
    assert "; " in str(raised.value)


@pytest.mark.parametrize(("key", "read"), [("on", "True"), ("8", "8"), ("null", "None")])
def test_a_key_that_yaml_reads_as_no_text_is_unknown(tmp_path, key, read):
    file = tmp_path / "run.yaml"
    file.write_text(f"{yaml.safe_dump(TREE)}{key}: x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^unknown key `{read}`; known: chain, data, "):
        load_config(file)


def test_every_problem_is_in_the_one_line():
    said = r"^`chain.ranks` must .* \(got 'x'\).*; unknown key `train.sed`; .*seed'"
    with pytest.raises(ConfigError, match=said):
        config(("chain.ranks", "x"), ("train.sed", "1"))
    with pytest.raises(ConfigError) as raised:
        config(("zig", "1"), ("zag", "1"))
    assert str(raised.value).count("known: chain, data") == 1
    with pytest.raises(ConfigError, match=r"^`data` must be given"):
        RunConfig(model="m")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": 8}, "^unknown key `r`; did you mean 'rank'"),
        ({"lora_alpha": 8}, "^unknown key `lora_alpha`; did you mean 'alpha'"),
        ({"rank": 0}, r"^`rank` must be at least 1 \(got 0\); its default is 8"),
        ({"alpha": 1e300}, r"^`alpha` must be at most 1e\+06 \(got 1e\+300\)"),
        ({"target_modules": "all"}, "use all-linear"),
    ],
)
def test_a_link_of_its_own_is_refused_in_the_same_words(keys, message):
    with pytest.raises(ConfigError, match=message):
        LinkConfig(**keys)


def test_alpha_when_the_rank_drops():
    for key, value, expected in (
        ("alpha", "16", [2.0, 2.0, 2.0]),  # proportional keeps the scaling
        ("alpha_policy", "fixed", [2.0, 4.0, 8.0]),
        ("alpha", "[8, 8, 2]", [1.0, 2.0, 1.0]),
        ("rslora", "true", pytest.approx([16 / 8**0.5] * 3)),
    ):
        lengths = ("chain.ranks", "[8, 4, 2]"), ("chain.steps", "[1, 1, 1]")
        links = config(*lengths, (f"chain.{key}", value)).chain.links()
        assert [link.scaling for link in links] == expected


def test_a_tilde_is_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/history.json").touch()
    own = {"validation": "~/v", "test": "~/t"}
    files = [{"path": "~/a", "weight": 1.0}, {"path": "~/b", "weight": 2.0}]
    for data in (own | {"train": files}, {"task": "~/task", "train": "~/rows"}):
        tree = {"model": "m", "data": data, "chain": {"ranks": []}, "output": "~/run"}
        found = make_config(tree)
        assert found.output == str(tmp_path / "run")
        read = found.data.model_dump_json(include=set(data))
        assert json.loads(read.replace(str(tmp_path), "~")) == data
    assert split_address("~/run@facts") == (tmp_path / "run", "facts")


def test_a_path_is_as_good_as_its_text():
    def made(kind):
        files = [kind("a"), {"path": kind("b"), "weight": 2}]
        own = {"train": files, "validation": kind("v")}
        paths = {key: kind(key) for key in ("model", "start", "output")}
        return [make_config(TREE | paths | {"data": data}) for data in (own, {"train": kind("t")})]

    assert made(Path) == made(str)


def test_one_value_where_a_list_is_due_is_a_list_of_one():
    keys = "{ranks: 8, steps: 5, target_modules: q_proj, exclude_modules: layers.0.v_proj}"
    found = config(("chain", keys), ("train.trackers", "wandb"))
    chain = found.chain
    assert (chain.ranks, chain.steps, chain.alpha) == ((8,), (5,), 16.0)
    assert chain.target_modules == ("q_proj",)
    assert (chain.exclude_modules, found.train.trackers) == (("layers.0.v_proj",), ("wandb",))
    for pattern in ("all-linear", ".*q_proj", "(q|v)_proj"):  # no names
        assert config(("chain.target_modules", pattern)).chain.target_modules == pattern
    assert LinkConfig(target_modules="q_proj").target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.yaml", b"", r"must hold a mapping of keys \(got nothing"),
        ("c.yaml", b"- a\n- b\n", r"must hold a mapping of keys \(got a list"),
        ("c.yaml", b"model: m\ntrain: {lr: [1\n", r"YAML \(got .*c.yaml line \d: .*\); correct it"),
        ("a.jsonl", b"{}", r"rows of data\); name the rows in a config: data: \{train"),
    ],
)
def test_files_that_are_no_config(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(file)
    assert "\n" not in str(raised.value)
