"""What a finished chain can become: a live model, a merged checkpoint, one PEFT adapter.

A merged checkpoint loads with `transformers` alone, an adapter with `peft` on the base. Both are
written into a scratch folder, loaded back and compared, and only then put in place.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from chainlora import files
from chainlora.chain.adapters import Factors, prepare_quantized, save_adapter
from chainlora.chain.chain import Chain
from chainlora.chain.holding import hold_for
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.data.chat_templates import set_chat_template
from chainlora.errors import ChainError, ModelError, RunError
from chainlora.models.finding import resolve_model
from chainlora.models.identity import base_files
from chainlora.models.loading import load_model, load_tokenizer
from chainlora.models.quantizing import is_quantized_model
from chainlora.runs.cards import Card, Story, is_hub_id, is_licence, story_of, write_card
from chainlora.runs.compression import adapter_factors
from chainlora.runs.manifest import CAUSAL, Base, Manifest
from chainlora.runs.reading import RunReader, check_base
from chainlora.runs.saved_chain import current_links, describe_base
from chainlora.runs.verification import (
    check_adapter,
    check_checkpoint,
    skeleton_like,
    skeleton_of,
    state_digests,
    stores_transposed,
)

_WIDEST = 2**14  # far beyond what servers take, and still small


@dataclass(frozen=True)
class Naming:
    """What an export and its base are called where it is published.

    `name` is its repository on the Hub; `base` replaces the name that the run has for its base;
    `licence` is an identifier, as the Hub knows them.
    """

    name: str | None = None
    base: str | None = None
    licence: str | None = None


def load_run(
    run: str | Path,
    *,
    num_links: int | None = None,
    dtype: str | None = None,
    as_trained: bool = False,
) -> tuple[Any, Any]:
    """Load a run's base, put its chain on, and return (plain transformers model, tokenizer).

    The chain is the one the run selected, or the first `num_links` links; `dtype` defaults to the
    run's own. The links of a quantised base are merged into it as it was before; with `as_trained`
    they are left on the quantised one, in adapter layers. Raises RunError when a file of the run or
    the base has changed, or the run was killed before it had anything.
    """
    reader = RunReader(run)
    manifest = reader.manifest()
    if manifest.base.task_type != CAUSAL:
        raise RunError(
            "only chains on causal language models bring their model with them (got one on "
            f"{manifest.base.task_type or 'another model'} in {run}); load its model and call "
            f"load_chain({str(run)!r}, model).detach()"
        )
    kind = getattr(torch, dtype or manifest.base.dtype)
    if _is_whole_model(reader, manifest):
        if num_links is not None:
            raise RunError(
                f"--links needs a chain (got {run}, a run of full fine-tuning); leave --links out"
            )
        return load_model(reader / "model", kind)
    links = reader.links_of(manifest, num_links)  # first, since a missing one is found at once
    if not links and num_links is None:
        _refuse_unfinished(reader)
    folder = resolve_model(manifest.base.model)
    if manifest.base.files is not None:
        check_base(manifest, {"files": base_files(folder)}, reader.path)
    quantize = manifest.base.quantize if as_trained else None
    model, tokenizer = load_model(folder, kind, quantize=quantize)
    if manifest.has_run:
        set_chat_template(tokenizer, reader.config().data)
    is_quantized = is_quantized_model(model)
    if is_quantized:
        _check_kept_apart(manifest, as_trained)
        prepare_quantized(model)
    chain = Chain(model, hold=hold_for(model), checkpoint=folder)
    if manifest.base.files is None:  # of version 0.1
        check_base(manifest, {"fingerprint": chain.base_fingerprint}, reader.path)
    for link in links:
        chain.add(link)
    return (model if is_quantized else chain.detach()), tokenizer


def _check_kept_apart(manifest: Manifest, as_trained: bool) -> None:
    """Raise RunError where links would be merged into a checkpoint that came quantised."""
    if not as_trained:
        raise RunError(
            f"links are merged into weights of 16 or 32 bits (got {manifest.base.model}, whose "
            "checkpoint is quantised); use --to adapter, which PEFT loads on this base, or merges "
            "onto the one before quantisation"
        )


def _is_whole_model(reader: RunReader, manifest: Manifest) -> bool:
    """Say whether the run is one of full fine-tuning that has ended, its files checked."""
    if not (reader / "model").is_dir():
        return False
    if manifest.files is not None and not any(n.startswith("model/") for n in manifest.files):
        return False  # killed between the model and its manifest
    reader.check_files(manifest, "model")
    return True


def _refuse_unfinished(reader: RunReader) -> None:
    """Refuse a run that was to train something and has not yet: the base would pass for it."""
    if not reader.manifest().has_run:
        raise RunError(
            f"a saved chain must have a link (got none in {reader.path}); take the base by --links "
            "0"
        )
    chain = reader.config().chain
    if chain.tune == "full":
        raise RunError(
            f"a run of full fine-tuning must have ended (got no model/ in {reader.path}); "
            "start over"
        )
    if chain.ranks:
        raise RunError(
            f"a run must have tied its first link (got none in {reader.path}); continue it with "
            "--resume, or take the base by --links 0"
        )


def export_merged(
    run: str | Path,
    output: str | Path,
    *,
    num_links: int | None = None,
    naming: Naming | None = None,
) -> dict[str, Any]:
    """Write the run's model, links merged, as a transformers checkpoint in the base's dtype."""
    naming = naming or Naming()
    output = empty_folder(output)
    model, tokenizer = load_run(run, num_links=num_links)
    reader = RunReader(run)
    manifest = reader.manifest()
    is_whole = _is_whole_model(reader, manifest)
    links = [] if is_whole else reader.links_of(manifest, num_links)
    base, dtype = manifest.base.model, model.dtype
    done = f"a chain of {len(links)} LoRA link(s) merged into its weights"
    with files.replaced_folder(output) as scratch:
        _save_model(model, tokenizer, scratch)
        _copy_beside(_folder(base), scratch)
        named = naming.base or base
        card = Card(
            f"`{named}` with {'every weight fine-tuned' if is_whole else done}.",
            named,
            "transformers",
            links,
            name=naming.name,
            licence=naming.licence,
            story=story_of(run),
        )
        write_card(scratch, card)
        digests = state_digests(model)
        del model  # two of them need not fit into memory
        check_checkpoint(scratch, digests, dtype)
    name = str(dtype).removeprefix("torch.")
    return {"to": "merged", "output": str(output), "links": len(links), "dtype": name}


def _save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    _complete_generation(model.generation_config)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise files.unwritable(error, folder) from error


def export_adapter(
    run: str | Path | Chain,
    output: str | Path,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    num_links: int | None = None,
    naming: Naming | None = None,
) -> dict[str, Any]:
    """Write a chain as one PEFT adapter: exact, or compressed to `rank` or to `tolerance`.

    `tolerance` is a relative error. A `rank` above the chain's is filled up with zeros.

    `run` is a run directory, a saved chain, or a `Chain` in memory, of which the live link is
    written as it is now. Beside the adapter lie the base's tokenizer and licence, if the base is at
    hand. Returns rank and error; the error is ``√(Σ‖ΔW−ΔŴ‖² / Σ‖ΔW‖²)`` over all modules.
    """
    naming = naming or Naming()
    _check_compression(rank, tolerance)
    output = empty_folder(output)
    links, base = _links_and_base(run, num_links)
    skeleton = skeleton_like(run.model) if isinstance(run, Chain) else skeleton_of(base)
    factors, error = adapter_factors(links, rank=rank, tolerance=tolerance)
    with files.replaced_folder(output) as scratch:
        folder = _folder(base.model)
        named = base.model_copy(update={"model": naming.base or _loadable(base.model, folder)})
        written, extra = write_adapter(scratch, links, factors, named)
        check_adapter(scratch, skeleton, factors, extra)
        _copy_beside(folder, scratch, tokenizer=True)
        story = None if isinstance(run, Chain) else story_of(run)
        write_adapter_card(scratch, links, written, error, named, naming=naming, story=story)
    return {
        "to": "adapter",
        "output": str(output),
        "links": len(links),
        "rank": written,
        "error": error,
        "exact": tolerance is None and error == 0.0,
    }


def _links_and_base(run: str | Path | Chain, num_links: int | None) -> tuple[Sequence[Link], Base]:
    """Return the links to export and their base, whose modules are asked how they store weights."""
    if isinstance(run, Chain):
        links = current_links(run)
        if num_links is not None and not 0 < num_links <= len(links):
            raise ChainError(f"`num_links` must be 1 to {len(links)} here (got {num_links})")
        return links[:num_links], describe_base(run)
    reader = RunReader(run)
    manifest = reader.manifest()
    if _is_whole_model(reader, manifest):
        raise RunError(
            f"--to adapter needs a chain (got {run}, a run of full fine-tuning); use --to merged"
        )
    links = reader.links_of(manifest, num_links)
    names = {name: None for link in links for name in link.factors}
    transposed = stores_transposed(manifest.base, names)
    return links, manifest.base.model_copy(update={"fan_in_fan_out": transposed})


def _check_compression(rank: int | None, tolerance: float | None) -> None:
    if rank is not None and tolerance is not None:
        raise ChainError("give --rank or --tolerance, not both (got both)")
    if rank is not None and rank < 1:
        raise ChainError(f"--rank must be at least 1 (got {rank})")
    if rank is not None and rank > _WIDEST:
        raise ChainError(f"--rank must be at most {_WIDEST} (got {rank!s:.40}); lower it")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ChainError(f"--tolerance is a relative error between 0 and 1 (got {tolerance})")


def write_adapter(
    folder: Path, links: Sequence[Link], factors: Mapping[str, Factors], base: Base
) -> tuple[int, dict[str, Tensor]]:
    """Write factors of a chain as one adapter; return its rank and the extra weights in it."""
    rank = max(pair.a.shape[0] for pair in factors.values())
    extra: dict[str, Tensor] = {}
    for link in links:
        extra |= link.extra
    config = LinkConfig(
        rank=rank,
        alpha=rank,
        target_modules=tuple(sorted(factors)),
        extra_modules=links[-1].config.extra_modules,
        lora_bias=any(pair.bias is not None for pair in factors.values()),
    )
    save_adapter(
        folder,
        factors,
        config,
        rank=rank,
        alpha=rank,
        base=base.model,
        extra=extra,
        fan_in_fan_out=base.fan_in_fan_out,
        task_type=base.task_type,
    )
    return rank, extra


def _complete_generation(config: Any) -> None:
    """Make a base's generation config one that transformers saves: it reads sampling values without
    do_sample, but refuses to write them."""
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def empty_folder(output: str | Path) -> Path:
    """Return a folder to write into. Raises RunError unless it is new or empty."""
    output = Path(output)
    files.check_writable(output if output.is_dir() else output.parent)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(
            f"--output must be a new or empty directory (got {output}, which is not empty); "
            "choose another"
        )
    return output


def write_adapter_card(
    folder: Path,
    links: Sequence[Link],
    rank: int,
    error: float,
    base: Base,
    *,
    naming: Naming | None = None,
    story: Story | None = None,
) -> None:
    """Write the model card of a chain as one adapter."""
    naming = naming or Naming()
    card = Card(
        f"A chain of {len(links)} LoRA link(s) on `{base.model}` as one adapter of rank {rank} "
        f"(relative error {error:.2e}).",
        base.model,
        "peft",
        links,
        rank=rank,
        name=naming.name,
        licence=naming.licence,
        story=story,
        is_causal=base.task_type == CAUSAL,
    )
    write_card(folder, card)


def _loadable(base: str, folder: Path | None) -> str:
    """Return a name of the base that PEFT loads: of a GGUF file, the folder it was converted to."""
    return base if folder is None or is_hub_id(base) else str(folder.resolve())


def _folder(base: str) -> Path | None:
    """Return where the base lies; None where it is not at hand, which `check_adapter` says."""
    try:
        return resolve_model(base)
    except ModelError:
        return None


def _copy_beside(base: Path | None, output: Path, *, tokenizer: bool = False) -> None:
    """Put licences of the base into an export, and its tokenizer if that is asked for."""
    if base is None:
        return
    with suppress(ModelError):  # a folder without one, of a chain in memory
        if tokenizer:
            load_tokenizer(base).save_pretrained(output)
    for path in sorted(base.iterdir()):
        if path.is_file() and is_licence(path.name):
            shutil.copyfile(path, output / path.name)
