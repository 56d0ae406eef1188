"""The questions of training rows, with the expected answers and those of two states."""

from __future__ import annotations

from collections.abc import Sequence

from chainlora.errors import RunError
from chainlora.evaluation.answers import Said
from chainlora_pages.board.desk import Desk
from chainlora_pages.page import Section, Text, Texts, as_text, render_part, section

_FEW = 0.8  # share of right answers below which the page says what to try
_ADVICE = (
    "To get more right, press Undo, and train the file again under another name with more epochs "
    "(30, for example) or a higher learning rate, under Settings."
)


def answers_html(
    desk: Desk,
    states: Sequence[tuple[str, str]],
    stage: str | None = None,
    *,
    has_advice: bool = False,
) -> str:
    """Return the table of `answers_section`, or the reason why there is none."""
    try:
        return render_part([answers_section(desk, states, stage, has_advice=has_advice)])
    except RunError as error:
        return render_part([section("Answers", Text(as_text(f"{error}.")))])


def answers_section(
    desk: Desk,
    states: Sequence[tuple[str, str]],
    stage: str | None = None,
    *,
    has_advice: bool = False,
) -> Section:
    """Return a table of questions and answers, and the numbers of right answers.

    `states` are names and entries. With `stage`, only its rows are asked. With `has_advice`, a
    sentence says what to try if the first state gets few right. Raises RunError for rows without
    questions.
    """
    asked = desk.replies([key for _, key in states], stage)
    heads = ["question", "expected", *(name for name, _ in states)]
    rows: list[list[str | Said]] = [
        [each.prompt, each.expected or "", *each.answers] for each in asked
    ]
    columns = zip(*(each.answers for each in asked), strict=True)  # by state
    counts = [sum(said.is_right is True for said in column) for column in columns]
    names = [name for name, _ in states]
    texts = [f"{name} {count}" for name, count in zip(names, counts, strict=True)]
    texts[0] = f"{counts[0]} of {len(asked)} right" + f" ({names[0]})" * (names[0] != "got")
    is_few = has_advice and counts[0] < _FEW * len(asked)
    summary = f"**{as_text('; '.join(texts))}.** {_ADVICE if is_few else ''}"
    title = f"Answers to the rows of {stage}" if stage else "Answers to rows of the data"
    return section(title, Text(summary), Texts(title, heads, rows))
