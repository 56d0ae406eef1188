"""Export a chain: as a merged checkpoint, or as one PEFT adapter, exact or compressed.

A merged checkpoint loads with `transformers` alone, an adapter with `peft` on the base. Both are
written into a scratch folder and then moved into place. They contain no path of this machine.

Compression is to a rank or to a relative error. The best approximation of a rank comes from QR and
a small SVD of the stacked factors (`chain.low_rank`); the dense update is never computed.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch

from chainlora import files
from chainlora.chain.adapters import Factors, padded, save_adapter
from chainlora.chain.chain import Chain
from chainlora.chain.link import Link, stack_links, switched_on
from chainlora.chain.low_rank import best_of_rank, singular_values
from chainlora.config.schema import LinkConfig
from chainlora.data.templates import ends_of_turn
from chainlora.errors import ChainError, ModelError
from chainlora.models.checkpoint import save_model, save_tokenizer
from chainlora.models.finding import resolve_model
from chainlora.models.identity import base_files, need_own_files, tokenizer_files
from chainlora.models.loading import load_tokenizer
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.cards import (
    UNNAMED,
    Card,
    Naming,
    is_licence,
    public_name,
    story_of,
    write_card,
)
from chainlora.runs.entries import CAUSAL, Base
from chainlora.runs.lineage import Lineage, lineage_of
from chainlora.runs.opening import check_base, load_run, tokenizer_of
from chainlora.runs.paths import need_apart, refuse_if_taken
from chainlora.runs.saved_chain import current_links, describe_base
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)

_CONFIGS = ("config.json", "generation_config.json")
_WIDEST = 2**14  # largest rank: far more than servers accept, and adapters stay small


def export_merged(
    run: Address, output: str | Path, *, num_links: int | None = None, naming: Naming = UNNAMED
) -> dict[str, Any]:
    """Write a run's model with merged links as a transformers checkpoint in the base's dtype.

    Args:
        run: an address, or a state (`open_run`).
        output: a new or empty folder.
        num_links: merge only the first links; by default all.
        naming: public names for the model card.

    Returns:
        A mapping with ``to``, ``output``, the number of ``links``, and ``dtype``.

    Raises:
        RunError: `output` is not empty, or the run or its base is damaged.
        ModelError: the base cannot be loaded.
    """
    output = empty_folder(output)
    state = open_run(run)
    base = _base_folder(state.base, state)
    model, tokenizer = load_run(state, num_links=num_links)
    _stop_at_turns(model.generation_config, tokenizer)
    links = state.links(num_links)
    with files.replaced_folder(output, only_empty=True) as scratch:
        save_model(model, tokenizer, scratch)
        if base is not None:
            copy_licences(base, scratch)
        what = f"with a chain of {len(links)} LoRA link(s) merged into its weights."
        story = story_of(state, num_links)
        card = Card(what, state.base.model, "transformers", links, naming=naming, story=story)
        lineage = lineage_of(state, base, naming, "merged", num_links=num_links)
        write_card(scratch, card, lineage)
    name = str(model.dtype).removeprefix("torch.")
    return {"to": "merged", "output": str(output), "links": len(links), "dtype": name}


def _stop_at_turns(generation: Any, tokenizer: Any) -> None:
    """Add the tokens that end training rows and turns to the stop tokens of a model."""
    stops = generation.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    known = dict.fromkeys([*stops, tokenizer.eos_token_id, *ends_of_turn(tokenizer)])
    ends = [end for end in known if end is not None]
    if ends != stops:
        generation.eos_token_id = ends or None


def export_adapter(
    run: Address | Chain,
    output: str | Path,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    num_links: int | None = None,
    naming: Naming = UNNAMED,
) -> dict[str, Any]:
    """Write a chain as one PEFT adapter: exact, or compressed to `rank` or to `tolerance`.

    If the base is on this machine, the folder also gets the tokenizer, with the chat template of
    the rows, and the licence of the base.

    Args:
        run: an address or a state (`open_run`), or a `Chain` in memory with its live link.
        output: a new or empty folder.
        rank: the rank of the adapter; one above the chain's is filled up with zeros.
        tolerance: the largest relative error, in place of `rank`.
        num_links: export only the first links; by default all.
        naming: public names. By default a base in a folder is named by the last part of its path.

    Returns:
        A mapping with ``to``, ``output``, ``links``, ``rank``, ``error``, ``exact`` and ``base``.
        The error is ``√(Σ‖ΔW−ΔŴ‖² / Σ‖ΔW‖²)`` over all modules, at least that of a live link with
        soft knots.

    Raises:
        ChainError: `rank` and `tolerance` are invalid, or there is no link.
        RunError: `output` is not empty, or the base differs from that of the run.
    """
    check_compression(rank, tolerance)
    output = empty_folder(output)
    source = run if isinstance(run, Chain) else open_run(run)
    links, base = _links_and_base(source, num_links)
    folder = _base_folder(base, source)
    named = base.model_copy(update={"model": naming.base or public_name(base.model)})
    factors, error = adapter_factors(links, rank=rank, tolerance=tolerance)
    if isinstance(source, Chain):
        error = max([error, *(link.error for link in links if link.index == len(source))])
    with files.replaced_folder(output, only_empty=True) as scratch:
        if folder is not None:
            copy_licences(folder, scratch)
            _save_tokenizer(source, folder, scratch)
        facts: dict[str, Any] = {"naming": naming}
        if not isinstance(source, Chain):
            keys = {"rank": rank, "tolerance": tolerance, "num_links": num_links}
            facts["lineage"] = lineage_of(source, folder, naming, "adapter", **keys)
            facts["story"] = story_of(source, num_links)
        actual_rank = write_adapter(scratch, links, factors, error, named, **facts)
    done = {"to": "adapter", "output": str(output), "links": len(links), "rank": actual_rank}
    is_exact = tolerance is None and error == 0.0
    return done | {"error": error, "exact": is_exact, "base": named.model}


def _save_tokenizer(run: OpenState | Chain, base: Path, output: Path) -> None:
    """Write the tokenizer of a run's rows, or one that was saved with a chain, or the base's."""
    if not isinstance(run, Chain) and (run.has_run or run.tokenizer() is not None):
        save_tokenizer(tokenizer_of(run, base), output)
        return
    with suppress(ModelError):  # the base of a chain without a run may have no tokenizer
        save_tokenizer(load_tokenizer(base), output)


def _base_folder(base: Base, run: OpenState | Chain) -> Path | None:
    """Return the folder of the base, with a warning None if it is not on this machine.

    Raises RunError for another base than the run's. A chain without a run has no file hashes to
    compare.
    """
    if not base.model:
        return None
    try:
        folder = resolve_model(base.model)
    except ModelError as error:
        logger.warning("the export gets no licence and no tokenizer: %s", error)
        return None
    _need_own_files(folder)
    if isinstance(run, OpenState) and (tokenizer := run.tokenizer()) is not None:
        _need_own_files(tokenizer)
    if isinstance(run, OpenState) and base.files is not None:
        check_base(base, run.run, files=base_files(folder))
    return folder


def _need_own_files(base: Path) -> None:
    """Raise ModelError if a file to copy is a symbolic link out of the folder of its model."""
    licences = [path for path in base.iterdir() if is_licence(path.name)]
    configs = [base / name for name in _CONFIGS]
    need_own_files(base, [*licences, *configs, *tokenizer_files(base)])


def copy_licences(base: Path, output: Path) -> None:
    """Copy the licence files of a base into an export."""
    for path in sorted(base.iterdir()):
        if path.is_file() and is_licence(path.name):
            shutil.copyfile(path, output / path.name)


def _links_and_base(run: OpenState | Chain, num_links: int | None) -> tuple[Sequence[Link], Base]:
    """Return the links to export, and their base."""
    if isinstance(run, Chain):
        links = current_links(run)
        if num_links is not None and not 0 < num_links <= len(links):
            raise ChainError(f"`num_links` must be 1 to {len(links)} here (got {num_links})")
        return switched_on(links[:num_links]), describe_base(run)
    return run.links(num_links), run.base


def check_compression(rank: int | None, tolerance: float | None) -> None:
    """Raise ChainError for an invalid `rank` or `tolerance`, or both."""
    if rank is not None and tolerance is not None:
        raise ChainError("an adapter has a `rank` or a `tolerance` (got both); leave one out")
    if rank is not None and not 0 < rank <= _WIDEST:
        raise ChainError(f"`rank` must be 1 to {_WIDEST} (got {rank!s:.40})")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ChainError(f"`tolerance` is a relative error between 0 and 1 (got {tolerance})")


def adapter_factors(
    links: Sequence[Link], *, rank: int | None = None, tolerance: float | None = None
) -> tuple[dict[str, Factors], float]:
    """Return one pair of factors per module, all of one rank with scaling 1, and the error.

    The error is ``√(Σ‖ΔW−ΔŴ‖² / Σ‖ΔW‖²)`` over all modules. A `rank` above that of the chain is
    filled up with zeros, which is exact. `tolerance` is the largest accepted error.

    Raises ChainError for a chain without links.
    """
    stacked = _with_biases(stack_links(links))
    if not stacked:
        rule = "an adapter needs at least one link"
        raise ChainError(rule, "a chain of none", "take the base")
    widest = max(share.a.shape[0] for share in stacked.values())
    if tolerance is None and (rank is None or rank >= widest):
        return {name: padded(share, rank or widest) for name, share in stacked.items()}, 0.0
    spectra = {name: singular_values(share.a, share.b) for name, share in stacked.items()}
    longest = max(len(s) for s in spectra.values())
    # tails[r]: squared norm of the singular values that rank r leaves out
    tails = [sum(float((s[r:] ** 2).sum()) for s in spectra.values()) for r in range(longest + 1)]
    if tolerance is not None:
        rank = next(r for r, tail in enumerate(tails) if r and tail <= tolerance**2 * tails[0])
    assert rank is not None
    compressed = {}
    for name, share in stacked.items():
        a, b = best_of_rank(share.a.double(), share.b.double(), rank)
        compressed[name] = padded(replace(share, a=a.float(), b=b.float()), rank)
    return compressed, math.sqrt(tails[min(rank, longest)] / tails[0]) if tails[0] else 0.0


def _with_biases(stacked: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return factors with a bias on all layers if one has it; PEFT knows only all or none."""
    if all(share.bias is None for share in stacked.values()):
        return dict(stacked)
    return {
        name: replace(share, bias=torch.zeros(share.b.shape[0])) if share.bias is None else share
        for name, share in stacked.items()
    }


