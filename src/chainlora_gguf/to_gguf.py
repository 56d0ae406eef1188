"""Export a chain for llama.cpp and Ollama: one GGUF file, or a base and a LoRA, and a Modelfile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chainlora import files
from chainlora.chain.adapters import Factors
from chainlora.chain.link import Link
from chainlora.data.templates import ends_of_turn
from chainlora.errors import ModelError
from chainlora.models.loading import open_folder
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.cards import UNNAMED, Card, Naming, public_name, story_of, write_card
from chainlora.runs.export import (
    adapter_factors,
    check_compression,
    copy_licences,
    empty_folder,
    export_merged,
)
from chainlora.runs.lineage import Target, lineage_of
from chainlora.runs.opening import tokenizer_of
from chainlora.runs.state import OpenState
from chainlora_gguf.gguf_writing import check_convertible, name_for, write_gguf, write_lora_gguf
from chainlora_gguf.modelfile import write_modelfile


def export_gguf(
    run: Address,
    output: str | Path,
    *,
    kind: str | None = None,
    as_adapter: bool = False,
    rank: int | None = None,
    tolerance: float | None = None,
    num_links: int | None = None,
    naming: Naming = UNNAMED,
) -> dict[str, Any]:
    """Write a run's model as ``model.gguf``, links merged, with a ``Modelfile`` for Ollama.

    Args:
        run: the state to export.
        output: a new or empty folder.
        kind: the type of the weights, one of `gguf_writing.KINDS`. By default only float64 is
            rounded.
        as_adapter: write the base as ``base.gguf`` and the links as a LoRA, ``adapter.gguf``.
        rank, tolerance: as in `export_adapter`.
        num_links: export only the first links.
        naming: names for the card.

    Returns:
        The facts of the export: files, sizes, ranks and errors.

    Raises:
        ModelError: the model cannot be written as GGUF, or the links as a LoRA of llama.cpp.
    """
    check_compression(rank, tolerance)
    output = empty_folder(output)

    # 1. Check the model, and compute the LoRA.
    state = open_run(run)
    to: Target = "gguf-adapter" if as_adapter else "gguf"
    folder, config, _ = open_folder(state.base.model)
    tokenizer = tokenizer_of(state, folder)
    check_convertible(config, tokenizer)
    links = state.links(num_links)
    lora = _lora(links, rank, tolerance) if as_adapter else None
    name = name_for(naming.base or public_name(state.base.model), tokenizer)

    with files.replaced_folder(output, only_empty=True) as scratch:
        # 2. Write the model, the LoRA and the Modelfile.
        model = scratch / ("base.gguf" if lora else "model.gguf")
        kind = _write_model(model, state, 0 if lora else num_links, tokenizer, kind, name)
        lines = [f"FROM ./{model.name}"]
        if lora is not None:
            lines.append("ADAPTER ./adapter.gguf")
            write_lora_gguf(lora.factors, config, scratch / "adapter.gguf", name)
        of = _last_stage(state, num_links)
        write_modelfile(scratch / "Modelfile", lines, state, of, tokenizer, config)

        # 3. Write the card.
        keys = {"kind": kind, "rank": rank, "tolerance": tolerance, "num_links": num_links}
        lineage = lineage_of(state, folder, naming, to, **keys)
        text, wide = _card_text(len(links), kind, lora), lora and lora.rank
        story = story_of(state, num_links)
        card = Card(text, state.base.model, "gguf", links, wide, naming=naming, story=story)
        write_card(scratch, card, lineage)
    sizes = {path.name: path.stat().st_size for path in sorted(output.glob("*.gguf"))}
    done = {"to": to, "output": str(output), "links": len(links), "type": kind, "bytes": sizes}
    return done | {"rank": lora.rank, "error": lora.error} if lora else done


def _card_text(num_links: int, kind: str, lora: _Lora | None) -> str:
    """Return the sentence of the card about the files."""
    as_lora = ""
    if lora is not None:
        as_lora = f", as a LoRA of rank {lora.rank} (relative error {lora.error:.2e})"
    return f"with a chain of {num_links} LoRA link(s) in GGUF ({kind}){as_lora}."


def _last_stage(state: OpenState, num_links: int | None) -> str:
    """Return the stage of the last exported link."""
    links = state.history.in_order(state.summed(num_links))
    stages = [state.history.links[link].stage for link in links]
    return next((name for name in reversed(stages) if name in state.columns), state.with_rows.key)


def _write_model(
    file: Path, state: OpenState, num_links: int | None, tokenizer: Any, kind: str | None, name: str
) -> str:
    """Write a model as GGUF, and its base's licences. Return the type of its weights."""
    merged = file.with_name("merged")
    done = export_merged(state, merged, num_links=num_links)
    kind = kind or {"float16": "f16", "bfloat16": "bf16"}.get(done["dtype"], "f32")
    ends = [end for end in ends_of_turn(tokenizer) if end != tokenizer.eos_token_id]
    write_gguf(merged, tokenizer, file, kind, name, ends)
    copy_licences(merged, file.parent)
    files.remove(merged)
    return kind


class _Lora(NamedTuple):
    """Links as one adapter."""

    factors: Mapping[str, Factors]
    rank: int
    error: float  # relative


def _lora(links: Sequence[Link], rank: int | None, tolerance: float | None) -> _Lora:
    """Compute the adapter of links. Raises ModelError for biases and heads."""
    factors, error = adapter_factors(links, rank=rank, tolerance=tolerance)
    for module, pair in factors.items():
        if pair.bias is not None or ".layers." not in module:
            rule = "a LoRA of llama.cpp must adapt only linear maps of layers"
            got = f"{module}, {'a head' if pair.bias is None else 'with a bias'}"
            raise ModelError(rule, got, "use --to gguf")
    return _Lora(factors, max(len(pair.a) for pair in factors.values()), error)
