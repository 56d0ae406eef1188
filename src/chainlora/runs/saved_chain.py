"""Save a chain without a run, for your own training loops and for other trainers.

    DIR/history.json             as in a run, with one entry: the chain
    DIR/links/DIGEST/            each link as an ordinary PEFT adapter; also the live link
    DIR/stages/main/chain.json   facts that only a continued chain needs
    DIR/stages/main/live.safetensors    the state of the live link, if there is one

Functions that read a run (`load_run`, the exports, `chainlora eval`) read such a folder too. The
folder is replaced as a whole, so it never mixes two chains.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from chainlora import files
from chainlora.chain.adapters import base_layer, is_transposed, set_config, task_type
from chainlora.chain.chain import Chain
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.errors import RunError
from chainlora.knots.numbers import Numbers
from chainlora.models.finding import name_of
from chainlora.models.quantizing import quantized_while_loading
from chainlora.runs.costs import versions
from chainlora.runs.documents import Count, Document, Part, read_part, write_part
from chainlora.runs.entries import MAIN, Base, State, Training
from chainlora.runs.history import History
from chainlora.runs.links import save_link
from chainlora.runs.opening import check_base
from chainlora.runs.paths import HISTORY, exists_in, refuse_if_taken, stage_folder
from chainlora.runs.recipes import Plan, Stage
from chainlora.runs.state import OpenState

# The folder of the chain in a trainer's checkpoint, beside the adapter.
INSIDE = "chain"

_CHAIN, _LIVE = "chain.json", "live.safetensors"


class Live(Part):
    """The live link of a saved chain, without its tensors."""

    config: dict[str, Any]
    num_steps: Count
    num_soft_knots: Count


class Memory(Document):
    """The facts that only a continued chain needs (``chain.json``)."""

    ids: tuple[Count, ...] = ()  # of its links
    next_id: Count = 0
    stage: str = ""  # new links are drawn by stage and id
    first_id: Count = 0  # of the stage
    live: Live | None = None
    numbers: Numbers | None = None  # of a trainer's run
    adapter: str = ""  # SHA-256 of the adapter that a trainer saved beside the chain


def save_chain(chain: Chain, directory: str | Path) -> None:
    """Write a chain with its live link, so that `load_chain` continues to the same bits.

    Args:
        chain: the chain. Strengths other than 1 are multiplied into the saved links.
        directory: a new or empty folder, or one with a saved chain, which is replaced.

    Raises:
        RunError: `directory` holds something else.
        FileError: the folder cannot be written.
    """
    write_chain(chain, current_links(chain), Path(directory).expanduser())


def write_chain(
    chain: Chain,
    links: Sequence[Link],
    directory: Path,
    numbers: Numbers | None = None,
    adapter: str = "",
) -> None:
    """Write a chain; `links` are its `current_links`.

    A trainer gives the `numbers` of its run, and the SHA-256 of the `adapter` beside the chain.
    """
    _refuse_if_taken(directory)
    base = describe_base(chain)
    with files.replaced_folder(directory) as scratch:
        saved = [save_link(scratch, _folded(link), base, MAIN) for link in links]
        folder = stage_folder(scratch, MAIN)
        folder.mkdir(parents=True)
        if chain.live is not None:
            files.save_tensors(folder / _LIVE, chain.live_state())
        write_part(folder / _CHAIN, _memory(chain, numbers, adapter))
        state = State(base=base.fingerprint, links=tuple(digest for digest, _ in saved))
        history = History(base=base, hold=chain.hold, seed=chain.seed)
        stage = Stage(name=MAIN, kind="import")
        history = history.edited(Plan(stages=(stage,)), "save_chain")
        only = history.versions[-1].model_copy(update={"before": -1})
        history = history.model_copy(update={"versions": (only,), "at": 0})  # nothing to undo
        due = history.due_stage(MAIN)
        assert due is not None
        training = Training(versions=versions())
        entry = due.entry(state, files=files.checksums(folder), training=training)
        write_part(scratch / HISTORY, history.added(entry, dict(saved)))


def restore_chain(chain: Chain, state: OpenState) -> Memory:
    """Replace the links of a chain by those of a saved one; return its memory.

    Raises RunError for another model, a damaged chain, a run or the base.
    """
    entry, folder = state.verify().entry, stage_folder(state.run, MAIN)
    if entry is None or _CHAIN not in entry.files:
        what = f"the base of {state.run}" if entry is None else f"a run, {state.run}"
        raise RunError("a saved chain is restored with its links", what, "name a saved chain")
    memory = read_part(folder / _CHAIN, Memory)
    tensors = load_file(folder / _LIVE) if _LIVE in entry.files else {}
    links = state.read(state.state.links[: len(memory.ids)])
    check_base(state.base, state.run, chain=chain)
    if chain.live is not None:
        chain.discard()
    chain.drop(len(chain))
    chain.add(*(replace(link, id=id) for link, id in zip(links, memory.ids, strict=True)))
    chain.next_id, chain.stage, chain.first_id = memory.next_id, memory.stage, memory.first_id
    if (live := memory.live) is not None:
        config = LinkConfig(**live.config)
        # a gradient initialization is not repeated: its result is in the saved tensors
        init = "kaiming" if config.init == "gradient" else config.init
        adapter = chain.extend(config.model_copy(update={"init": init}))
        set_config(adapter, config)
        chain.load_live_state(tensors, live.num_steps, live.num_soft_knots)
    return memory


def current_links(chain: Chain) -> list[Link]:
    """Return all links of the model, with the live one if it changes the model.

    A chain with only a live link returns it in any case, so that there is a link to write.
    """
    if chain.live is None:
        return list(chain.links)
    live = chain.live_link()
    adds = any(share.adds for share in live.factors.values())
    return [*chain.links, live] if adds or not chain.links else list(chain.links)


def describe_base(chain: Chain) -> Base:
    """Describe the base model of a chain for ``history.json``."""
    model: Any = chain.model
    parameter = next(model.parameters())
    return Base(
        model=name_of(model),
        fingerprint=chain.base_fingerprint,
        task_type=task_type(model),
        dtype=str(parameter.dtype).removeprefix("torch."),
        fan_in_fan_out=any(is_transposed(base_layer(module)) for module in model.modules()),
        quantize=quantized_while_loading(model),
    )


# --- writing ---


def _folded(link: Link) -> Link:
    """Return a link at strength 1 that has the same update."""
    if link.strength == 1:
        return link
    factors = dict(link.factors)
    for name, pair in factors.items():
        bias = None if pair.bias is None else link.strength * pair.bias
        factors[name] = replace(pair, b=link.strength * pair.b, bias=bias)
    return replace(link, factors=factors, strength=1.0)


def as_adapter(folder: str | Path) -> str:
    """Return the remedy for a saved chain where a run or an adapter is needed."""
    return f"chainlora export {shlex.quote(str(folder))} --to adapter --output OUT, then add OUT"


def _refuse_if_taken(directory: Path) -> None:
    if directory == Path():
        rule = "a chain must not be saved to the current folder"
        raise RunError(rule, directory, "name a folder in it, or call this from above")
    files.check_writable(directory)
    if not (exists_in(directory) and (stage_folder(directory, MAIN) / _CHAIN).is_file()):
        refuse_if_taken(directory)


def _memory(chain: Chain, numbers: Numbers | None, adapter: str) -> Memory:
    live = None
    if chain.live is not None:
        config = chain.live.config.model_dump(mode="json")
        live = Live(config=config, num_steps=chain.live_steps, num_soft_knots=chain.live_soft_knots)
    return Memory(
        ids=tuple(link.id for link in chain.links),
        next_id=chain.next_id,
        stage=chain.stage,
        first_id=chain.first_id,
        live=live,
        numbers=numbers,
        adapter=adapter,
    )


def chain_folder(directory: Path) -> Path:
    """Return the folder of a chain: the folder itself, or the one inside a trainer's checkpoint.

    Raises RunError if a later training has replaced the adapter beside the chain.
    """
    inside, adapter = directory / INSIDE, directory / "adapter_model.safetensors"
    if exists_in(directory) or not exists_in(inside):
        return directory
    memory = stage_folder(inside, MAIN) / _CHAIN
    if adapter.is_file() and memory.is_file():
        saved = read_part(memory, Memory).adapter
        if saved and saved != files.sha256(adapter):
            rule = "the adapter in a folder must be that of the chain beside it"
            remedy = f"delete {inside} to take the adapter, or name it to take the chain"
            raise RunError(rule, f"another adapter in {directory}, saved later", remedy)
    return inside
