"""A chain on disk without a run around it: for loops of one's own, and for those of others.

    DIR/history.json             the same as a run's, with one entry: the chain
    DIR/links/DIGEST/            each an ordinary PEFT adapter; the live link too, as it is now
    DIR/stages/main/chain.json   what only a chain that goes on needs to know
    DIR/stages/main/live.safetensors    the state of the live link, if there is one

Whoever reads a run (`load_run`, the exports, `chainlora eval`) reads this too, the live link
included. A folder is replaced as a whole, so it is never partly of one chain and partly of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from chainlora import files
from chainlora.chain.adapters import base_layer, is_transposed, set_config, task_type
from chainlora.chain.chain import Chain
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.errors import RunError
from chainlora.knots.numbers import Numbers
from chainlora.models.finding import name_of
from chainlora.runs.costs import versions
from chainlora.runs.documents import Count, Document, Part, now, read_part, write_part
from chainlora.runs.history import MAIN, Base, Entry, History, State, Term, Training
from chainlora.runs.links import save_link
from chainlora.runs.opening import check_base
from chainlora.runs.paths import HISTORY, exists_in, stage_folder
from chainlora.runs.state import OpenState

# Where a checkpoint of a trainer keeps its chain, beside the adapter.
INSIDE = "chain"

_CHAIN, _LIVE = "chain.json", "live.safetensors"


class Live(Part):
    """A link that was being tuned when its chain was saved, but for its tensors."""

    config: dict[str, Any]
    num_steps: Count
    num_soft_knots: Count


class Memory(Document):
    """What a chain that goes on needs to know: the `ids` of its links, that of the next one, what
    its links are drawn by, and the numbers of its run."""

    ids: tuple[Count, ...] = ()
    next_id: Count = 0
    stage: str = ""
    first_id: Count = 0
    live: Live | None = None
    numbers: Numbers | None = None


@dataclass(frozen=True)
class SavedChain:
    """A chain as it is on disk, read and checked. `links` are without the live one."""

    state: OpenState
    memory: Memory
    links: list[Link]
    live: dict[str, Tensor]


def save_chain(chain: Chain, directory: str | Path) -> None:
    """Write a chain, the live link included, so that `load_chain` continues to the same bits.

    Raises RunError where something else than a saved chain lies.
    """
    write_chain(chain, current_links(chain), Path(directory).expanduser())


def write_chain(
    chain: Chain, links: Sequence[Link], directory: Path, numbers: Numbers | None = None
) -> None:
    """Write a chain whose `current_links` are known, and the numbers of its run."""
    _refuse_if_taken(directory)
    base = describe_base(chain)
    with files.replaced_folder(directory) as scratch:
        saved = [(save_link(scratch, link, base, MAIN), link.strength) for link in links]
        folder = stage_folder(scratch, MAIN)
        folder.mkdir(parents=True)
        if chain.live is not None:
            files.save_tensors(folder / _LIVE, chain.live_state())
        write_part(folder / _CHAIN, _memory(chain, numbers))
        terms = tuple(Term(link=digest, strength=strength) for (digest, _), strength in saved)
        entry = Entry(
            key=MAIN,
            kind="import",
            state=State(base=base.fingerprint, terms=terms),
            files=files.checksums(folder),
            training=Training(versions=versions()),
            ended=now(),
        )
        history = History(base=base, hold=chain.hold, seed=chain.seed)
        whole = history.added(entry, dict(link for link, _ in saved))
        write_part(scratch / HISTORY, whole.model_copy(update={"head": MAIN}))


def read_chain(state: OpenState) -> SavedChain:
    """Read a saved chain and check all its files. Changes no model."""
    if state.entry is None:
        raise RunError("a saved chain goes on from its links", state.run, "take the model itself")
    state.verify()
    folder, known = stage_folder(state.run, MAIN), state.at(MAIN).entry
    if known is None or _CHAIN not in known.files:
        raise RunError("a saved chain was to be read", f"a run, {state.run}", "name a saved chain")
    memory = read_part(folder / _CHAIN, Memory)
    live = load_file(folder / _LIVE) if _LIVE in known.files else {}
    links = state.read(state.state.terms[: len(memory.ids)])
    links = [replace(link, id=id) for link, id in zip(links, memory.ids, strict=True)]
    return SavedChain(state, memory, links, live)


def restore_chain(chain: Chain, saved: SavedChain) -> None:
    """Make a chain what was saved, whatever it is now; its model must be the one of the save.

    Raises RunError for another model, and for a live link that was weakened by `mix`.
    """
    live, run = saved.memory.live, saved.state.run
    of_live = saved.state.state.terms[len(saved.links) :]
    strength = of_live[0].strength if of_live else 1.0
    if strength != 1:
        raise RunError(
            "a link that goes on being tuned is at full strength",
            f"{strength:g} in {run}",
            f"restore it first: chainlora mix {run} {MAIN}=1",
        )
    check_base(saved.state.base, run, fingerprint=chain.base_fingerprint)
    if chain.live is not None:
        chain.discard()
    chain.drop(len(chain))
    chain.add(*saved.links)
    memory = saved.memory
    chain.next_id, chain.stage, chain.first_id = memory.next_id, memory.stage, memory.first_id
    if live is not None:
        config = LinkConfig(**live.config)
        # what the loss said at its start is in the tensors
        init = "kaiming" if config.init == "gradient" else config.init
        adapter = chain.extend(config.model_copy(update={"init": init}))
        set_config(adapter, config)
        chain.load_live_state(saved.live, live.num_steps, live.num_soft_knots)


def current_links(chain: Chain) -> list[Link]:
    """Return the links that make the model what it is now: the live one too, if it adds anything.

    A chain of no other links gives its live link in any case, so that there is one to write.
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
    )


# --- writing ---


def _refuse_if_taken(directory: Path) -> None:
    files.check_writable(directory)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if exists_in(directory) and (stage_folder(directory, MAIN) / _CHAIN).is_file():
        return
    raise RunError(
        f"a chain must be saved to a new or empty folder, or over another chain (got {directory}); "
        "choose another"
    )


def _memory(chain: Chain, numbers: Numbers | None) -> Memory:
    live = None
    if chain.live is not None:
        config = chain.live.config.model_dump(mode="json")
        live = Live(config=config, num_steps=chain.live_steps, num_soft_knots=chain.live_soft_knots)
    ids = tuple(link.id for link in chain.links)
    return Memory(
        ids=ids,
        next_id=chain.next_id,
        stage=chain.stage,
        first_id=chain.first_id,
        live=live,
        numbers=numbers,
    )


def chain_folder(directory: Path) -> Path:
    """Return where the chain lies: in the folder itself, or inside a trainer's checkpoint."""
    inside = directory / INSIDE
    return inside if not exists_in(directory) and exists_in(inside) else directory
