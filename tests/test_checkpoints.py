import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from contrastive_diffusion import checkpoints
from contrastive_diffusion.errors import RunError


def test_what_is_saved_is_loaded(tmp_path):
    tensors = {"a": torch.randn(3, 2), "step": torch.tensor(7), "b": torch.tensor([1.0], dtype=torch.float64)}
    meta = {"recipe": {"x": [1, 2.5, None, "é"]}, "step": 7}
    checkpoints.save(tmp_path / "deep" / "c.safetensors", tensors, meta)
    loaded, found = checkpoints.load(tmp_path / "deep" / "c.safetensors")
    assert found == meta
    assert loaded.keys() == tensors.keys()
    assert all(loaded[k].equal(v) and loaded[k].dtype == v.dtype for k, v in tensors.items())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["c.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    checkpoints.save(path, {"a": torch.ones(1)}, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="expected to write there: No space left on device; free space"):
        checkpoints.save(path, {"a": torch.zeros(1)}, {})
    assert float(checkpoints.load(path)[0]["a"]) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="expected to write there"):
        checkpoints.save(tmp_path / "file" / "c.safetensors", {}, {})


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was executed",))


@pytest.mark.parametrize("kind", ["truncated", "empty", "pickle", "json", "foreign", "missing", "folder"])
def test_broken_and_foreign_files_are_one_line(tmp_path, kind):
    path = tmp_path / "c.safetensors"
    checkpoints.save(path, {"a": torch.randn(100)}, {})
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(_Bomb()))
    elif kind == "json":
        path.write_text(json.dumps({"a": 1}))
    elif kind == "foreign":
        save_file({"a": torch.ones(1)}, path)
    elif kind == "missing":
        path.unlink()
    else:
        path = tmp_path
    with pytest.raises(ValueError, match=r"given .*, expected") as caught:
        checkpoints.load(path)
    assert "\n" not in str(caught.value)
