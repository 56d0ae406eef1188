"""What a call of the command line ended with."""

from __future__ import annotations

import json
from dataclasses import dataclass


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
        """Nothing on stdout, exit 1, one line on stderr that has these parts; returns it."""
        assert self.status == 1, self.err
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("chainlora: error: ")
        assert "unexpected" not in lines[0]
        for part in parts:
            assert part in lines[0], lines[0]
        return lines[0]
