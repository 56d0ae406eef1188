"""The verbs that show a run or write it out: `inspect`, `diff`, `export`, `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from chainlora.cli.common import (
    check_run_or_model,
    chosen_state,
    import_dependent,
    json_option,
    links_option,
    need_run,
    picture_if_possible,
    print_json,
    quiet,
    show,
    stages_option,
    to_stderr,
)


@click.command
@click.argument("run", type=click.Path())
@json_option
def inspect(run: str, as_json: bool) -> None:
    """Show what each link of RUN brought.

    Steps, loss, score, size, effective rank and overlap with earlier links; chain.png, which is
    written into RUN, draws them.
    """
    need_run(run)
    quiet()
    from chainlora.cli.screen import show_inspection
    from chainlora.runs.addresses import open_run
    from chainlora.runs.inspection import inspect_run

    state = open_run(run)
    found = inspect_run(state)
    if found["links"] and not state.is_before_training:
        with picture_if_possible():
            import_dependent("chainlora_pages.chain_charts").plot_chain(
                found, state.run / "chain.png"
            )
    if as_json:
        print_json(found)
    else:
        show_inspection(found)


@click.command
@click.argument("a", metavar="RUN[@NAME]", type=click.Path())
@click.argument("b", metavar="RUN[@NAME]", type=click.Path())
@click.option(
    "--prompts",
    type=click.IntRange(min=0),
    help="Answer so many of the rows that each stage kept; 0: none, without loading the base.  "
    "[default: 3, or all of --data]",
)
@click.option("--data", type=click.Path(), help="Answer rows of this file in place of kept rows.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=32, help="Most tokens of an answer."
)
@json_option
def diff(a: str, b: str, as_json: bool, **options: Any) -> None:
    """Show how two states on one base differ, in their weights and in their answers.

    They are of one run, or of two: chainlora diff runs/mine@facts runs/mine. RUN@base is the base.
    For each module the table has the Frobenius norms of both updates and of their difference, that
    relative to the larger one, and the rank of the difference.
    """
    for run in (a, b):
        need_run(run)
    quiet()
    from chainlora.cli.screen import show_difference
    from chainlora.evaluation.difference import diff as differences

    found = differences(a, b, progress=to_stderr, **options)
    if as_json:
        print_json(found)
    else:
        show_difference(found)


@click.command
@click.argument("run", type=click.Path())
@click.option(
    "--to",
    "target",
    type=click.Choice(["merged", "adapter", "gguf", "gguf-adapter"]),
    required=True,
    help="merged: a transformers checkpoint; adapter: one PEFT adapter; gguf: one file for "
    "llama.cpp, and a Modelfile for Ollama; gguf-adapter: the same as a base and a LoRA.",
)
@click.option("--output", required=True, type=click.Path(), help="New directory to write.")
@click.option(
    "--rank",
    type=int,
    help="Rank of the adapter. Below the chain's it is compressed, above it filled with zeros.",
)
@click.option("--tolerance", type=float, help="Compress the adapter to this relative error.")
@click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="What weights in a GGUF file are stored as. Default: as the run has them.",
)
@click.option(
    "--each",
    is_flag=True,
    help="One adapter for each stage, at strength 1, and a sheet of commands for servers.",
)
@links_option
@stages_option
@click.option(
    "--push-to-hub",
    "repository",
    metavar="OWNER/NAME",
    help="Also upload the export to this repository of the Hub, with a card about the chain.",
)
@click.option("--private", is_flag=True, help="Make the repository private, if it is a new one.")
@click.option(
    "--base-name",
    metavar="HUB_ID",
    help="Name of the base in card and adapter. Default: as the run's config has it.",
)
@click.option(
    "--license",
    "licence",
    metavar="ID",
    help="License that the card states, such as apache-2.0. Default: none.",
)
@json_option
def export(
    run: str,
    target: str,
    output: str,
    rank: int | None,
    tolerance: float | None,
    gguf_type: str | None,
    each: bool,
    links: int | None,
    stages: str | None,
    repository: str | None,
    private: bool,
    base_name: str | None,
    licence: str | None,
    as_json: bool,
) -> None:
    """Turn RUN into a checkpoint, one PEFT adapter, or GGUF.

    An adapter is exact, with the sum of the links' ranks, unless --rank or --tolerance is given. It
    is in float32, as links are trained beside any base; merged weights have the run's data type.
    """
    need_run(run)
    check_run_or_model(run, links, stages)
    if not target.endswith("adapter") and (rank is not None or tolerance is not None):
        raise click.UsageError(
            "--rank and --tolerance compress an adapter; use them with --to adapter"
        )
    if not target.startswith("gguf") and gguf_type is not None:
        raise click.UsageError("--gguf-type is for GGUF files; use it with --to gguf")
    if each and (links is not None or repository is not None or not target.endswith("adapter")):
        raise click.UsageError(
            "--each makes adapters of the stages of a state in a folder; use it with --to adapter "
            "or gguf-adapter, without --links and --push-to-hub"
        )
    if private and repository is None:
        raise click.UsageError("--private is for a repository; use it with --push-to-hub")
    quiet()
    from chainlora.runs.cards import Naming
    from chainlora.runs.hub import check_push, push_folder
    from chainlora.runs.recomputing import exporter_to

    state = chosen_state(run, stages)
    naming = Naming(repository, base_name, licence)
    if repository is not None:
        check_push(state, target, naming)
    keys: dict[str, Any] = {"num_links": links, "naming": naming}
    if target.endswith("adapter"):
        keys |= {"rank": rank, "tolerance": tolerance, "each": each}
    if target.startswith("gguf"):
        keys["kind"] = gguf_type
    done = exporter_to(target)(state, output, **keys)
    text = _export_text(done)
    if repository is not None:
        done["commit"] = push_folder(output, repository, private=private)
        text += f"\npushed to {repository}: {done['commit']}"
    show(done, text, as_json)


def _export_text(done: Mapping[str, Any]) -> str:
    """Return what was written, in words."""
    output, of = done["output"], f"{done.get('links')} link(s) in {done['output']}"
    if "adapters" in done:
        lines = [
            f"{each['adapter']}: strength {each['strength']:g}, rank {each['rank']}, relative "
            f"error {each['error']:.1e}"
            for each in done["adapters"]
        ]
        return "\n".join([*lines, f"how to serve them: {output}/SERVING.md"])
    if done["to"] == "merged":
        return f"merged checkpoint ({done['dtype']}) of {of}"
    if done["to"] == "adapter":
        kind = "exact" if done["exact"] else f"relative error {done['error']:.3e}"
        base = "" if "/" in done["base"] else "; --base-name lets PEFT find the base by itself"
        return (
            f"adapter of rank {done['rank']} ({kind}) from {of}, for the base {done['base']}{base}"
        )
    sizes = ", ".join(f"{name} ({size / 1e6:,.1f} MB)" for name, size in done["bytes"].items())
    ollama = f"for Ollama: ollama create NAME -f {output}/Modelfile"
    return f"{sizes} in {done['type']} of {of}; {ollama}"


@click.command
@click.argument("export", type=click.Path(exists=True, file_okay=False))
@click.argument("run", required=False, type=click.Path())
@json_option
def verify(export: str, run: str | None, as_json: bool) -> None:
    """Check the folder EXPORT by its checksums, and with RUN against what RUN gives.

    With RUN, or RUN@NAME, the state in EXPORT/lineage.json is exported again into a temporary
    folder, and every byte is compared. What differs is shown, and the exit status is then 1: a
    changed file, another state, another base, another run.
    """
    if run is not None:
        need_run(run)
    quiet()
    from chainlora.runs.recomputing import verify_export

    found = verify_export(export, run)
    what = "the files have their checksums; name RUN to compare them with what it gives"
    what = what if run is None else f"every byte is what {run} gives"
    show({"differences": found}, "\n".join(found) or f"{export}: {what}", as_json)
    if found:
        raise click.exceptions.Exit(1)
