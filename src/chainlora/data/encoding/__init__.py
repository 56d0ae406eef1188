"""Encode rows as tokens: sequences, targets, cuts and splits.

Rows come from a task (`chainlora.data.tasks`) or from a user's file in a format of `data.format`.
All checks are here, before training starts; errors name the file and line of a row. Start reading
at `RowEncoder` in encoder.py.
"""

from __future__ import annotations

from chainlora.data.encoding.encoder import (
    FORMATS,
    Options,
    RowEncoder,
    detect_format,
    with_usual_columns,
)
