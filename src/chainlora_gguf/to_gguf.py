"""Export a chain for llama.cpp and Ollama: one GGUF file, or a base and a LoRA, and a Modelfile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chainlora import files
from chainlora.chain.adapters import Factors
from chainlora.chain.link import Link, switched_on
from chainlora.data.templates import ends_of_turn
from chainlora.errors import ModelError
from chainlora.models.loading import open_folder
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.apart import taken_apart, write_sheet
from chainlora.runs.cards import UNNAMED, Card, Naming, public_name, story_of, write_card
from chainlora.runs.export import (
    adapter_factors,
    check_compression,
    copy_licences,
    empty_folder,
    export_merged,
    filled_folder,
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
    each: bool = False,
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
        each: write a LoRA and a Modelfile for each stage, with names and weights as in
            `export_adapter`, and ``SERVING.md``. Implies `as_adapter`.

    Returns:
        The facts of the export: files, sizes, ranks and errors.

    Raises:
        ModelError: the model cannot be written as GGUF, or the links as a LoRA of llama.cpp.
    """
    check_compression(rank, tolerance)
    output = empty_folder(output)

    # 1. Check the model, and compute the LoRAs.
    state, parts = taken_apart(run, num_links) if each else (open_run(run), [])
    is_adapter = as_adapter or each
    to: Target = "gguf-adapter" if is_adapter else "gguf"
    folder, config, _ = open_folder(state.base.model)
    tokenizer = tokenizer_of(state, folder)
    check_convertible(config, tokenizer)
    links = switched_on(state.links(num_links))
    stage = _last_stage(state, num_links)
    loras = [_lora(part.name, part.stage, part.state.links(), rank, tolerance) for part in parts]
    if is_adapter and not each:
        loras = [_lora("adapter", stage, links, rank, tolerance)]
    name = name_for(naming.base or public_name(state.base.model), tokenizer)

    with filled_folder(output) as scratch:
        # 2. Write the model, the LoRAs and the Modelfiles.
        model = scratch / ("base.gguf" if is_adapter else "model.gguf")
        kind = _write_model(model, state, 0 if is_adapter else num_links, tokenizer, kind, name)
        for lora in loras:
            write_lora_gguf(lora.factors, config, scratch / f"{lora.name}.gguf", name)
        for file, lines, of in _modelfiles(model.name, stage, loras, each):
            write_modelfile(scratch / file, lines, state, of, tokenizer, config)

        # 3. Write the card, and the sheet for servers.
        pairs = zip(parts, loras, strict=False)  # there are no parts without `each`
        adapters = [part.told(lora.rank, lora.error) for part, lora in pairs]
        sheet = write_sheet(scratch, state, adapters, naming, as_gguf=True) if each else None
        keys = {"kind": kind, "rank": rank, "tolerance": tolerance, "num_links": num_links}
        lineage = lineage_of(state, folder, naming, to, **keys, each=each)
        wide = loras[0].rank if loras and not each else None
        text = _card_text(len(links), kind, loras, each)
        story = story_of(state, num_links)
        base = state.base.model
        card = Card(text, base, "gguf", links, wide, naming=naming, story=story, sheet=sheet)
        write_card(scratch, card, lineage)
    sizes = {path.name: path.stat().st_size for path in sorted(output.glob("*.gguf"))}
    done = {"to": to, "output": str(output), "links": len(links), "type": kind, "bytes": sizes}
    if each:
        return done | {"adapters": adapters}
    return done | {"rank": wide, "error": loras[0].error} if is_adapter else done


def _modelfiles(
    model: str, stage: str, loras: Sequence[_Lora], each: bool
) -> Iterator[tuple[str, list[str], str]]:
    """Yield the name of each Modelfile, its first lines, and the stage whose rows it is for."""
    if not loras:
        yield "Modelfile", [f"FROM ./{model}"], stage
    for lora in loras:
        file = f"{lora.name}.Modelfile" if each else "Modelfile"
        yield file, [f"FROM ./{model}", f"ADAPTER ./{lora.name}.gguf"], lora.stage


def _card_text(num_links: int, kind: str, loras: Sequence[_Lora], each: bool) -> str:
    """Return the sentence of the card about the files."""
    as_lora = ", each stage as a LoRA" if each else ""
    if loras and not each:
        as_lora = f", as a LoRA of rank {loras[0].rank} (relative error {loras[0].error:.2e})"
    return f"with a chain of {num_links} LoRA link(s) in GGUF ({kind}){as_lora}."


def _last_stage(state: OpenState, num_links: int | None) -> str:
    """Return the stage of the last exported link that is switched on."""
    terms = state.history.in_order(state.terms(num_links))
    on = [state.history.links[term.link].stage for term in terms if term.strength]
    return next((name for name in reversed(on) if name in state.columns), state.with_rows.stage)


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

    name: str
    stage: str  # its Modelfile is for the rows of this stage
    factors: Mapping[str, Factors]
    rank: int
    error: float  # relative


def _lora(
    name: str, stage: str, links: Sequence[Link], rank: int | None, tolerance: float | None
) -> _Lora:
    """Compute the adapter of links. Raises ModelError for biases and heads."""
    factors, error = adapter_factors(links, rank=rank, tolerance=tolerance)
    for module, pair in factors.items():
        if pair.bias is not None or ".layers." not in module:
            rule = "a LoRA of llama.cpp must adapt only linear maps of layers"
            got = f"{module}, {'a head' if pair.bias is None else 'with a bias'}"
            raise ModelError(rule, got, "use --to gguf")
    return _Lora(name, stage, factors, max(len(pair.a) for pair in factors.values()), error)
