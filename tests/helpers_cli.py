"""What a call of the command line ended with."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

ANNOUNCED = re.compile(r"\S+: (links of rank [\w, ]+|one LoRA of rank \d+) on .+, to .+")


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one JSON object on stdout, and nothing else there."""
        assert self.status == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    def refused(self, *parts: str) -> str:
        """Nothing on stdout, exit 1, one line of error on stderr that has these parts; returns it.

        `train` says before it what it was about to do.
        """
        assert self.status == 1, self.err
        assert self.out == ""
        lines = self.err.splitlines()
        if len(lines) == 2 and ANNOUNCED.match(lines[0]):
            del lines[0]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("chainlora: error: ")
        assert "unexpected" not in lines[0]
        for part in parts:
            assert part in lines[0], lines[0]
        return lines[0]

    def misused(self, words: str) -> None:
        """Nothing on stdout, exit 2, and these words on stderr."""
        assert (self.status, self.out) == (2, "")
        assert words in self.err.replace("’", "'")
        assert "Traceback" not in self.err
