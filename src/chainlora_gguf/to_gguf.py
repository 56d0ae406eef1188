"""Export a chain for llama.cpp and Ollama: one GGUF file, or a base and a LoRA, and a Modelfile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from chainlora.runs.compression import adapter_factors
from chainlora.runs.export import (
    check_compression,
    copy_licences,
    empty_folder,
    export_merged,
    filled_folder,
)
from chainlora.runs.lineage import Target, lineage_of
from chainlora.runs.opening import tokenizer_of
from chainlora.runs.state import OpenState
from chainlora_gguf.gguf_writing import (
    check_convertible,
    name_for,
    write_gguf,
    write_lora_gguf,
)
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

    With `as_adapter`, its base as ``base.gguf`` and the links as a LoRA, ``adapter.gguf``, of which
    `rank` and `tolerance` are those of `export_adapter`; with `each` too, a LoRA for each stage, as
    `export_adapter` names and weighs them, with a Modelfile each, and ``SERVING.md``. `kind` is
    what weights are stored as, one of `gguf_writing.KINDS`; by default nothing is rounded but
    float64.

    Raises ModelError for models that are not written as GGUF here, and for what a LoRA of llama.cpp
    cannot hold.
    """
    check_compression(rank, tolerance)
    output = empty_folder(output)
    state, parts = taken_apart(run, num_links) if each else (open_run(run), [])
    as_adapter = as_adapter or each
    folder, config, _ = open_folder(state.base.model)
    tokenizer = tokenizer_of(state, folder)
    check_convertible(config, tokenizer)
    links = switched_on(state.links(num_links))
    stage = _last_stage(state, num_links)
    loras = [_lora(part.name, part.stage, part.state.links(), rank, tolerance) for part in parts]
    as_lora = ", each stage as a LoRA" if each else ""
    if as_adapter and not each:
        loras = [_lora("adapter", stage, links, rank, tolerance)]
        as_lora = f", as a LoRA of rank {loras[0].rank} (relative error {loras[0].error:.2e})"
    wide = None if each or not loras else loras[0].rank
    name = name_for(naming.base or public_name(state.base.model), tokenizer)
    with filled_folder(output) as made:
        model = made / ("base.gguf" if as_adapter else "model.gguf")
        kind = _write_model(model, state, 0 if as_adapter else num_links, tokenizer, kind, name)
        modelfiles = {"Modelfile": ([f"FROM ./{model.name}"], stage)} if not loras else {}
        for lora in loras:
            pairs = {module: (pair.a, pair.b) for module, pair in lora.factors.items()}
            write_lora_gguf(pairs, config, made / f"{lora.name}.gguf", name)
            lines = [f"FROM ./{model.name}", f"ADAPTER ./{lora.name}.gguf"]
            modelfiles[f"{lora.name}.Modelfile" if each else "Modelfile"] = lines, lora.stage
        for file, (lines, of) in modelfiles.items():
            write_modelfile(made / file, lines, state, of, tokenizer, config)
        told = zip(parts, loras, strict=False)  # no parts without `each`
        adapters = [part.told(lora.rank, lora.error) for part, lora in told]
        sheet = write_sheet(made, state, adapters, naming, as_gguf=True) if each else None
        what = f"with a chain of {len(links)} LoRA link(s) in GGUF ({kind}){as_lora}."
        base = state.base.model
        story = story_of(state, num_links)
        keys = {"kind": kind, "rank": rank, "tolerance": tolerance, "num_links": num_links}
        to: Target = "gguf-adapter" if as_adapter else "gguf"
        lineage = lineage_of(state, folder, naming, to, **keys, each=each)
        card = Card(what, base, "gguf", links, wide, naming=naming, story=story, sheet=sheet)
        write_card(made, card, lineage)
    sizes = {path.name: path.stat().st_size for path in sorted(output.glob("*.gguf"))}
    done = {"to": to, "output": str(output), "links": len(links), "type": kind, "bytes": sizes}
    if each:
        return done | {"adapters": adapters}
    return done | {"rank": wide, "error": loras[0].error} if as_adapter else done


def _last_stage(state: OpenState, num_links: int | None) -> str:
    """Return the stage of the last link that is exported and switched on, and of no rehearsal."""
    terms = state.history.in_order(state.terms(num_links))
    on = [state.history.links[term.link].stage for term in terms if term.strength]
    return next((name for name in reversed(on) if name in state.columns), state.with_rows.stage)


def _write_model(
    file: Path, state: OpenState, num_links: int | None, tokenizer: Any, kind: str | None, name: str
) -> str:
    """Write a model as GGUF and its base's licences; return how its weights are stored."""
    merged = file.with_name("merged")
    done = export_merged(state, merged, num_links=num_links)
    kind = kind or {"float16": "f16", "bfloat16": "bf16"}.get(done["dtype"], "f32")
    ends = [end for end in ends_of_turn(tokenizer) if end != tokenizer.eos_token_id]
    write_gguf(merged, tokenizer, file, kind, name, ends)
    copy_licences(merged, file.parent)
    files.remove(merged)
    return kind


class _Lora(NamedTuple):
    """Links as one adapter: its name, the stage whose rows its Modelfile is for, and its factors,
    with their rank and relative error."""

    name: str
    stage: str
    factors: Mapping[str, Factors]
    rank: int
    error: float


def _lora(
    name: str, stage: str, links: Sequence[Link], rank: int | None, tolerance: float | None
) -> _Lora:
    factors, error = adapter_factors(links, rank=rank, tolerance=tolerance)
    _check_factors(factors)
    return _Lora(name, stage, factors, max(len(pair.a) for pair in factors.values()), error)


def _check_factors(factors: Mapping[str, Factors]) -> None:
    """Raise ModelError for what llama.cpp does not add to a model from a LoRA."""
    wrong = []
    for name, pair in factors.items():
        if pair.bias is not None:
            wrong.append(f"{name}, with a bias")
        if ".layers." not in name:
            wrong.append(f"{name}, a head")
    if wrong:
        raise ModelError(
            "a LoRA of llama.cpp must be on linear maps of layers alone", wrong[0], "use --to gguf"
        )
