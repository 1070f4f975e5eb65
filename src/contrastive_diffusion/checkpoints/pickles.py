"""Reads pickles of EDM networks without executing them.

Such a file rebuilds every module by running the source text stored in it. Here each name that may occur stands for something inert: a record
of the state, a dictionary, a tensor read by torch's weights-only loader. Any other name ends the reading, and is told.
"""

import hashlib
import io
import pickle
import pickletools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contrastive_diffusion.errors import UsageError, require


class Record:
    """A module that was not built: ``state`` is its attributes, ``class_name`` and the hash of its source where the file has them."""

    __slots__ = ("class_name", "source_hash", "state")

    def __init__(self, class_name: str = "", source_hash: str = "", state: Any = None):
        self.class_name, self.source_hash, self.state = class_name, source_hash, state

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Plain(dict):
    """A dictionary whose attributes, if a file gives it some, are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    """The name of a numpy dtype."""

    __slots__ = ("name",)

    def __init__(self, name: Any = "", *_: Any):
        self.name = str(name)

    def __setstate__(self, state: Any) -> None:
        pass


def _persistent(meta: Any) -> Record:
    _ask(isinstance(meta, dict) and isinstance(meta.get("class_name"), str), "a module record with a class name")
    source = meta.get("module_src")
    digest = hashlib.sha256(source.encode()).hexdigest() if isinstance(source, str) else ""
    return Record(meta["class_name"], digest, meta.get("state"))


def _storage(blob: Any) -> Any:
    _ask(isinstance(blob, bytes), "the bytes of a tensor")
    try:
        storage = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here; all mean that the bytes are no plain storage
        raise UsageError(f"given a nested storage that is not plain ({_first_line(error)}), expected tensor data") from error
    _ask(isinstance(storage, torch.storage.TypedStorage), "tensor data")
    raw = storage._untyped_storage  # the public accessors warn
    return torch.empty(0, dtype=storage.dtype).set_(raw, 0, (raw.nbytes() // storage.dtype.itemsize,), (1,))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    _ask(isinstance(storage, Tensor) and isinstance(size, tuple) and isinstance(stride, tuple), "tensor data")
    _ask(len(size) == len(stride) and all(isinstance(v, int) and v >= 0 for v in (offset, *size, *stride)), "tensor shapes")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else -1
    _ask(last < len(storage), "tensors that lie within their storage")
    return storage.as_strided(size, stride, offset).clone().contiguous()


def _scalar(dtype: Any, raw: Any) -> Any:
    _ask(isinstance(dtype, _Dtype) and dtype.name in ("f2", "f4", "f8", "i4", "i8", "u1", "b1") and isinstance(raw, bytes), "a numpy number")
    _ask(len(raw) == np.dtype(dtype.name).itemsize, "a numpy number")
    return np.frombuffer(raw, dtype.name)[0].item()


def _encode(text: Any, encoding: Any) -> bytes:
    _ask(isinstance(text, str) and encoding == "latin1", "latin1 text")
    return text.encode("latin1")


def _ask(condition: bool, expected: str) -> None:
    if not condition:
        raise UsageError(f"given something else, expected {expected}")


# Every name a file may use. A class where the pickle makes instances, else a function in a holder that cannot be written to.
NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): Plain,
    ("dnnlib.util", "EasyDict"): Plain,
    ("torch.nn.modules.container", "ModuleDict"): Record,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): lambda items=(): set(items),
    ("__builtin__", "set"): lambda items=(): set(items),
}


class _Holder:
    """Calls a function; takes no state."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise UsageError("given state for a function, expected none")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = NAMES.get((module, name))
        if known is None:
            raise UsageError(f"given the name {module}.{name}, expected only the names of EDM networks; nothing was executed")
        # A fresh class for each file: nothing a file does can outlive it.
        return type(known.__name__, (known,), {"__slots__": ()}) if isinstance(known, type) else _Holder(known)

    def persistent_load(self, pid: Any) -> Any:
        raise UsageError("given a reference to outside data, expected none")


def read(path: Path) -> Any:
    """The content of a pickle, its modules as ``Record``. Raises ``UsageError`` with the first name that is not allowed."""
    try:
        with open(path, "rb") as file:
            return _Unpickler(file).load()
    except UsageError as error:
        raise UsageError(f"given {path}, expected a pickled EDM network: {error}") from error
    except Exception as error:  # a broken pickle can raise anything
        raise UsageError(
            f"given {path}, expected a whole pickle of an EDM network ({_first_line(error)}); it is truncated or of another kind"
        ) from error


def names(path: Path) -> list[str]:
    """Every global name in a pickle, in order, without loading it; stops quietly where the file is broken."""
    found: dict[str, None] = {}
    memo: dict[int, Any] = {}
    pushed: list[Any] = []  # the last values; only strings matter
    try:
        with open(path, "rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    found[str(argument).replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL":
                    found[".".join(map(str, pushed[-2:]))] = None
                if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                    memo[len(memo) if opcode.name == "MEMOIZE" else int(argument or 0)] = pushed[-1] if pushed else None
                else:
                    pushed = [*pushed[-1:], memo.get(int(argument or 0)) if opcode.name in ("GET", "BINGET", "LONG_BINGET") else argument]
    except Exception:  # what was seen before is still worth telling
        pass
    return list(found)


def tensors(record: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Named parameters and persistent buffers of a module record, in the order of ``state_dict``."""
    require(isinstance(record, Record) and isinstance(record.state, dict), f"{prefix or 'the network'} of type {type(record).__name__}", "a module")
    state = record.state
    hidden = state.get("_non_persistent_buffers_set") or ()
    for group in ("_parameters", "_buffers"):
        for name, value in (state.get(group) or {}).items():
            if isinstance(value, Tensor) and not (group == "_buffers" and name in hidden):
                yield prefix + name, value
    for name, child in (state.get("_modules") or {}).items():
        if child is not None:
            yield from tensors(child, f"{prefix}{name}.")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
