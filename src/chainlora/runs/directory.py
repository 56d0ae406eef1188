"""The run directory: what is on disk, in which order it gets there, and how a killed run is found
again.

    RUN/config.yaml            resolved config RUN/chain.json             manifest: format, base and
    its fingerprint, links, progress, versions RUN/links/000/ …           each an ordinary PEFT
    adapter RUN/best/                  the best point inside a link, when the best point is not a
    knot (a PEFT adapter) RUN/checkpoints/00000120/  the live link, optimizer and progress at a step
    (the newest one is kept) RUN/metrics.jsonl          one JSON object a line RUN/result.json
    written last

Every directory is written under another name and renamed, every JSON file replaced atomically, and
the manifest is written after the link it names. So at any instant the directory holds a state from
which the run can go on.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from chainlora.chain.adapters import load_adapter, save_adapter
from chainlora.chain.link import Link
from chainlora.config.loading import dump_config, link_config, load_config
from chainlora.config.schema import LinkConfig, RunConfig
from chainlora.errors import RunError

FORMAT = 1
_HALF = "the run directory is half there: copy it whole, or train anew"


@dataclass
class Progress:
    """Where a run is, and what its trainer remembers: all of it JSON, so that a resumed run knows
    the same."""

    step: int = 0
    link: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    seconds: float = 0.0
    num_records: int = 0
    best: dict[str, Any] | None = None
    evaluations_without_gain: int = 0
    stopped: bool = False
    soft_knots: int = 0  # in the live link so far
    lengths: list[int] = field(default_factory=list)  # steps of each link that has ended


def read_progress(tree: Mapping[str, Any]) -> Progress:
    """Return the progress that a file holds; keys of other versions are left out."""
    known = {each.name for each in fields(Progress)}
    return Progress(**{key: value for key, value in tree.items() if key in known})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose numerics matter."""
    found = {"python": platform.python_version()}
    for package in ("chainlora", "torch", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            from chainlora import __version__

            found[package] = __version__ if package == "chainlora" else "unknown"
    return found


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    scratch = path.with_name(path.name + ".new")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run directory. Raises RunError when it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise RunError(
            f"a run directory must hold {path.name} (got none in {path.parent}); "
            "is this the output of `chainlora train`?"
        ) from None
    except ValueError as error:
        raise RunError(f"{path.name} must be JSON (got {path}: {error}); {_HALF}") from None


class RunDirectory:
    """One run on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise RunError(
                f"a run directory must be a directory (got the file {path}); name another"
            )

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self / "chain.json").is_file()

    def config(self) -> RunConfig:
        """Return the resolved config of the run."""
        if not (self / "config.yaml").is_file():
            raise RunError(
                f"a run directory must hold config.yaml (got none in {self.path}); {_HALF}"
            )
        return load_config(self / "config.yaml")

    def begin(self, config: RunConfig, base: Mapping[str, Any], *, resume: bool) -> Progress:
        """Claim the directory for a run, or find the state to go on from.

        Raises RunError: non-empty without `resume`, half there, another config, another base.
        """
        if self.exists and resume:
            return self._find(config, base)
        if not (resume and self.path.exists() and self._barely_begun()):
            self.refuse_if_taken()
        self.path.mkdir(parents=True, exist_ok=True)
        (self / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        (self / "links").mkdir(exist_ok=True)
        self.write_manifest(base, config, [], Progress())
        return Progress()

    def _barely_begun(self) -> bool:
        """Whether a run was killed here before it wrote its manifest: nothing in it is worth
        keeping."""
        return {entry.name for entry in self.path.iterdir()} <= {
            "config.yaml",
            "links",
            "chain.json.new",
        }

    def _find(self, config: RunConfig, base: Mapping[str, Any]) -> Progress:
        manifest = self.manifest()
        check_base(manifest, base, self.path)
        before = self.config()
        if _science(before) != _science(config):
            sections = ("model", "data", "chain", "train")
            changed = ", ".join(
                key for key in sections if getattr(before, key) != getattr(config, key)
            )
            raise RunError(
                f"--resume needs the config the run began with (got other values under {changed}); "
                f"use {self / 'config.yaml'} or a new output"
            )
        progress = read_progress(manifest["progress"])
        found = self._newest_checkpoint()
        if found is not None:
            later = read_progress(read_json(found / "progress.json"))
            if later.link == len(manifest["links"]) and later.step >= progress.step:
                progress = later
        self._truncate_records(progress.num_records)
        return progress

    def manifest(self) -> dict[str, Any]:
        """Read and check ``chain.json``."""
        manifest = read_json(self / "chain.json")
        keys = ("format", "base", "links", "selected", "hold", "progress")
        missing = [key for key in keys if not isinstance(manifest, dict) or key not in manifest]
        if "format" not in missing and manifest["format"] != FORMAT:
            raise RunError(
                f"chain.json must be of format {FORMAT} (got {manifest['format']!r} in "
                f"{self.path}); "
                "use the version of chainlora that wrote it"
            )
        if missing:
            raise RunError(
                f"chain.json must hold {', '.join(keys)} (got no `{missing[0]}` in {self.path}); "
                f"{_HALF}"
            )
        return dict(manifest)

    def write_manifest(
        self,
        base: Mapping[str, Any],
        config: RunConfig,
        links: list[Link],
        progress: Progress,
        selected: Mapping[str, Any] | None = None,
    ) -> None:
        """Write ``chain.json``: last, after everything it names."""
        write_json(
            self / "chain.json",
            {
                "format": FORMAT,
                "base": dict(base),
                "seed": config.train.seed,
                "hold": config.chain.hold,
                "links": [describe_link(link) for link in links],
                "selected": dict(selected) if selected else None,
                "progress": asdict(progress),
                "versions": versions(),
            },
        )

    def save_link(self, link: Link, base: str) -> None:
        """Write one link as a PEFT adapter under ``links/``."""
        self.save_link_to(f"links/{link.index:03d}", link, base)

    def save_link_to(self, name: str, link: Link, base: str) -> None:
        """Write a link as a PEFT adapter, atomically."""
        scratch = self._scratch(name)
        write_link(scratch, link, base)
        _swap(scratch, self / name)

    def load_links(self, num_links: int | None = None) -> list[Link]:
        """Read the run's chain: as selected (the best point if it was kept), or as it was after
        `num_links` links."""
        manifest = self.manifest()
        entries, selected = manifest["links"], manifest["selected"]
        if num_links is not None:
            if not 0 <= num_links <= len(entries):
                raise RunError(
                    f"--links must be 0 to {len(entries)} for this run (got {num_links})"
                )
            return [
                read_link(self / f"links/{entry['index']:03d}", entry)
                for entry in entries[:num_links]
            ]
        keep = entries if selected is None else entries[: selected["num_links"]]
        links = [read_link(self / f"links/{entry['index']:03d}", entry) for entry in keep]
        if selected is not None and selected["partial"]:
            links.append(read_link(self / "best", selected["partial"]))
        return links

    def save_checkpoint(
        self, state: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], progress: Progress
    ) -> None:
        """Write the live link's and the optimizer's state and the progress; drop older
        checkpoints."""
        name = f"checkpoints/{progress.step:08d}"
        scratch = self._scratch(name)
        save_file(dict(state), scratch / "link.safetensors")
        save_file(dict(optimizer), scratch / "optimizer.safetensors")
        write_json(scratch / "progress.json", asdict(progress))
        _swap(scratch, self / name)
        self.drop_checkpoints(keep=name)

    def has_checkpoint(self, progress: Progress) -> bool:
        """Whether there is a checkpoint of exactly this progress."""
        folder = self / f"checkpoints/{progress.step:08d}"
        return folder.is_dir() and read_json(folder / "progress.json")["link"] == progress.link

    def load_checkpoint(
        self, progress: Progress, config: LinkConfig
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Read the live link's and the optimizer's state of exactly this progress, None at a
        knot."""
        if not self.has_checkpoint(progress):
            return None
        folder = self / f"checkpoints/{progress.step:08d}"
        optimizer = load_file(folder / "optimizer.safetensors")
        if (folder / "adapter_model.safetensors").is_file():  # of version 0.1
            return _live_state_of_adapter(folder, config), optimizer
        return load_file(folder / "link.safetensors"), optimizer

    def load_best(self, index: int, config: LinkConfig) -> Link:
        """Read the partial link of the best point."""
        entry = {"index": index, "num_steps": 0, "config": config.model_dump(mode="json")}
        return read_link(self / "best", entry)

    def save_model(self, model: Any, tokenizer: Any) -> None:
        """Write a whole model, the result of full fine-tuning."""
        model.save_pretrained(self / "model")
        tokenizer.save_pretrained(self / "model")

    def refuse_if_taken(self) -> None:
        """Raise RunError where something else than an empty directory is."""
        if self.path.exists() and any(self.path.iterdir()):
            what, remedy = (
                ("holds a run", "pass --resume to resume it, or ")
                if self.exists
                else ("is not empty and not a whole run", "")
            )
            raise RunError(
                f"`output` must be a new or empty directory (got {self.path}, which {what}); "
                f"{remedy}choose another output"
            )

    def save_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep a link's optimizer state over its knot (ReLoRA only)."""
        scratch = self / "moments.safetensors.new"
        save_file(dict(tensors), scratch)
        scratch.replace(self / "moments.safetensors")

    def load_moments(self) -> dict[str, Tensor]:
        """Read what `save_moments` kept."""
        return load_file(self / "moments.safetensors")

    def drop_checkpoints(self, keep: str | None = None) -> None:
        """Remove checkpoints other than `keep`."""
        folder = self / "checkpoints"
        for old in folder.iterdir() if folder.is_dir() else ():
            if keep is None or old != self / keep:
                shutil.rmtree(old, ignore_errors=True)
        if keep is None and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def record(self, values: Mapping[str, Any], progress: Progress) -> None:
        """Append one line to ``metrics.jsonl``."""
        with (self / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        progress.num_records += 1

    def _truncate_records(self, num_records: int) -> None:
        path = self / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:num_records]
            path.write_text("".join(lines), encoding="utf-8")

    def _newest_checkpoint(self) -> Path | None:
        folder = self / "checkpoints"
        whole = sorted(p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
        return whole[-1] if whole else None

    def _scratch(self, name: str) -> Path:
        scratch = self / (name + ".new")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        return scratch


def check_base(manifest: Mapping[str, Any], base: Mapping[str, Any], run: Path) -> None:
    """Raise RunError unless the model at hand is the one the run was trained on."""
    if manifest["base"]["fingerprint"] != base["fingerprint"]:
        raise RunError(
            f"the base model must be the one {run} was trained on, {manifest['base']['model']} "
            f"(fingerprint {manifest['base']['fingerprint'][:12]}, got "
            f"{base['fingerprint'][:12]}); "
            "its weights have changed: restore them or train anew"
        )


def write_link(folder: Path, link: Link, base: str) -> None:
    """Write a link as a PEFT adapter; the stored scaling is the tuned one whatever rank is
    stored."""
    power = 0.5 if link.config.rslora else 1
    alpha = link.config.scaling * link.rank**power
    save_adapter(
        folder, link.factors, link.config, rank=link.rank, alpha=alpha, base=base, extra=link.extra
    )


def read_link(folder: Path, entry: Mapping[str, Any]) -> Link:
    """Read a link back from its PEFT adapter and its manifest entry."""
    factors, extra, _ = load_adapter(folder)
    config = link_config(**entry["config"])
    error = entry.get("error", 0.0)
    return Link(entry["index"], config, factors, extra, entry["num_steps"], error)


def _live_state_of_adapter(folder: Path, config: LinkConfig) -> dict[str, Tensor]:
    """Read a checkpoint of version 0.1, whose live link is stored as an adapter."""
    factors, extra, _ = load_adapter(folder)
    rank, state = config.rank, {f"extra/{path}": weight for path, weight in extra.items()}
    for name, found in factors.items():  # a PiSSA link stores what it started from behind itself
        parts: dict[str, Tensor | None] = {"A": found.a[:rank]}
        parts |= {"B": found.b[:, :rank].contiguous()}
        parts |= {"bias": found.bias, "magnitude": found.magnitude}
        state |= {f"{key}/{name}": part for key, part in parts.items() if part is not None}
    return state


def describe_link(link: Link) -> dict[str, Any]:
    """Return a link's manifest entry: enough, with its adapter, to read it back."""
    return {
        "index": link.index,
        "directory": f"links/{link.index:03d}",
        "rank": link.rank,
        "scaling": link.config.scaling,
        "num_steps": link.num_steps,
        "error": link.error,
        "config": link.config.model_dump(mode="json"),
    }


def _science(config: RunConfig) -> dict[str, Any]:
    """The part of a config that decides the weights: not where it is written, where rows of a task
    lie, who watches."""
    tree = config.model_dump(exclude={"output": True, "data": {"dir"}})
    for key in ("trackers", "save_every"):
        tree["train"].pop(key)
    return tree


def _swap(scratch: Path, target: Path) -> None:
    for file in scratch.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if target.exists():
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        scratch.rename(target)
