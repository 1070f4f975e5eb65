"""The story is the import order: a module imports only modules further left."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import contrastive_diffusion

ROOT = Path(contrastive_diffusion.__file__).parent
ORDER = [
    "errors", "files", "channel", "schedules", "denoisers", "likelihood", "objectives", "nets", "data", "training", "solvers", "sampling", "combinators",
    "parallel", "metrics", "checkpoints", "evaluation", "recipes", "runs", "experiments", "report", "cli",
]  # fmt: skip
ALONE = {"nets", "metrics"}  # import nothing of the package
NO_TORCH = ("cli", "errors", "report")


def _module(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Package modules that a file imports anywhere, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("contrastive_diffusion.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("contrastive_diffusion"):
            assert node.module is not None
            found |= {f"{node.module}.{name.name}" for name in node.names} if node.module == "contrastive_diffusion" else {node.module}
    return {name.split(".")[1] for name in found} - {"__version__"}


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def test_every_module_has_its_place():
    assert {_module(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_the_left(path):
    module = _module(path)
    allowed = set() if module in ALONE else set(ORDER[: ORDER.index(module)])
    assert _imports(path) - {module} <= allowed


@pytest.mark.parametrize("module", NO_TORCH)
def test_reports_and_the_command_line_need_no_torch(module):
    code = f"import sys, contrastive_diffusion.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_help_imports_no_torch():
    code = "import sys; from contrastive_diffusion.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "experiment" in result.stdout


def test_the_package_says_nothing_while_it_is_imported():
    modules = ";".join(f"import contrastive_diffusion.{name}" for name in ORDER)
    result = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", modules], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
