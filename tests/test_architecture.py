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
    "chainlora.training.progress": {"console_of_bars", "console_on_stderr"},
}
# What one package of this repository uses beside that: a change there is a change here.
MORE: dict[str, dict[str, set[str]]] = {
    "chainlora_fast": {
        "chainlora.data.examples": {"Example"},
        "chainlora.engine.fast_path": {"FastPath", "Item", "PACKED", "Result"},
        "chainlora.engine.float32": {"computing_in_float32", "widened"},
        "chainlora.engine.matmul": {"add_product_", "is_slow", "linear", "product"},
        "chainlora.engine.packing": {
            *("PackedBatch", "Segment", "fresh_tokens", "input_sequences", "paths"),
        },
        "chainlora.engine.patching": {"Patches", "installed", "is_foreign", "replacement"},
        "chainlora.engine.probes": {
            *("Calls", "FAR", "Facts", "Limits", "UNLIMITED", "first_line", "forget_lengths"),
            *("packing_limits", "probe_batch", "probing", "relative_difference"),
        },
        "chainlora.models.modes": {"in_mode"},
        "chainlora.models.shards": {"whole"},
        "chainlora.models.text_config": {"base_model", "text_config"},
    },
    "chainlora_trainer": {
        "chainlora": {"files"},
        "chainlora.chain.adapters": {
            *("get_dropouts", "num_trained", "put_in", "read_settings", "read_trained"),
            *("redirect", "set_dropouts", "take_off"),
        },
        "chainlora.chain.chain": {"Chain"},
        "chainlora.chain.link": {"Link"},
        "chainlora.config.messages": {"problems"},
        "chainlora.config.schema": {"ChainConfig", "KnotConfig", "LinkConfig"},
        "chainlora.knots.driver": {"Knots", "check_policy"},
        "chainlora.knots.moments": {"unknown_moments"},
        "chainlora.knots.numbers": {
            *("Numbers", "Spacing", "Spacings", "asks_for_tokens", "between", "some_of"),
            "spacings",
        },
        "chainlora.knots.policy": {"Knot", "KnotPolicy"},
        "chainlora.models.finding": {"folder_of"},
        "chainlora.models.modes": {"kept_random_state"},
        "chainlora.runs.addresses": {"open_run"},
        "chainlora.runs.cards": {"is_of_another"},
        "chainlora.runs.export": {"adapter_factors", "write_adapter", "write_adapter_card"},
        "chainlora.runs.loading_start": {"NOTHING", "Start", "load_start", "put_on"},
        "chainlora.runs.saved_chain": {
            *("INSIDE", "current_links", "describe_base", "read_chain", "restore_chain"),
            "write_chain",
        },
        "chainlora.training.processes": {"Processes", "find_processes", "num_launched"},
    },
    "chainlora_gguf": {
        "chainlora": {"files"},
        "chainlora.chain.adapters": {"Factors"},
        "chainlora.chain.link": {"Link", "switched_on"},
        "chainlora.data.templates": {"ends_of_turn", "render_chat"},
        "chainlora.errors": {"explained"},
        "chainlora.files": {"make_folder", "remove_scratch", "replaced_folder", "reported"},
        "chainlora.models.checkpoint": {"Checkpoint", "save_model"},
        "chainlora.models.identity": {"cache_dir", "hash_file"},
        "chainlora.models.loading": {"open_folder"},
        "chainlora.registry": {"import_optional"},
        "chainlora.runs.addresses": {"Address", "open_run"},
        "chainlora.runs.apart": {"taken_apart", "write_sheet"},
        "chainlora.runs.cards": {
            *("Card", "Naming", "UNNAMED", "public_name", "story_of", "write_card"),
        },
        "chainlora.runs.export": {
            *("adapter_factors", "check_compression", "copy_licences", "empty_folder"),
            *("export_merged", "filled_folder"),
        },
        "chainlora.runs.lineage": {"Target", "lineage_of"},
        "chainlora.runs.opening": {"tokenizer_of"},
        "chainlora.runs.state": {"OpenState"},
    },
    "chainlora_pages": {
        "chainlora": {"files"},
        "chainlora.config.data": {"DataConfig"},
        "chainlora.config.reading": {"flatten"},
        "chainlora.config.schema": {"PAIR_LOSSES", "RunConfig"},
        "chainlora.config.staging": {"check_name", "name_of_rows"},
        "chainlora.config.yaml_text": {"dump_yaml"},
        "chainlora.data.encoding.tokens": {"TokenReader"},
        "chainlora.data.readers": {"is_rows"},
        "chainlora.data.rows": {"MemoryRows", "Rows"},
        "chainlora.data.sources": {"FileSource", "SUFFIXES", "find_source"},
        "chainlora.data.splits": {"prepare_splits"},
        "chainlora.data.tasks": {"load_task"},
        "chainlora.data.templates": {"ends_of_turn"},
        "chainlora.errors": {"printable"},
        "chainlora.evaluation.answers": {"Prompt", "Said", "Source", "answer", "prompts_of"},
        "chainlora.evaluation.generation": {"Decoding", "Message", "Speaker"},
        "chainlora.evaluation.stage_scores": {
            *("Cell", "HARM", "Scorer", "StageMatrix", "shades_of", "stage_matrix"),
            "states_of",
        },
        "chainlora.evaluation.training_rows": {
            *("RowFacts", "answer_limit", "config_of", "divided_by", "training_rows"),
        },
        "chainlora.files": {"make_folder", "reported", "write_bytes", "write_text"},
        "chainlora.models.text_config": {"context_length"},
        "chainlora.runs.addresses": {"begun_stage", "open_run", "state_at"},
        "chainlora.runs.cards": {"public_name"},
        "chainlora.runs.changes": {"MATRIX", "redo", "undo"},
        "chainlora.runs.draft": {"DRAFT", "Progress", "drafts_in"},
        "chainlora.runs.history": {"BASE", "COMBINED", "History", "MAIN", "RECORDS", "START"},
        "chainlora.runs.history_file": {"read_history"},
        "chainlora.runs.inspection": {"inspect_run"},
        "chainlora.runs.locks": {"is_held"},
        "chainlora.runs.opening": {"chain_on_base", "tokenizer_of"},
        "chainlora.runs.paths": {"HISTORY", "stage_folder"},
        "chainlora.runs.exported": {"exporter_to"},
        "chainlora.runs.records": {"Record", "of_event", "score_names"},
        "chainlora.runs.state": {"OpenState"},
    },
    "chainlora_lab": {
        "chainlora.config.data": {"DataConfig", "Home"},
        "chainlora.config.schema": {"PAIR_LOSSES", "with_flat_model"},
        "chainlora.data.sources": {"FileSource", "HubSource", "find_file"},
        "chainlora.data.splits": {"reported_of"},
        "chainlora.data.tasks": {"Task"},
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
                known = PUBLIC.get(module, set()) | MORE[package].get(module, set())
                unknown += [f"{module}.{name}"] if name not in known else []
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