def write_adapter(
    folder: Path,
    links: Sequence[Link],
    factors: Mapping[str, Factors],
    error: float,
    base: Base,
    lineage: Lineage | None = None,
    **facts: Any,
) -> int:
    """Write the factors of a chain as one PEFT adapter, its card and its lineage; return its rank.

    The card and the lineage tell of all that is in the folder. `facts` are more fields of `Card`.
    """
    rank = max(pair.a.shape[0] for pair in factors.values())
    config = LinkConfig(
        rank=rank,
        alpha=rank,
        target_modules=tuple(sorted(factors)),
        lora_bias=any(pair.bias is not None for pair in factors.values()),
    )
    save_adapter(
        folder,
        factors,
        config,
        rank=rank,
        alpha=rank,
        base=base.model,
        fan_in_fan_out=base.fan_in_fan_out,
        task_type=base.task_type,
    )
    kind = f"relative error {error:.2e}" if error else "exact"
    what = f"with a chain of {len(links)} LoRA link(s) as one adapter of rank {rank} ({kind})."
    is_causal = base.task_type == CAUSAL
    card = Card(what, base.model, "peft", links, rank, is_causal=is_causal, **facts)
    write_card(folder, card, lineage)
    return rank


def empty_folder(output: str | Path) -> Path:
    """Return the path of a new or empty folder to write into, outside runs.

    Raises RunError for any other path, FileError if another process writes it.
    """
    output = Path(expanduser(output))
    files.check_writable(output if output.is_dir() else output.parent)
    need_apart(output)
    refuse_if_taken(output)
    files.remove_killed(output)
    return output
