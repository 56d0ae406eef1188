"""Encode rows as tokens: sequences, targets, cuts and splits.

Rows come from a task (`chainlora.data.tasks`) or from a user's file in a format of `data.format`.
All checks are here, before training starts; errors name the file and line of a row.

    texts.py            a prompt with its completion or with candidates, or a text alone
    chat.py             conversations
    preference_rows.py  pairs of answers (DPO), read as two rows of a plain format
    translated.py       rows of ShareGPT, Alpaca and TRL's conversations, as one of these formats
    tokens.py           texts to ids
    encoder.py          picks the encoder of a task or format; cuts rows that are too long
"""

from __future__ import annotations

from chainlora.data.encoding.encoder import Options, RowEncoder, detect_format
