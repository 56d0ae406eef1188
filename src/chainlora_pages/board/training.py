"""Train from the page: run `chainlora train` or `extend` in a separate process.

The page stays responsive, and the run is like any other: after a stop, or a kill of the board, the
same command resumes it. An uploaded file is copied below the folder of the run, under a name chosen
here, and read only as rows: never as a config, which could name plug-ins.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from chainlora import files
from chainlora.config.data import DataConfig
from chainlora.config.staging import check_name, name_of_rows
from chainlora.data.row_warnings import CHANGED
from chainlora.data.sources import FileSource
from chainlora.data.splits import check_files
from chainlora.errors import ConfigError, DataError, RunError, printable
from chainlora.evaluation.stage_scores import HARM
from chainlora.runs.changes import work_left
from chainlora.runs.entries import START
from chainlora.runs.history_file import read_history
from chainlora.runs.paths import is_run
from chainlora_pages.board.previews import fields_of, guess, read_upload
from chainlora_pages.board.watching import AS_BEFORE, NONE, standing_of

UPLOADS = ".uploads"  # the dot keeps `find_runs` from taking it for a run
_DONE = {"combine": "Combined.", "prune": "Taken out.", "update": "Corrected."}  # by command
_COMBINING = re.compile(r"combining (?P<parts>.+): (?P<unit>\w+) (?P<at>\d+) of (?P<all>\d+)$")
_STEP = re.compile(r": (?:trained|combined) in |^step +\d")
_WORK = re.compile(rf"{_COMBINING.pattern}|{_STEP.pattern}")
_NOTICES = (HARM, CHANGED, "left out", "training rows too", "were cut from")  # texts of warnings
_SHOWN = 1 << 16  # bytes at the end of the log that are read


def command_of(
    place: str | Path,
    rows: str | Path | None,
    *,
    columns: tuple[str | None, str | None] | None = None,
    run: str | Path | None = None,
    model: str | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] = {},
) -> list[str]:
    """Return the arguments of the command that trains on an uploaded file of rows.

    The file is copied; None resumes `run`. `columns` are those of question and answer, by default
    recognised by their names. `run` gets a new stage; None starts a new run of `model`
    below `place`. The stage has the name of the file by default, and None in `settings` stands for
    the default of a key. Raises ChainLoRAError like the command line, and for a file that is not
    rows.
    """
    if rows is None:
        if run is None or not work_left(read_history(Path(run))):
            raise ConfigError("Training needs a file of rows", remedy="choose one")
        return ["train", str(Path(run).resolve())]
    if run is None and not model:
        raise ConfigError("A new run needs a model", remedy="choose one, or type a name")
    name = check_name(name or name_of_rows(rows))
    if run is None and is_run(Path(place) / name):
        remedy = "type another name, or choose this run in place of a new one"
        raise ConfigError(f"There is a run {name} already", remedy=remedy)
    fields = _checked_fields(Path(rows), columns)
    keys = {"name": name, **settings, "data.fields": json.dumps(fields)}
    file = copy_rows(Path(rows), Path(place) if run is None else Path(run).parent)
    if run is not None:
        words = ["extend", str(Path(run).resolve()), str(file)]
    else:
        words = ["train", str(file)]
        keys |= {"model": model, "output": Path(place).resolve() / name}
    return [*words, *(f"--{key}={value}" for key, value in keys.items() if value is not None)]


def _checked_fields(rows: Path, columns: tuple[str | None, str | None] | None) -> dict[str, str]:
    """Return `data.fields` for a file. Raises ChainLoRAError for a row that cannot be read."""
    try:
        upload = read_upload(rows)
        deque(FileSource(rows), maxlen=0)
        fields = fields_of(upload, *(columns or guess(upload.columns)))
        check_files(DataConfig(train=str(rows), fields=fields), None)
    except DataError as error:
        raise DataError(as_uploaded(str(error), rows, rows.name)) from None
    return fields


def copy_rows(rows: Path, place: Path) -> Path:
    """Copy a file of rows below a folder; the copy is named by its name and content."""
    name = f"{name_of_rows(rows)}-{files.sha256(rows)[:8]}{rows.suffix.lower()}"
    path = place.resolve() / UPLOADS / name
    if not path.is_file():
        files.copy_file(rows, path)
    return path


def as_uploaded(text: str, copy: str | Path, name: str) -> str:
    """Rewrite a message about a copy for the uploaded file `name`; the row comes first."""
    match = re.search(rf" at {re.escape(str(copy))} (line|row) (\d+)", text)
    if match:
        place = f"{match[1].capitalize()} {match[2]} of {name} cannot be read: "
        text = place + text.removeprefix("error: ").replace(match[0], "")
    return text.replace(str(copy), name)


def plain(text: str) -> str:
    """Return a message for a reader of the page: without folders, options and commands."""
    text = re.sub(
        r"(?:(?<=[\s('\"`=:,])|^)(?:\.|~)*(?:/[^/\s'\"`(),;:]+)*/([^/\s'\"`(),;:]+)", r"\1", text
    )
    text = re.sub(r" ?\([^()]*(?:--|chainlora )[^()]*\)", "", text)
    return re.sub(r"[;,.] [^;]*(?:--\w|\bchainlora )[^;]*", "", text)


class Work(NamedTuple):
    """What a command does now, and its share in 0…1, None if it is not known."""

    text: str
    share: float | None = None


PREPARING = Work("Preparing …")


class Offer(NamedTuple):
    """A button for the next step: its label, and the arguments of its command."""

    label: str
    words: list[str]


def continuing(run: str | Path) -> Offer:
    """Return the button that resumes a run."""
    return Offer("Continue", ["train", str(Path(run).resolve())])


class Trainer:
    """Runs one training command at a time, and shows its output."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._words: list[str] = []
        self._name = ""
        self._is_stopping, self._dismissed = False, set[str]()
        self._folder = TemporaryDirectory(prefix="chainlora-", ignore_cleanup_errors=True)

    @property
    def _log(self) -> Path:
        return Path(self._folder.name) / "log"

    @property
    def is_training(self) -> bool:
        """Return whether a command is running."""
        return self._child is not None and self._child.poll() is None

    def start(self, words: list[str], name: str = "") -> None:
        """Start a command of chainlora. `name` is the original name of its file of rows.

        Does nothing if this command is running. Raises RunError if another one is.
        """
        if self.is_training and words == self._words:
            return  # a second click
        if self.is_training:
            rule = "Another training is running: only one can run at a time"
            raise RunError(rule, remedy="stop it, or wait for its end")
        self._is_stopping, self._words, self._name = False, words, name
        self._dismissed.clear()
        # A new session: otherwise Ctrl-C in the terminal of the board would stop it twice. A file,
        # not a pipe: the command continues if the board is killed.
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "chainlora", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Stop the command after its step and save; a second call stops it at once."""
        if self.is_training and self._child is not None:
            self._child.terminate()
            self._is_stopping = True

    def wait(self) -> int | None:
        """Wait for the end. Return the exit status, or None if no command was started."""
        return None if self._child is None else self._child.wait()

    @property
    def standing(self) -> str:
        """Return the progress of the command as a sentence; "" before the first command."""
        if self._child is None:
            return ""
        status = self._child.poll()
        if status is None:
            return "Stopping after this step …" if self._is_stopping else self.work.text
        if status == 0:
            return _DONE.get(self._words[0], "Trained.")
        if self._is_stopped and not self._has_more:
            return "Stopped. Nothing is left to resume: press Train again, or look under Watch."
        if self._is_stopped:
            has_more = is_run(self.run) and read_history(self.run).links
            return f"Stopped and saved.{AS_BEFORE if has_more else ''} Press Continue to resume."
        errors = [line for line in self.lines() if "error: " in line or "cannot be read: " in line]
        reason = plain(errors[-1].removeprefix("error: ")) if errors else "The log says why."
        return f"Not done. {reason}"

    @property
    def work(self) -> Work:
        """Return the current work of a running command."""
        lines = [line for line in self.lines(99) if _WORK.search(line)]
        last = lines[-1] if lines else ""
        if match := _COMBINING.match(last):
            parts = " + ".join(part for part in match["parts"].split(" + ") if part != START)
            text = f"Combining {parts}: {match['unit']} {match['at']} of {match['all']}"
            return Work(text, int(match["at"]) / int(match["all"]))
        facts = standing_of(self.run)
        step, _, total = facts["step"].replace(",", "").partition(" of ")
        is_over = "ed in " in last  # trained in, combined in
        if is_over or facts["state"] != "training" or not total:
            return Work("Finishing …") if _STEP.search(last) else PREPARING
        left = f", about {facts['time left']} left" if facts["time left"] != NONE else ""
        return Work(f"Training: step {step} of {total}{left}", int(step) / int(total))

    @property
    def has_trained(self) -> bool:
        """Return whether the last command trained on rows."""
        return self._words[:1] in (["train"], ["extend"])

    @property
    def finished(self) -> str:
        """Return a text that is unique to the last command if it has succeeded, else ""."""
        is_done = self._child is not None and self._child.poll() == 0
        return f"{self.run} {self._child.pid}" if is_done and self._child else ""

    @property
    def notices(self) -> list[str]:
        """Return the warnings of the last command that a user should see, until dismissed."""
        lines = dict.fromkeys(line.removeprefix("warning: ") for line in self.lines(99))
        found = [line for line in lines if any(mark in line for mark in _NOTICES)]
        return [line for line in found if line not in self._dismissed]

    def dismiss(self) -> None:
        """Hide the present notices of the last command."""
        self._dismissed |= {*self.notices}

    @property
    def _is_stopped(self) -> bool:
        status = None if self._child is None else self._child.poll()
        return status is not None and (status < 0 or status > 128)  # by a signal

    @property
    def _has_more(self) -> bool:
        """Return whether the run has declared entries; a command stopped early has left none."""
        return is_run(self.run) and bool(work_left(read_history(self.run)))

    @property
    def run(self) -> Path:
        """Return the run of the last command."""
        outputs = [word for word in self._words if word.startswith("--output=")]
        return Path(outputs[0].removeprefix("--output=") if outputs else self._words[1])

    @property
    def harm(self) -> str:
        """Return the line that warns of lost general ability, or ""."""
        return next((line for line in self.lines() if HARM in line), "")

    @property
    def offer(self) -> Offer | None:
        """Return a button for the next step after the last command, if there is one."""
        if self._is_stopped and self._has_more and self._words[0] != "combine":
            return continuing(self.run)
        if not self.is_training and "chainlora combine" in self.harm:
            return Offer("Combine", ["combine", str(self.run)])
        return None

    def lines(self, count: int = 12) -> list[str]:
        """Return the last lines of the command's output."""
        if self._child is None:
            return []
        with self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _SHOWN))
            texts = log.read().decode("utf-8", "replace").splitlines()
        lines = [printable(line.removeprefix("chainlora: ")) for line in texts]
        copy = next((word for word in self._words if Path(word).parent.name == UPLOADS), None)
        if copy and self._name:
            lines = [as_uploaded(line, copy, self._name) for line in lines]
        return [line for line in lines if line.strip()][-count:]
