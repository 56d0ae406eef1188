"""Read and write links: each is an ordinary PEFT adapter in a folder named by its content."""

from __future__ import annotations

from pathlib import Path

from chainlora import files
from chainlora.chain.adapters import load_adapter, save_adapter
from chainlora.chain.checks import link_fault
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.errors import RunError
from chainlora.runs.documents import DAMAGED
from chainlora.runs.entries import Base, LinkFacts, link_folder


def write_adapter_of(folder: Path, link: Link, base: Base) -> None:
    """Write a link as a PEFT adapter, with the scaling that it was tuned at.

    The stored rank can differ from the tuned one (soft knots), so alpha is adjusted.
    """
    power = 0.5 if link.config.rslora else 1
    save_adapter(
        folder,
        link.factors,
        link.config,
        rank=link.rank,
        alpha=link.config.scaling * link.rank**power,
        base=base.model,
        fan_in_fan_out=base.fan_in_fan_out,
        task_type=base.task_type,
    )


def save_link(run: Path, link: Link, base: Base, stage: str) -> tuple[str, LinkFacts]:
    """Write a link into a run unless it exists; return its digest and its facts."""
    files.make_folder(run / "links")
    with files.new_folder(run / "links", stage) as scratch:
        write_adapter_of(scratch, link, base)
        facts = LinkFacts(
            stage=stage,
            rank=link.rank,
            num_steps=link.num_steps,
            error=link.error,
            config=link.config.model_dump(mode="json"),
            files=files.checksums(scratch),
        )
        files.put_folder(scratch, run / link_folder(facts.digest))
    return facts.digest, facts


def read_link(folder: Path, facts: LinkFacts, index: int) -> Link:
    """Read a link from its PEFT adapter. Raises RunError if its tensors do not fit its facts."""
    link = Link(
        index=index,
        factors=load_adapter(folder),
        config=facts.link_config(),
        num_steps=facts.num_steps,
        error=facts.error,
    )
    if (wrong := link_fault(link)) is not None:
        raise RunError("a link must be as its run wrote it", f"{wrong} in {folder}", DAMAGED)
    return link


def need_low_rank_sum(config: LinkConfig, where: object, remedy: str) -> None:
    """Raise RunError for a link that is more than s·B·A, because it has LoRA biases."""
    if config.lora_bias:
        raise RunError("links must be low-rank sums", f"a LoRA bias in {where}", remedy)
