"""What rows and base weights a cell saw, named so that a later definition can tell.

A digest is compared with others of its own definition only. Definitions change (a digest of more,
or of something better), results stay: so each is written as ``version:value``.

    rows   1  the rows as they lie, in format 1 of the results beside a fingerprint of 64 digits
           2  the rows as the task renders them, all splits as one text
           3  a hash of hashes of each row (`chainlora.data.digest`, which writes the version)
    base   1  name, shape and up to 4096 values of every tensor (`chainlora.chain.base_weights`)

A test holds today's definitions by their values: whoever changes one raises its number here.
"""

from __future__ import annotations

from chainlora.data import digest as rows

VERSIONS = {"rows": rows.VERSION, "base": 1}
_DIGITS = 12


def digest(kind: str, value: str | None, version: int | None = None) -> str | None:
    """Return a digest with the version of its definition; None for none."""
    if value is None or ":" in value:  # rows bring their version with them
        return value
    return f"{VERSIONS[kind] if version is None else version}:{value[:_DIGITS]}"


def definition(digest: str) -> str:
    """Return the version of a digest's definition."""
    return digest.partition(":")[0]
