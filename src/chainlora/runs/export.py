"""What a finished chain can become: a live model, a merged checkpoint, one PEFT adapter.

A merged checkpoint loads with `transformers` alone. An exact adapter has rank Σr; a compressed one
is the best approximation of that rank, found by QR and a small SVD of the stacked factors (the
dense update is never formed).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chainlora.chain.adapters import Factors, save_adapter
from chainlora.chain.chain import Chain
from chainlora.chain.link import Link, stack_links
from chainlora.chain.low_rank import compress_low_rank, singular_values_of_sum
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError, RunError
from chainlora.models.loading import load_model, resolve_model
from chainlora.runs import directory as store
from chainlora.runs.directory import RunDirectory


def load_run(
    run: str | Path, *, num_links: int | None = None, dtype: str | None = None
) -> tuple[Any, Any]:
    """Load a run's base, put its chain on, and return (plain transformers model, tokenizer).

    The chain is the one the run selected, or the first `num_links` links; `dtype` defaults to the
    run's own. Raises RunError when the base is not the one the run was trained on, or the run was
    killed before it had anything.
    """
    directory = RunDirectory(run)
    manifest = directory.manifest()
    base = manifest["base"]
    if (directory / "model").is_dir():  # full fine-tuning
        if num_links is not None:
            raise RunError(
                f"--links needs a chain (got {run}, a run of full fine-tuning); leave --links out"
            )
        return load_model(directory / "model", getattr(torch, dtype or base["dtype"]))
    links = directory.load_links(num_links)  # first, since a missing one is found in no time
    if not links and num_links is None:
        _refuse_unfinished(directory)
    model, tokenizer = load_model(base["model"], getattr(torch, dtype or base["dtype"]))
    chain = Chain(model, checkpoint=resolve_model(base["model"]))
    store.check_base(manifest, {"fingerprint": chain.base_fingerprint}, directory.path)
    for link in links:
        chain.add(link)
    return chain.detach(), tokenizer


def _refuse_unfinished(run: RunDirectory) -> None:
    """Refuse a run that was to train something and has not yet: the base would pass for its
    result."""
    chain = run.config().chain
    if chain.tune == "full":
        raise RunError(
            f"a run of full fine-tuning must have ended (got no model/ in {run.path}); train anew"
        )
    if chain.ranks:
        raise RunError(
            f"a run must have tied its first link (got none in {run.path}); go on with --resume, "
            "or take "
            "the base by --links 0"
        )


def export_merged(
    run: str | Path, output: str | Path, *, num_links: int | None = None
) -> dict[str, Any]:
    """Write the run's model, links merged, as a transformers checkpoint in the base's dtype."""
    output = _empty(output)
    model, tokenizer = load_run(run, num_links=num_links)
    links = RunDirectory(run).load_links(num_links)
    _mend_generation(model.generation_config)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    base = RunDirectory(run).manifest()["base"]["model"]
    done = (
        "every weight fine-tuned"
        if (Path(run) / "model").is_dir()
        else (f"a chain of {len(links)} LoRA link(s) merged into its weights")
    )
    _card(
        output,
        f"`{base}` with {done}.",
        base,
        "transformers",
        'AutoModelForCausalLM.from_pretrained("this folder")',
    )
    dtype = str(model.dtype).removeprefix("torch.")
    return {"to": "merged", "output": str(output), "links": len(links), "dtype": dtype}


def export_adapter(
    run: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    num_links: int | None = None,
) -> dict[str, Any]:
    """Write the run's chain as one PEFT adapter: exact, or compressed to `rank` or to a relative
    error `tolerance`.

    Returns rank and error; the error is ``√(Σ‖ΔW−ΔŴ‖² / Σ‖ΔW‖²)`` over all modules.
    """
    if rank is not None and tolerance is not None:
        raise ChainError("give --rank or --tolerance, not both (got both)")
    if rank is not None and rank < 1:
        raise ChainError(f"--rank must be at least 1 (got {rank})")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ChainError(f"--tolerance is a relative error between 0 and 1 (got {tolerance})")
    output = _empty(output)
    directory = RunDirectory(run)
    base = directory.manifest()["base"]["model"]
    links = directory.load_links(num_links)
    if (directory / "model").is_dir():
        raise RunError(
            f"--to adapter needs a chain (got {run}, a run of full fine-tuning); use --to merged"
        )
    factors, error = adapter_factors(links, rank=rank, tolerance=tolerance)
    written_rank = max(share.a.shape[0] for share in factors.values())
    extra: dict[str, Tensor] = {}
    for link in links:
        extra |= link.extra
    last = links[-1].config
    config = LinkConfig(
        rank=written_rank,
        alpha=written_rank,
        target_modules=tuple(sorted(factors)),
        extra_modules=last.extra_modules,
        lora_bias=any(s.bias is not None for s in factors.values()),
    )
    save_adapter(
        output, factors, config, rank=written_rank, alpha=written_rank, base=base, extra=extra
    )
    _card(
        output,
        f"A chain of {len(links)} LoRA link(s) on `{base}` as one adapter of rank {written_rank} "
        f"(relative error {error:.2e}).",
        base,
        "peft",
        'PeftModel.from_pretrained(base, "this folder")',
    )
    return {
        "to": "adapter",
        "output": str(output),
        "links": len(links),
        "rank": written_rank,
        "error": error,
        "exact": rank is None and tolerance is None,
    }


def _mend_generation(config: Any) -> None:
    """Make a base's generation config one that transformers saves: it reads sampling values without
    do_sample, but refuses to write them."""
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def adapter_factors(
    links: Sequence[Link], *, rank: int | None = None, tolerance: float | None = None
) -> tuple[dict[str, Factors], float]:
    """Return one pair of factors a module for a chain, all of one rank, with scaling 1, and the
    relative error."""
    if not links:
        raise ChainError("an adapter needs at least one link (got a chain of none)")
    stacked = stack_links(links)
    if rank is None and tolerance is None:
        widest = max(share.a.shape[0] for share in stacked.values())
        return {name: _pad(share, widest) for name, share in stacked.items()}, 0.0
    spectra = {
        name: singular_values_of_sum([(share.a, share.b, 1.0)]).double()
        for name, share in stacked.items()
    }
    total = sum(float((s**2).sum()) for s in spectra.values())
    longest = max(len(s) for s in spectra.values())
    if tolerance is not None:
        tails = [
            sum(float((s[r:] ** 2).sum()) for s in spectra.values()) for r in range(longest + 1)
        ]
        rank = next(r for r, tail in enumerate(tails) if r and tail <= tolerance**2 * total)
    assert rank is not None
    rank = min(rank, longest)
    compressed = {}
    squared = 0.0
    for name, share in stacked.items():
        a, b, error = compress_low_rank(
            [(share.a, share.b, 1.0)], rank=min(rank, len(spectra[name]))
        )
        compressed[name] = _pad(Factors(a.float(), b.float(), share.bias), rank)
        squared += (error**2) * float((spectra[name] ** 2).sum())
    return compressed, math.sqrt(squared / total) if total else 0.0


def _pad(share: Factors, rank: int) -> Factors:
    """Widen factors with zeros to a uniform rank (vLLM and others load one rank an adapter)."""
    missing = rank - share.a.shape[0]
    if missing <= 0:
        return share
    return replace(
        share,
        a=torch.nn.functional.pad(share.a, (0, 0, 0, missing)),
        b=torch.nn.functional.pad(share.b, (0, missing)),
    )


def _empty(output: str | Path) -> Path:
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(
            f"--output must be a new or empty directory (got {output}, which is not empty); "
            "choose another"
        )
    return output


def _card(output: Path, what: str, base: str, library: str, code: str) -> None:
    front: Mapping[str, str] = {"base_model": base, "library_name": library}
    header = "".join(f"{key}: {value}\n" for key, value in front.items())
    (output / "README.md").write_text(
        f"---\n{header}tags:\n- chain-of-lora\n---\n\n# Model card\n\n{what}\n\n"
        f"Made with chainlora (Chain of LoRA, arXiv 2401.04151). Load it with `{code}`.\n",
        encoding="utf-8",
    )
