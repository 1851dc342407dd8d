"""Four top-level folders are one import package, and its lists are complete."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("cli", "compressors", "configs", "recipes")
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "accelerate", "numpy", "matplotlib")


@pytest.fixture(scope="module")
def setuptools() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["tool"]["setuptools"]
    return table


def answer(code: str, folder: Path) -> Any:
    """Run code in a fresh Python in another folder; return what it prints as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_every_package_is_listed(setuptools):
    """A package that is not listed is missing from the wheel only."""
    inner = [
        ".".join(("lrc", *path.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    ]
    assert len(inner) > 8
    assert setuptools["packages"] == sorted(["lrc", *inner])


def test_every_folder_with_code_is_a_package():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_every_imported_package_is_declared():
    found = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {each.name.split(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None, f"{path} imports by a relative name"
                found.add(node.module.split(".")[0])
    names = {"yaml": "pyyaml", "compressed_tensors": "compressed-tensors", "lm_eval": "lm-eval"}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {re.split(r"[<>=\[ ]", each)[0] for each in listed}
    # Triton comes with PyTorch for CUDA; the others import lrc, or lrc waits for their import.
    optional = {"triton", "peft", "vllm"}
    others = found - sys.stdlib_module_names - {"lrc"} - optional
    assert {names.get(name, name) for name in others} <= declared


def test_no_two_modules_have_one_name():
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    names = Counter(path.stem for path in paths if path.stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []


def test_every_data_file_is_listed(setuptools):
    listed = {
        path
        for package, patterns in setuptools["package-data"].items()
        if package != "lrc"
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    present = {
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert present == listed
    assert (ROOT / ".package/lrc/py.typed").is_file()


def test_every_folder_is_linked_into_the_package(setuptools):
    package = ROOT / ".package/lrc"
    assert setuptools["package-dir"] == {
        "lrc": ".package/lrc",
        **{f"lrc.{folder}": folder for folder in FOLDERS},
    }
    for folder in FOLDERS:
        assert (package / folder).resolve() == ROOT / folder
        assert not Path(package / folder).readlink().is_absolute()


def test_no_part_is_a_global_name(tmp_path):
    code = (
        "import importlib.util, json;"
        f"print(json.dumps([n for n in {FOLDERS} if importlib.util.find_spec(n)]))"
    )
    assert answer(code, tmp_path) == []
    assert not set(FOLDERS) & set(sys.modules)


def test_importing_lrc_loads_nothing_heavy(tmp_path):
    code = f"import json, sys, lrc; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    assert answer(code, tmp_path) == []


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(tmp_path, arguments):
    code = f"""
import json, sys
from lrc.cli.main import main
sys.argv = ["lrc", *{arguments}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print()
print(json.dumps([m for m in {HEAVY} if m in sys.modules]))
"""
    assert answer(code, tmp_path) == []


def test_the_command_is_installed():
    (entry,) = metadata.entry_points(group="console_scripts", name="lrc")
    assert entry.value == "lrc.cli.main:main"
    assert entry.dist is not None
    assert entry.dist.name == "lrc-compress"


def test_the_loader_can_be_imported_first() -> None:
    """It imports the registry, which imports the loader while that is half initialized."""
    code = (
        "from lrc.compressors.checkpoint.quantizer import LrcQuantizer\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert AUTO_QUANTIZER_MAPPING['lrc'] is LrcQuantizer"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
