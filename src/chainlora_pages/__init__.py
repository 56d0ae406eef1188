"""HTML pages about runs: the report (one file without external resources), charts, and the board.

Names here are public: `report_runs`, and parts for your own pages. Start reading at `page.py` for
the report, at `board/desk.py` for the board. The package uses only public names of chainlora
(tests/test_architecture.py). Names load on first use, because `--help` imports this file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_CHARTS = ("Picture", "Table", "legend_above", "line_style", "picture", "save", "table_of")
_PAGE = ("Column", "Numbers", "Page", "Section", "Text", "markdown", "render", "section")
_WHERE = dict.fromkeys((*_CHARTS, "whole_steps"), "chainlora_pages.charts")
_WHERE |= dict.fromkeys(_PAGE, "chainlora_pages.page")
_WHERE |= {"number": "chainlora.showing", "report_runs": "chainlora_pages.run_report"}

__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from chainlora.showing import number as number
    from chainlora_pages.charts import Picture as Picture
    from chainlora_pages.charts import Table as Table
    from chainlora_pages.charts import legend_above as legend_above
    from chainlora_pages.charts import line_style as line_style
    from chainlora_pages.charts import picture as picture
    from chainlora_pages.charts import save as save
    from chainlora_pages.charts import table_of as table_of
    from chainlora_pages.charts import whole_steps as whole_steps
    from chainlora_pages.page import Column as Column
    from chainlora_pages.page import Numbers as Numbers
    from chainlora_pages.page import Page as Page
    from chainlora_pages.page import Section as Section
    from chainlora_pages.page import Text as Text
    from chainlora_pages.page import markdown as markdown
    from chainlora_pages.page import render as render
    from chainlora_pages.page import section as section
    from chainlora_pages.run_report import report_runs as report_runs


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'chainlora_pages' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
