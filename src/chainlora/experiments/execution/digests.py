"""What rows and base weights a cell saw, named so that a later definition can tell.

A digest is compared with others of its own definition only. Definitions change (a digest of more,
or of something better), results stay: so each is written as ``version:value``.

    rows   0  the rows as they lie, in format 1 of the results beside a fingerprint of 64 digits
           1  the rows as the task renders them, in format 1 of the results
           …  whatever the run says: its digest names its own version (`chainlora.data.digest`)
    base   1  name, shape and up to 4096 values of every tensor (`chainlora.chain.base_weights`)

A test holds today's definition of the base by its value: whoever changes it raises its number here,
or gives the fingerprint a version of its own.
"""

from __future__ import annotations

BASE_VERSION = 1
_DIGITS = 12


def digest(value: str | None, version: int) -> str | None:
    """Return ``version:value``; as it is where it has a version; None for none."""
    if value is None:
        return None
    own, colon, digits = value.rpartition(":")
    return f"{own if colon else version}:{digits[:_DIGITS]}"


def definition(digest: str) -> str:
    """Return the version of a digest's definition."""
    return digest.partition(":")[0]
