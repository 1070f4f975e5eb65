"""TorchScript modules from files that are not trusted: their operators are read from the archive before anything of it runs.

A TorchScript archive holds its code as text, which may run while the archive is loaded (``__setstate__``). That text may call torch's operators
only, none of which touches files, processes or Python. Plain Python pickles are refused: reading one may execute anything.
"""

import ast
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from contrastive_diffusion.errors import UsageError, require

# torch has two operators that open files; what else is not arithmetic is refused by its namespace.
FORBIDDEN = {"save", "load", "from_file", "PythonOp", "IgnoredPythonOp", "IgnoredPython"}
NAMESPACES = {"aten", "prim", "prims", "quantized"}
PACKAGES = {"jit", "nn", "nested", "fft", "linalg", "special", "sparse"}  # parts of torch whose operators are aten's


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_torchscript(path: Path) -> torch.jit.ScriptModule:
    """The module in a TorchScript archive, on the CPU, in evaluation mode. Raises ``UsageError`` for any other file, and for operators it may not call."""
    require(path.is_file(), f"extractor {path}", "an existing TorchScript file")
    check_code(path)
    try:
        module = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(f"given extractor {path}, expected a whole TorchScript archive: {' '.join(str(error).split())[:160]}") from error
    for name in _operators(module):
        _allow(name.split("::"), path)
    return module


def check_code(path: Path) -> None:
    """Reads the code of an archive, without loading it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            code = {name: archive.read(name).decode() for name in names if "/code/" in name and name.endswith(".py")}
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, RuntimeError) as error:
        raise UsageError(
            f"given extractor {path}, expected a TorchScript archive, not a Python pickle; export it with torch.jit.script(...).save"
        ) from error
    todo = "nothing was executed; export the module with torch.jit.script(...).save"
    require(code, f"extractor {path} without TorchScript code: a Python pickle, reading which may execute anything", "a TorchScript archive", todo)
    require(len(names) == len(set(names)), f"extractor {path} with two files of one name", "each name once", "nothing was executed")
    for name, text in code.items():
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise UsageError(
                f"given extractor {path} with code in {name} that is no TorchScript, expected plain TorchScript; nothing was executed"
            ) from error
        for chain in _chains(tree):
            _allow(chain, path)


def _chains(tree: ast.AST) -> Iterator[list[str]]:
    """Names joined by dots, as lists; of operators only those of torch and ops matter."""
    for node in ast.walk(tree):
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            yield [node.id, *reversed(names)]


def _allow(chain: list[str], path: Path) -> None:
    """Raises unless the operator may be called: of torch's own namespaces, and none of those that leave the process."""
    name = ".".join(chain)
    refused = (
        (chain[0] == "ops" and len(chain) > 1 and chain[1] not in NAMESPACES)
        or (chain[0] in ("ops", "torch", *NAMESPACES) and not FORBIDDEN.isdisjoint(chain))
        or (chain[0] == "torch" and len(chain) > 2 and chain[1] not in PACKAGES)
        or chain[:3] == ["__torch__", "torch", "classes"]
    )
    todo = "nothing was executed; an extractor is arithmetic on its input"
    require(not refused, f"extractor {path}, which calls {name}", "torch's operators without files, Python or classes of other libraries", todo)


def _operators(module: Any) -> set[str]:
    """The operators in the graphs of a loaded module's methods."""
    graphs = [part._c._get_method(name).graph for part in module.modules() for name in part._c._method_names()]
    return {kind for graph in graphs for kind in (node.kind() for node in _nodes(graph)) if "::" in kind}


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)
