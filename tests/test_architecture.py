"""The structure, held: rooms, which way dependencies run, what is public, who may import what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chainlora
import chainlora_pages
from chainlora import errors

SOURCES = Path(chainlora.__file__).parents[1]
PACKAGE = SOURCES / "chainlora"
DEPENDENTS = tuple(f"chainlora_{name}" for name in ("fast", "trainer", "gguf", "pages", "lab"))
# The files of this package that find them by name, when something asks for them.
FINDERS = {"__init__.py", "cli/common.py", "engine/engine.py"}
FINDERS |= {"models/finding.py", "runs/exported.py"}

# Public beside the names of `chainlora` itself (docs/python.md).
PUBLIC = {
    "chainlora": set(chainlora.__all__),
    "chainlora.errors": {name for name in vars(errors) if name.endswith("Error")} | {"nearest"},
    "chainlora.cli.common": {
        *("WithKeys", "file_and_overrides", "json_option", "keys_argument", "need_run", "quiet"),
        *("show", "to_stderr"),
    },
    "chainlora.config.reading": {"read_config", "read_tree", "set_key"},
    "chainlora.config.staging": {"make_stages"},
    "chainlora.data.splits": {"check_files"},
    "chainlora.evaluation.metrics": {"is_higher_better"},
    "chainlora.models.finding": {"resolve_model"},
    "chainlora.registry": {"load_plugins", "plugin_digest"},
    "chainlora.runs.paths": {"exists_in", "is_run", "need_apart", "refuse_older", "split_address"},
    "chainlora.showing": {"number"},
    "chainlora.training.objectives": {"check_names"},
    "chainlora.training.progress": {"console_of_bars", "console_on_stderr", "duration"},
}


def modules(names: str) -> dict[str, set[str]]:
    """Return modules of chainlora of which every public name may be used."""
    return {f"chainlora.{name}": {"*"} for name in names.split()}


# Modules that one package of this repository uses beside that: a change there is a change here.
MORE: dict[str, dict[str, set[str]]] = {
    "chainlora_fast": modules(
        "data.examples engine.fast_path engine.float32 engine.matmul engine.packing "
        "engine.patching engine.probes models.modes models.shards models.text_config"
    ),
    "chainlora_trainer": modules(
        "chain.adapters chain.chain chain.link config.messages config.schema files "
        "knots.driver knots.moments knots.numbers knots.policy models.finding models.modes "
        "runs.addresses runs.cards runs.export runs.loading_start runs.saved_chain "
        "training.processes"
    ),
    "chainlora_gguf": modules(
        "chain.adapters chain.link data.templates errors files models.checkpoint "
        "models.identity models.loading registry runs.addresses runs.apart runs.cards "
        "runs.export runs.lineage runs.opening runs.state"
    ),
    "chainlora_pages": modules(
        "config.data config.reading config.schema config.staging config.yaml_text "
        "data.encoding.encoder data.encoding.tokens data.examples data.readers "
        "data.row_warnings data.rows data.sources data.splits data.tasks models.finding "
        "data.templates errors evaluation.answers evaluation.generation training.updating "
        "evaluation.stage_scores evaluation.training_rows files models.text_config "
        "runs.addresses runs.cards runs.changes runs.draft runs.entries runs.exported "
        "runs.history runs.history_file runs.inspection runs.locks runs.opening runs.paths "
        "runs.pruning runs.records runs.state"
    ),
    "chainlora_lab": {
        "chainlora.config.data": {"DataConfig", "Home"},
        "chainlora.config.schema": {"PAIR_LOSSES", "with_flat_model"},
        "chainlora.data.sources": {"FileSource", "HubSource", "find_file"},
        "chainlora.data.splits": {"reported_of"},
        "chainlora.data.tasks": {"Task"},
        "chainlora.files": {"make_folder", "write_text"},
        "chainlora.knots.numbers": {"BREAK_EVEN"},
        "chainlora_pages": set(chainlora_pages.__all__),
    },
}
# training loops, optimizers and ways to merge, made of what ours are made of
_RIVALS = ("loops", "rac_lora", "relora", "in_turn", "sequences", "ways/merging")
RIVALS = {SOURCES / "chainlora_lab" / f"{name}.py" for name in _RIVALS}

# From the bottom up. A room imports from itself and from rooms before it, never from one behind it.
ROOMS = ["errors", "files", "showing", "registry", "config", "models", "chain", "knots", "data"]
ROOMS += ["engine", "runs", "evaluation", "training", "cli", "__main__"]


def imports() -> Iterator[tuple[Path, str, str]]:
    """Yield (file, its room, module it imports), wherever in the file the import stands."""
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        yield from ((path, room, module) for module, _ in imported(path))


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what a file imports; the name of a whole module is empty."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)


def test_dependencies_run_one_way():
    upwards = []
    for file, room, module in imports():
        if module.startswith("chainlora.") and room != "__init__":
            is_above = ROOMS.index(module.split(".")[1]) > ROOMS.index(room)
            upwards += [f"{file}: {module}"] if is_above else []
    assert upwards == []


@pytest.mark.parametrize("package", DEPENDENTS)
def test_a_package_on_this_one_uses_known_names_alone(package):
    unknown = []
    for path in {*(SOURCES / package).rglob("*.py")} - RIVALS:
        for module, name in imported(path):
            if module.startswith("chainlora") and module.split(".")[0] != package:
                whole = f"{module}.{name}"
                known = PUBLIC.get(module, set()) | MORE[package].get(module, set())
                is_known = {name, "*"} & known or whole in MORE[package]
                unknown += [] if is_known else [whole]
    assert unknown == []


def test_this_package_imports_none_that_depend_on_it():
    found = [(file, room) for file, room, module in imports() if module.startswith(DEPENDENTS)]
    assert [file for file, room in found if room != "__init__"] == []  # there for type checkers
    naming = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and str(node.value).startswith(DEPENDENTS)
    }
    assert naming == FINDERS


def private_names(package: str) -> tuple[set[str], set[str]]:
    """Return the names with a leading underscore that a package defines, and those it reads."""
    defined, read = set[str](), set[str]()
    for path in (SOURCES / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Attribute):
                (read if isinstance(node.ctx, ast.Load) else defined).add(node.attr)
    return tuple({n for n in names if re.match("_[^_]", n)} for names in (defined, read))


def test_no_package_uses_a_private_name_of_another():
    names = {package: private_names(package) for package in ("chainlora", *DEPENDENTS)}
    for package, (own, read) in names.items():
        others = set().union(*(names[other][0] for other in names if other != package))
        assert (read - own) & others == set(), package
        for path in (SOURCES / package).rglob("*.py"):
            foreign = [x for x in imported(path) if x[0].split(".")[0] in {*names} - {package}]
            assert not [x for x in foreign if "._" in ".".join(x)], path


def test_every_file_lives_in_a_room_and_the_root_is_small():
    tops = {path.stem for path in PACKAGE.iterdir()} - {"__pycache__", "__init__", "py"}
    assert tops <= {*ROOMS}
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_only_adapters_imports_peft():
    found = {file.parent.name for file, _, module in imports() if module.split(".")[0] == "peft"}
    assert found == {"adapters"}


def test_nothing_pickles_or_runs_remote_code():
    assert not [file for file, _, module in imports() if module.split(".")[0] == "pickle"]
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert f"{node.value.id}.{node.attr}" not in ("torch.load", "torch.save"), path
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


def test_importing_the_package_and_its_help_need_no_library_that_takes_time():
    code = (
        "import sys; from chainlora.cli import run; run(['--help']); run(['compare', '--help']);"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'numpy', 'datasets', 'pydantic'};"
        "assert not heavy & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


def test_a_module_name_is_used_once():
    names = [path.stem for path in SOURCES.rglob("*.py") if not path.stem.startswith("__")]
    assert len(names) == len(set(names))
