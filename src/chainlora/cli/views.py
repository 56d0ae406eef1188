"""The commands that show or export a run: `inspect`, `diff`, `export`, `verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from chainlora.cli.common import (
    draw,
    is_run,
    json_option,
    links_option,
    need_run,
    print_json,
    quiet,
    show,
    to_stderr,
    whole_run,
)


@click.command
@click.argument("run", type=click.Path())
@json_option
def inspect(run: str, as_json: bool) -> None:
    """Show the links of RUN.

    For each link: steps, loss, score, size, effective rank and overlap with earlier links. The
    command also draws them into RUN/chain.png.
    """
    need_run(run)
    quiet()
    from chainlora.cli.screen import show_inspection
    from chainlora.runs.addresses import open_run
    from chainlora.runs.inspection import inspect_run

    state = open_run(run)
    inspection = inspect_run(state)
    if inspection["links"] and not state.is_before_training:
        draw("chain_charts.plot_chain", inspection, state.run / "chain.png")
    if as_json:
        print_json(inspection)
    else:
        show_inspection(inspection)


@click.command
@click.argument("a", metavar="RUN[@NAME]", type=click.Path())
@click.argument("b", metavar="RUN[@NAME]", type=click.Path())
@click.option(
    "--prompts",
    type=click.IntRange(min=0),
    help="Answer this many kept rows of each stage. 0 answers none, and does not load the base.  "
    "[default: 3, or all of --data]",
)
@click.option("--data", type=click.Path(), help="Answer rows of this file instead of kept rows.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Most tokens of an answer.  [default: twice those of the longest right one, at least 32]",
)
@click.option(
    "--weights",
    is_flag=True,
    help="Also list the modules: the Frobenius norms of both updates and of their difference, the "
    "difference relative to the larger norm, and its rank.",
)
@json_option
def diff(a: str, b: str, weights: bool, as_json: bool, **options: Any) -> None:
    """Compare the answers and the weights of two states on one base.

    The states can be of one run or of two: chainlora diff runs/mine@facts runs/mine. RUN@base is
    the base.
    """
    for run in (a, b):
        need_run(run)
    quiet()
    from chainlora.cli.screen import show_difference
    from chainlora.evaluation.difference import diff as differences

    difference = differences(a, b, progress=to_stderr, **options)
    if as_json:
        print_json(difference)
    else:
        show_difference(difference, has_modules=weights)


@click.command
@click.argument("run", type=click.Path())
@click.option(
    "--to",
    "target",
    type=click.Choice(["merged", "adapter", "gguf", "gguf-adapter"]),
    required=True,
    help="merged: a transformers checkpoint; adapter: one PEFT adapter; gguf: a GGUF file for "
    "llama.cpp, and a Modelfile for Ollama; gguf-adapter: the same, as a base and a LoRA file.",
)
@click.option("--output", required=True, type=click.Path(), help="New directory to write.")
@click.option(
    "--rank",
    type=int,
    help="Rank of the adapter. A lower rank than the chain's compresses it, a higher one adds "
    "zeros.",
)
@click.option("--tolerance", type=float, help="Compress the adapter to this relative error.")
@click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="Data type of the weights in a GGUF file. Default: the run's.",
)
@links_option
@click.option(
    "--push-to-hub",
    "repository",
    metavar="OWNER/NAME",
    help="Also upload the export to this repository of the Hub, with a model card.",
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option(
    "--base-name",
    metavar="HUB_ID",
    help="Name of the base in the card and the adapter. Default: the name in the run's config.",
)
@click.option(
    "--license",
    "licence",
    metavar="ID",
    help="License for the card, such as apache-2.0. Default: none.",
)
@json_option
def export(
    run: str,
    target: str,
    output: str,
    links: int | None,
    repository: str | None,
    private: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Export RUN as a checkpoint, one PEFT adapter, or GGUF.

    Without --rank or --tolerance an adapter is exact: its rank is the sum of the links' ranks. An
    adapter is in float32, like the links, or in a narrower type without loss; merged weights have
    the run's data type.
    """
    need_run(run)
    _check_export(target, repository, private, options)
    quiet()
    from chainlora.runs.addresses import open_run
    from chainlora.runs.cards import Naming
    from chainlora.runs.exported import exporter_to
    from chainlora.runs.hub import check_push, push_folder
    from chainlora.runs.sent import note_sent

    naming = Naming(repository, options["base_name"], options["licence"])
    if repository is not None:
        check_push(run, target, naming)
    keys: dict[str, Any] = {"num_links": links, "naming": naming}
    if target.endswith("adapter"):
        keys |= {name: options[name] for name in ("rank", "tolerance")}
    if target.startswith("gguf"):
        keys["kind"] = options["gguf_type"]
    done = exporter_to(target)(run, output, **keys)
    state = open_run(run)
    note_sent(state.run, f"export ({target})", state.state.digest, Path(output).resolve())
    text = _export_text(done)
    if repository is not None:
        done["commit"] = push_folder(output, repository, private=private)
        text += f"\npushed to {repository}: {done['commit']}"
    show(done, text, as_json)


