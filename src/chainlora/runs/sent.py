"""``sent.jsonl``: the exports and copies of a run that were written elsewhere.

They cannot be changed from here, so a certificate of erasure lists them. The file is a note of this
machine: it is not sent with the run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from chainlora.runs.documents import Digest, Part, now

logger = logging.getLogger(__name__)

SENT = "sent.jsonl"


class Sent(Part):
    """An export or a copy: of which state, where it was written to, and when."""

    what: str
    state: Digest
    to: str
    time: str


def note_sent(run: Path, what: str, state: str, to: str | Path) -> None:
    """Note an export or a copy; a run that cannot be written has no notes."""
    line = Sent(what=what, state=state, to=str(to), time=now()).model_dump_json()
    try:
        with (run / SENT).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        logger.debug("%s is not noted in %s: %s", what, run, error)


def sent_from(run: Path) -> Iterator[Sent]:
    """Yield the exports and copies that a run knows of; damaged lines are skipped."""
    try:
        lines = (run / SENT).read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield Sent.model_validate_json(line)
        except ValidationError:
            continue
