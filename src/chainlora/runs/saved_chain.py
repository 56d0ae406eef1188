"""A chain on disk without a run around it: for loops of one's own, and for those of others.

    DIR/chain.json               manifest, the same as a run's: links, base, hashes
    DIR/links/000/ …             each an ordinary PEFT adapter
    DIR/checkpoints/00000120/    the live link, if there is one: its state and its config
    DIR/best/00000120/           the live link once more, as it is now, as a PEFT adapter
    DIR/start.safetensors        extra modules before the first link, where the base's files have
                                 none (a new head)

Whoever reads a run (`load_run`, the exports, `chainlora eval`) reads this too, the live link
included. A folder is replaced as a whole, so it is never partly of one chain and partly of another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from chainlora import files
from chainlora.chain.adapters import base_layer, has_fan_in_first, set_config, task_type
from chainlora.chain.chain import Chain
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.errors import RunError
from chainlora.knots.numbers import Numbers
from chainlora.runs.costs import versions
from chainlora.runs.links import write_link
from chainlora.runs.manifest import (
    FORMAT,
    Base,
    Checkpoint,
    Manifest,
    Progress,
    Selection,
    encode_manifest,
    link_directory,
    link_entries,
    link_entry,
)
from chainlora.runs.reading import RunReader, check_base

# Where a checkpoint of a trainer keeps its chain, beside the adapter.
INSIDE = "chain"

_START = "start.safetensors"
_STATE = "link.safetensors"
_CONFIG = "link.json"


@dataclass(frozen=True)
class LiveState:
    """A link that was being tuned when its chain was saved."""

    config: LinkConfig
    tensors: dict[str, Tensor]
    num_steps: int
    num_soft_knots: int


@dataclass(frozen=True)
class SavedChain:
    """A chain as it is on disk, read and checked."""

    path: Path
    manifest: Manifest
    links: list[Link]
    live: LiveState | None
    start: dict[str, Tensor]


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
    base, live = describe_base(chain), links[len(chain) :]
    with files.replaced_folder(directory) as scratch:
        for link in chain.links:
            _write_link(scratch / link_directory(link.id), link, base)
        if start := chain.start_of_extra():
            files.save_tensors(scratch / _START, start)
        manifest = _manifest(chain, base, _write_live(chain, scratch))
        selected = _write_selected(live[0], scratch, manifest) if live else None
        update = {"selected": selected, "files": files.checksums(scratch), "numbers": numbers}
        whole = encode_manifest(manifest.model_copy(update=update))
        files.write_json(scratch / "chain.json", whole)


def read_chain(reader: RunReader) -> SavedChain:
    """Read a saved chain and check all its files. Changes no model."""
    manifest = reader.manifest()
    for name in manifest.files:
        reader.check_files(manifest, name)
    links = reader.links_of(manifest, len(manifest.links))
    start = load_file(reader / _START) if _START in manifest.files else {}
    return SavedChain(reader.path, manifest, links, _read_live(reader, manifest), start)


def restore_chain(chain: Chain, saved: SavedChain) -> None:
    """Make a chain what was saved, whatever it is now; its model must be the one of the save.

    Raises RunError for another model, and for a live link that was weakened by `mix`.
    """
    selected = saved.manifest.selected
    if saved.live and selected and selected.partial and selected.partial.strength != 1:
        raise RunError(
            "a link that goes on being tuned is at full strength",
            f"{selected.partial.strength:g} in {saved.path}",
            f"restore it first: chainlora mix {saved.path} {selected.partial.stage}=1",
        )
    body = saved.manifest.base.body
    if body is None or body != chain.fingerprint.without(saved.start):
        check_base(saved.manifest.base, saved.path, fingerprint=chain.base_fingerprint)
    if chain.live is not None:
        chain.discard()
    chain.drop(len(chain))
    chain.set_start_of_extra(saved.start)
    chain.add(*saved.links)
    chain.next_id = saved.manifest.next_id
    if saved.live is not None:
        live = saved.live
        # what the loss said at its start is in the tensors
        init = "kaiming" if live.config.init == "gradient" else live.config.init
        adapter = chain.extend(live.config.model_copy(update={"init": init}))
        set_config(adapter, live.config)
        chain.load_live_state(live.tensors, live.num_steps, live.num_soft_knots)


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
    """Return what a manifest says of the model that a chain is on."""
    model: Any = chain.model
    parameter = next(model.parameters())
    start = chain.start_of_extra()
    return Base(
        model=getattr(getattr(model, "config", None), "_name_or_path", "") or "",
        fingerprint=chain.base_fingerprint,
        body=chain.fingerprint.without(start) if start else None,
        task_type=task_type(model),
        dtype=str(parameter.dtype).removeprefix("torch."),
        fan_in_fan_out=any(has_fan_in_first(base_layer(module)) for module in model.modules()),
    )


# --- writing ---


def _refuse_if_taken(directory: Path) -> None:
    files.check_writable(directory)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if (directory / "chain.json").is_file() and not (directory / "config.yaml").exists():
        return
    raise RunError(
        f"a chain must be saved to a new or empty folder, or over another chain (got {directory}); "
        "choose another"
    )


def _write_link(folder: Path, link: Link, base: Base) -> None:
    folder.mkdir(parents=True)
    write_link(folder, link, base)


def _write_selected(live: Link, folder: Path, manifest: Manifest) -> Selection:
    """Write the live link as an adapter, and name it as the end of what is loaded."""
    step, base = manifest.position.step, manifest.base
    name = f"best/{step:08d}"
    _write_link(folder / name, live, base)
    partial = link_entry(live, base.fingerprint, manifest.links, name)
    return Selection(num_links=live.index, step=step, partial=partial)


def _write_live(chain: Chain, folder: Path) -> Checkpoint | None:
    if chain.live is None:
        return None
    progress = _progress(chain.links)
    progress.step += chain.live_steps
    progress.soft_knots = chain.live_soft_knots
    name = f"checkpoints/{progress.step:08d}"
    (folder / name).mkdir(parents=True)
    files.save_tensors(folder / name / _STATE, chain.live_state())
    config = chain.live.config.model_dump(mode="json")
    files.write_json(folder / name / _CONFIG, config)
    return Checkpoint(directory=name, progress=progress)


def _manifest(chain: Chain, base: Base, checkpoint: Checkpoint | None) -> Manifest:
    return Manifest(
        format=FORMAT,
        base=base,
        seed=chain.seed,
        hold=chain.hold,
        links=link_entries(chain.links, base.fingerprint),
        next_id=chain.next_id,
        checkpoint=checkpoint,
        selected=None,
        progress=_progress(chain.links),
        versions=versions(),
    )


def _progress(links: Sequence[Link]) -> Progress:
    lengths = [link.num_steps for link in links]
    return Progress(step=sum(lengths), link=len(links))


# --- reading ---


def chain_folder(directory: Path) -> Path:
    """Return where the chain lies: in the folder itself, or inside a trainer's checkpoint."""
    inside = directory / INSIDE
    if not (directory / "chain.json").is_file() and (inside / "chain.json").is_file():
        return inside
    return directory


def _read_live(reader: RunReader, manifest: Manifest) -> LiveState | None:
    point = manifest.checkpoint
    if point is None:
        return None
    folder = reader / point.directory
    config = LinkConfig(**json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
    num_steps = point.progress.step - manifest.progress.step
    return LiveState(config, load_file(folder / _STATE), num_steps, point.progress.soft_knots)