def _check_export(
    target: str, repository: str | None, private: bool, options: Mapping[str, Any]
) -> None:
    """Raise UsageError for options that do not fit the target."""
    is_adapter = target.endswith("adapter")
    if not is_adapter and (options["rank"] is not None or options["tolerance"] is not None):
        raise click.UsageError(
            "--rank and --tolerance compress an adapter; use them with --to adapter"
        )
    if not target.startswith("gguf") and options["gguf_type"] is not None:
        raise click.UsageError("--gguf-type is for GGUF files; use it with --to gguf")
    if private and repository is None:
        raise click.UsageError("--private is for a repository; use it with --push-to-hub")


def _export_text(done: Mapping[str, Any]) -> str:
    """Describe the files that were written."""
    output, of = done["output"], f"{done.get('links')} link(s) in {done['output']}"
    if done["to"] == "merged":
        return f"merged checkpoint ({done['dtype']}) of {of}"
    if done["to"] == "adapter":
        kind = "exact" if done["exact"] else f"relative error {done['error']:.3e}"
        base = "" if "/" in done["base"] else "; with --base-name, PEFT finds the base by itself"
        return (
            f"adapter of rank {done['rank']} ({kind}) from {of}, for the base {done['base']}{base}"
        )
    sizes = ", ".join(f"{name} ({size / 1e6:,.1f} MB)" for name, size in done["bytes"].items())
    ollama = f"for Ollama: ollama create NAME -f {output}/Modelfile"
    return f"{sizes} in {done['type']} of {of}; {ollama}"


@click.command
@click.argument("export", metavar="EXPORT|RUN", type=click.Path(exists=True, file_okay=False))
@click.argument("run", required=False, type=click.Path())
@click.option("--certificate", metavar="FILE", help="Compare RUN with a certificate of erasure.")
@click.option("--rows", metavar="FILE", help="With --certificate: rows that RUN must not hold.")
@json_option
def verify(
    export: str, run: str | None, certificate: str | None, rows: str | None, as_json: bool
) -> None:
    """Verify the folder EXPORT by its checksums, and with RUN by exporting it again.

    With RUN or RUN@NAME, the state in EXPORT/lineage.json is exported into a temporary folder, and
    every byte is compared. Differences (a changed file, another state, base or run) are printed,
    and the exit status is 1.

    RUN --certificate FILE compares a run with what `chainlora update --purge` certified: state,
    files, deleted files. --rows searches the run for the removed rows, as text, tokens and hashes.
    """
    if certificate is not None or rows is not None:
        _verify_certificate(export, run, certificate, rows, as_json)
        return
    if is_run(export):
        raise click.UsageError("a run is verified by its certificate: add --certificate FILE")
    if run is not None:
        need_run(run)
    quiet()
    from chainlora.runs.exported import verify_export

    differences = verify_export(export, run)
    passed = "the checksums match; give RUN to compare the files with a new export"
    passed = passed if run is None else f"every byte matches a new export of {run}"
    _show_differences(differences, f"{export}: {passed}", as_json)


def _verify_certificate(
    run: str, other: str | None, certificate: str | None, rows: str | None, as_json: bool
) -> None:
    if certificate is None or other is not None:
        raise click.UsageError("write: chainlora verify RUN --certificate FILE [--rows REMOVED]")
    folder = whole_run(run)
    quiet()
    from chainlora.evaluation.certificate import verify_certificate

    differences = verify_certificate(folder, certificate, rows)
    none = f", and holds no row of {rows}" if rows else "; give --rows to search for removed rows"
    _show_differences(differences, f"{run} is as {certificate} says{none}", as_json)


def _show_differences(differences: Sequence[str], passed: str, as_json: bool) -> None:
    show({"differences": differences}, "\n".join(differences) or passed, as_json)
    if differences:
        raise click.exceptions.Exit(1)
