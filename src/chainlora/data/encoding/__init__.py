"""Rows to tokens: what is read, what is a target, what is cut or split.

Rows are those of a task (`chainlora.data.tasks`) or of a user's own file, in a format of
`data.format`. Everything is checked here, before training starts, and a row that cannot be used is
named by file and line.

    texts.py            a prompt with its completion or with candidates, or a text alone
    chat.py             conversations
    preference_rows.py  pairs of answers (DPO), each as a row of a plain format
    translated.py       rows of ShareGPT, Alpaca and TRL's conversations, as one of these formats
    tokens.py           texts to ids
    encoder.py          picks the encoder of a task or format; what is longer than the context
"""

from __future__ import annotations

from chainlora.data.encoding.encoder import Options, RowEncoder, detect_format, make_row_encoder
