"""The structure, held: which way dependencies run, who may import what, how long the heart may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import chainlora

PACKAGE = Path(chainlora.__file__).parent

# From the bottom up; a module imports from its own layer's earlier entries or from lower layers, never upwards.
LAYERS = [
    ["errors"],
    ["wording"],
    ["config", "linalg", "matmul", "schedule", "packing"],
    ["adapters", "pristine", "models", "gguf_models", "tasks", "metrics", "packed_attention", "fast_lora", "fused"],
    ["starts", "data", "generation"],
    ["forward"],
    ["chain", "losses", "speedups", "lanes"],
    ["likelihood"],
    ["evaluate", "store"],
    ["prepare", "export", "inspection", "plots", "plan", "optimizers", "measures"],
    ["running"],
    ["selection", "steps"],
    ["scoring", "training"],
    ["methods"],
    ["experiments"],
    ["progress", "demo"],
    ["cli_common"],
    ["cli_experiments"],
    ["cli"],
    ["__main__"],
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def modules() -> dict[str, Path]:
    return {
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path
        for path in PACKAGE.rglob("*.py")
    }


def imports(path: Path) -> set[str]:
    """Top-level names of chainlora modules and of packages that a file imports, wherever in the file."""
    found = set()
    inside = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.add((node.module or "").split(".")[0])
            elif node.level == len(inside):  # from the package's root
                found |= (
                    {f".{node.module.split('.')[0]}"} if node.module else {f".{a.name}" for a in node.names}
                )
    return found


def test_every_module_has_a_place():
    tops = {name.split(".")[0] for name in modules()} - {"__init__"}
    assert tops - set(HEIGHT) == set()


def test_dependencies_run_one_way():
    wrong = []
    for name, path in modules().items():
        top = name.split(".")[0]
        if top == "__init__":
            continue
        for imported in imports(path):
            other = imported[1:]
            if imported.startswith(".") and other in HEIGHT and other != top and HEIGHT[other] > HEIGHT[top]:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_only_adapters_imports_peft():
    assert {name.split(".")[0] for name, path in modules().items() if "peft" in imports(path)} == {"adapters"}


def test_nothing_pickles_or_runs_remote_code():
    for name, path in modules().items():
        assert "pickle" not in imports(path), name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in (("torch", "load"), ("torch", "save")), name
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), name
                assert node.value.value is False, name


def test_the_heart_is_read_in_one_sitting():
    assert len((PACKAGE / "chain.py").read_text().splitlines()) < 300


def test_help_needs_no_tensor_library():
    code = (
        "import sys; from chainlora.cli import run; run(['--help']); run(['train', '--help']);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft', 'matplotlib', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_the_public_names_load():
    for name in chainlora.__all__:
        assert getattr(chainlora, name) is not None
