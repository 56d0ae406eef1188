"""The structure, held: rooms, which way dependencies run, what is public, who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import chainlora
from chainlora import errors, reports

PACKAGE = Path(chainlora.__file__).parent
LAB = PACKAGE.with_name("chainlora_lab")

# Public beside the names of `chainlora` itself, and all that the lab uses (docs/python.md).
PUBLIC = {
    "chainlora": set(chainlora.__all__),
    "chainlora.errors": {name for name in vars(errors) if name.endswith("Error")} | {"nearest"},
    "chainlora.reports": set(reports.__all__),
    "chainlora.config.reading": {"read_tree", "set_key"},
    "chainlora.config.staging": {"need_apart"},
    "chainlora.cli.common": {"WithKeys", "file_and_overrides", "keys_argument", "quiet"},
    "chainlora.data.splits": {"check_files"},
    "chainlora.models.finding": {"resolve_model"},
    "chainlora.evaluation.metrics": {"is_higher_better"},
    "chainlora.training.objectives": {"check_names"},
    "chainlora.training.progress": {"console_of_bars", "console_on_stderr"},
    "chainlora.registry": {"plugin_digest"},
}

# From the bottom up. A room imports from itself and from rooms before it, never from one behind it.
ROOMS = [
    "errors",
    "files",
    "registry",
    "config",
    "models",
    "chain",
    "knots",
    "data",
    "engine",
    "runs",
    "evaluation",
    "reports",
    "board",
    "training",
    "integrations",
    "cli",
    "__main__",
]


def imports() -> Iterator[tuple[str, str, str]]:
    """Yield (file, its room, module it imports), wherever in the file the import stands."""
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((str(path), room, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: imports are absolute"
                yield str(path), room, node.module or ""


def test_dependencies_run_one_way():
    ours = [
        (file, room, module.split(".")[1])
        for file, room, module in imports()
        if module.startswith("chainlora.")
    ]
    upwards = [
        each
        for each in ours
        if each[1] != "__init__" and ROOMS.index(each[2]) > ROOMS.index(each[1])
    ]
    assert upwards == []


def test_the_lab_uses_public_names_alone_and_is_used_by_none():
    inside = []
    # a training loop and an optimizer, made of what ours are made of
    rivals = {LAB / "loops.py", LAB / "rac_lora.py", LAB / "relora.py"}
    for path in {*LAB.rglob("*.py")} - rivals:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                inside += [
                    alias.name for alias in node.names if alias.name.startswith("chainlora.")
                ]
            elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "chainlora":
                known = PUBLIC.get(node.module, set())
                inside += [f"{node.module}.{n.name}" for n in node.names if n.name not in known]
    assert inside == []
    assert [file for file, _, module in imports() if module.startswith("chainlora_lab")] == []


def test_every_file_lives_in_a_room_and_the_root_is_small():
    tops = [
        path.stem
        for path in PACKAGE.iterdir()
        if path.name not in ("__pycache__", "__init__.py", "py.typed")
    ]
    assert set(tops) <= set(ROOMS)
    assert len(list(PACKAGE.glob("*.py"))) <= 5


def test_only_adapters_imports_peft():
    found = {
        Path(file).parent.name for file, _, module in imports() if module.split(".")[0] == "peft"
    }
    assert found == {"adapters"}


def test_nothing_pickles_or_runs_remote_code():
    assert not [file for file, _, module in imports() if module.split(".")[0] == "pickle"]
    for path in [*PACKAGE.rglob("*.py"), *LAB.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in (("torch", "load"), ("torch", "save")), (
                    path
                )
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


def test_help_needs_no_tensor_library():
    code = (
        "import sys; from chainlora.cli import run; run(['--help']); run(['compare', '--help']);"
        "heavy = ('torch', 'transformers', 'peft', 'matplotlib', 'numpy', 'datasets');"
        "sys.exit(any(m in sys.modules for m in heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_a_module_name_is_used_once():
    paths = [*PACKAGE.rglob("*.py"), *LAB.rglob("*.py")]
    names = [path.stem for path in paths if not path.stem.startswith("__")]
    assert len(names) == len(set(names))
