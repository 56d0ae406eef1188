"""The public names, locked: adding one is a choice, losing one is a break."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from helpers import settings

import chainlora

NAMES = [
    "Chain",
    "ChainCallback",
    "ChainLoRAError",
    "Link",
    "LinkConfig",
    "RunConfig",
    "TrainResult",
    "__version__",
    "carry_moments",
    "evaluate_task",
    "extend",
    "mix_stages",
    "open_run",
    "stage_matrix",
    "export_adapter",
    "export_merged",
    "inspect_run",
    "list_tasks",
    "load_chain",
    "load_config",
    "load_model",
    "load_run",
    "load_task",
    "make_config",
    "report_runs",
    "save_chain",
    "stack_links",
    "train",
]
SIGNATURES = {
    "train": "(config, *, resume, listener, change, progress)",
    "extend": "(run, stage, *, listener, progress)",
    "open_run": "(address, stages)",
    "mix_stages": "(run, strengths)",
    "stage_matrix": "(run, *, speedups, progress, compute)",
    "load_config": "(path, overrides)",
    "load_run": "(run, *, num_links, dtype, as_trained)",
    "export_merged": "(run, output, *, num_links, naming)",
    "export_adapter": "(run, output, *, rank, tolerance, num_links, naming)",
    "inspect_run": "(run)",
    "save_chain": "(chain, directory)",
    "load_chain": "(directory, model, *, checkpoint)",
    "evaluate_task": "(run_or_model, task, *, data, split, limit, num_links, dtype, predictions, "
    "speedups, progress)",
    "load_model": "(spec, dtype, *, quantize, device)",
}


def test_the_public_names_are_these():
    assert sorted(chainlora.__all__) == sorted(NAMES)
    assert sorted(dir(chainlora)) == sorted(NAMES)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        chainlora.trian  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"__version__"}))
def test_every_name_is_there_and_says_what_it_is(name):
    thing = getattr(chainlora, name)
    assert inspect.getdoc(thing)
    assert thing.__module__.startswith("chainlora.")


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_is_called_how(name):
    words, starred = [], False
    for parameter in inspect.signature(getattr(chainlora, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        words.append(parameter.name)
    assert f"({', '.join(words)})" == SIGNATURES[name]


def test_importing_the_package_costs_nothing():
    code = (
        "import sys, chainlora; "
        "assert not {'torch', 'transformers', 'peft', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_error_on_purpose_is_of_one_tree():
    from chainlora import errors

    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, Exception)
    ]
    assert {kind.__name__ for kind in kinds} == {
        "ChainLoRAError",
        "ConfigError",
        "DataError",
        "ModelError",
        "ChainError",
        "FileError",
        "RunError",
        "TrainingError",
        "DivergedError",
        "StoppedError",
        "ToldError",
    }
    assert all(issubclass(kind, chainlora.ChainLoRAError) for kind in kinds)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)  # the tree is drawn there


def test_from_config_to_a_model_in_the_reader_s_hands(tiny_folder, sentiment, tmp_path):
    """The whole library way: train, look, load, score, undo."""
    config = chainlora.make_config(settings(tiny_folder, sentiment, tmp_path / "run"))
    result = chainlora.train(config)
    assert [row["rank"] for row in chainlora.inspect_run(tmp_path / "run")["links"]] == [4, 4, 2]
    task = chainlora.load_task(sentiment / "task.yaml")
    found = chainlora.evaluate_task(tmp_path / "run", task, data=str(sentiment))
    assert found["metrics"]["accuracy"] == result["metrics"]["validation"]["accuracy"]
    assert found["metrics"]["loss"] == pytest.approx(
        result["metrics"]["validation"]["loss"], abs=1e-5
    )
    model, tokenizer = chainlora.load_run(tmp_path / "run")
    assert type(model).__name__ == "LlamaForCausalLM"  # plain: nothing of ours or of PEFT on it
    assert not any("lora" in name for name, _ in model.named_parameters())
    text = tokenizer("good cat it was", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**text, max_new_tokens=2).shape[1] == text["input_ids"].shape[1] + 2
