"""Pages to show: HTML files that need nothing but themselves.

The names here are public: what a page of your own is made of.
"""

from chainlora.reports.charts import (
    Picture,
    Table,
    legend_above,
    line_style,
    number,
    picture,
    save,
    table_of,
    whole_steps,
)
from chainlora.reports.page import Column, Numbers, Page, Section, Text, markdown, render, section

__all__ = [
    "Column",
    "Numbers",
    "Page",
    "Picture",
    "Section",
    "Table",
    "Text",
    "legend_above",
    "line_style",
    "markdown",
    "number",
    "picture",
    "render",
    "save",
    "section",
    "table_of",
    "whole_steps",
]
