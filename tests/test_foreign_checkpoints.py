"""Foreign checkpoints: converted to the last bit, refused by name when hostile, never executed."""

import collections
import contextlib
import json
import os
import pickle
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from contrastive_diffusion.checkpoints import convert, diffusers, foreign, inspect, pickles
from contrastive_diffusion.checkpoints.model import Card, Model
from contrastive_diffusion.errors import RunError, UsageError
from contrastive_diffusion.nets.spec import FAMILIES, ImageNet

SOURCE = "raise SystemExit('the source of a module was executed')"
SMALL = {"resolution": 8, "channels": 1, "width": 16, "mult": (1, 2), "blocks": 1, "attention": (4,)}
NETS = {
    "ddpm++": ImageNet("ddpm++", **SMALL, label_dim=3, augment_dim=9, dropout=0.13),
    "ncsn++": ImageNet("ncsn++", **SMALL),
    "vp": ImageNet("ddpm++", **SMALL, precondition="vp"),
    "ve": ImageNet("ncsn++", **SMALL, precondition="ve"),
}
DDPM = ImageNet("ddpm", 16, 3, width=32, mult=(1, 2), blocks=1, attention=(8,))
CLASSES = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond"}


class Persistent:
    """Pickles as the persistent classes of EDM do: one function, one dictionary, the module's source in it."""

    def __init__(self, class_name: str, state: dict):
        self.meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def _persistent(module: nn.Module, name: str, **attributes) -> object:
    """A module as its pickled form, children and all."""
    children = collections.OrderedDict((k, _persistent(m, type(m).__name__)) for k, m in module._modules.items() if m is not None)
    if isinstance(module, nn.ModuleDict):
        holder = nn.ModuleDict()
        holder.__dict__["_modules"] = children
        return holder
    state = {k: v for k, v in module.__dict__.items() if k.startswith("_") and k != "_modules" and "hook" in k}
    own = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers), "_modules": children, "training": False}
    return Persistent(name, {**state, **own, "_non_persistent_buffers_set": set(), **attributes})


@pytest.fixture(autouse=True)
def persistence(monkeypatch):
    """The names a pickle refers to; loading them for real would fail the test."""
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = lambda meta: pytest.fail("a pickle was loaded for real")  # pyright: ignore
    module._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    module._reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


def _snapshot(path: Path, spec: ImageNet, protocol: int = 4, whole: bool = True) -> nn.Module:
    torch.manual_seed(1)
    net = spec.build()
    song = FAMILIES[spec.kind]
    options = {
        "img_resolution": spec.resolution, "img_channels": spec.channels, "label_dim": spec.label_dim, "model_type": "SongUNet",
        "embedding_type": song["embedding"], "encoder_type": song["encoder"], "decoder_type": song["decoder"], "resample_filter": list(song["taps"]),
        "channel_mult_noise": song["channel_mult_noise"], "model_channels": spec.width, "channel_mult": list(spec.mult), "num_blocks": spec.blocks,
        "attn_resolutions": list(spec.attention), "augment_dim": spec.augment_dim, "dropout": spec.dropout, "use_fp16": False,
    }  # fmt: skip
    ema = _persistent(net, CLASSES[spec.precondition], _init_args=(), _init_kwargs=options, sigma_data=np.float64(0.5))
    content = {"ema": ema, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {"max_size": 3}} if whole else ema
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return net


@pytest.mark.parametrize("name", NETS)
def test_edm_pickles_convert_bit_for_bit(name, tmp_path):
    spec = NETS[name]
    net = _snapshot(tmp_path / "net.pkl", spec)
    card = convert(tmp_path / "net.pkl", tmp_path / "out")
    model = Model.from_pretrained(tmp_path / "out")
    assert model.card.net == spec
    own, loaded = net.state_dict(), model.net.state_dict()
    assert list(own) == list(loaded)
    assert all(v.equal(loaded[k]) for k, v in own.items())
    assert "NC-SA" in card["licence"]
    assert len(card["source"]["sha256"]) == 64
    y, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0])
    with torch.no_grad():
        assert model.net(y, sigma).equal(net.eval()(y, sigma))
    # And once more: a model folder converts to itself.
    convert(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").stat().st_size > 0
    again = Model.from_pretrained(tmp_path / "again").net.state_dict()
    assert all(v.equal(again[k]) for k, v in own.items())


@pytest.mark.parametrize("protocol", [2, 3, 5])
@pytest.mark.parametrize("whole", [True, False])
def test_pickles_of_other_protocols_and_bare_networks(protocol, whole, tmp_path):
    net = _snapshot(tmp_path / "net.pkl", NETS["ncsn++"], protocol, whole)
    convert(tmp_path / "net.pkl", tmp_path / "out")
    loaded = Model.from_pretrained(tmp_path / "out").net.state_dict()
    assert all(v.equal(loaded[k]) for k, v in net.state_dict().items())


class Bomb:
    """Runs ``command`` when a pickle is loaded for real."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_hostile_pickles_are_refused_by_name_and_never_run(tmp_path):
    canary = tmp_path / "canary"
    touch = f"touch {canary}"
    hostile = {
        "posix.system": Bomb(os.system, touch),
        "builtins.eval": {"ema": [Bomb(eval, f"open({str(canary)!r}, 'w')")]},
        "builtins.getattr": Bomb(getattr, os, "system"),
        "builtins.exec": Persistent("EDMPrecond", {"_parameters": {"w": Bomb(exec, f"open({str(canary)!r}, 'w')")}}),
    }
    for name, content in hostile.items():
        path = tmp_path / "hostile.pkl"
        try:
            path.write_bytes(pickle.dumps(content))
        except TypeError:  # getattr(os, ...) holds a module, which does not pickle: write it by hand
            path.write_bytes(b"\x80\x04cbuiltins\ngetattr\n(cos\nsystem\n)tR.")
        with pytest.raises(UsageError, match=name.replace(".", r"\.")) as caught:
            pickles.read(path)
        assert "\n" not in str(caught.value)
        assert not canary.exists()
        assert name in inspect(path)["names"] or name == "builtins.getattr"


def test_no_allowed_name_can_be_turned_against_the_reader(tmp_path):
    """Each is called with a bomb's bytes and other nonsense, built upon, and instantiated; nothing runs and nothing is left changed."""
    canary, path = tmp_path / "canary", tmp_path / "hostile.pkl"
    bomb = pickle.dumps(Bomb(os.system, f"touch {canary}"))
    before = dict(pickles.NAMES)

    def data(b: bytes) -> bytes:
        return b"B" + struct.pack("<I", len(b)) + b

    for module, name in pickles.NAMES:
        for payload in (data(bomb), b"N", b"K\x05", b"}", b"(lN.", b"(" + data(bomb) * 4 + b"t", b"]" + data(bomb) + b"a"):
            for opcodes in (b"(%bto", b"%b\x85R", b"%bb", b"%b\x85\x81", b"(%btR}(X\x08\x00\x00\x00__call__Nub"):
                opcodes = b"(" + b"%b" + b"tR" if opcodes == b"(%bto" else opcodes
                path.write_bytes(b"\x80\x04c" + f"{module}\n{name}\n".encode() + opcodes.replace(b"%b", payload) + b".")
                with contextlib.suppress(UsageError):
                    pickles.read(path)
                assert not canary.exists()
    assert before == pickles.NAMES
    _snapshot(path, NETS["ncsn++"])
    convert(path, tmp_path / "out")  # and the reader still works


def test_nested_storage_is_read_by_the_weights_only_loader(tmp_path):
    class Nested:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Bomb(os.system, f"touch {tmp_path / 'canary'}")),)

    (tmp_path / "nested.pkl").write_bytes(pickle.dumps({"ema": Nested()}))
    with pytest.raises(UsageError, match="a nested storage that is not plain"):
        pickles.read(tmp_path / "nested.pkl")
    assert not (tmp_path / "canary").exists()


def test_ddpm_state_dicts_convert(tmp_path, monkeypatch):
    torch.manual_seed(2)
    net = DDPM.build()
    torch.save(net.state_dict(), tmp_path / "model-790000.ckpt")
    with pytest.raises(UsageError, match="add --weights ema or raw"):
        convert(tmp_path / "model-790000.ckpt", tmp_path / "out")
    with pytest.raises(UsageError, match="add --resolution"):
        convert(tmp_path / "model-790000.ckpt", tmp_path / "out", "ema")
    convert(tmp_path / "model-790000.ckpt", tmp_path / "out", "ema", resolution=16)
    model = Model.from_pretrained(tmp_path / "out")
    assert (model.card.net, model.card.weights) == (ImageNet(**{**DDPM.__dict__, "dropout": 0.0}), "ema")
    assert all(v.equal(model.net.state_dict()[k]) for k, v in net.state_dict().items())
    # The published files are told apart by their content.
    monkeypatch.setitem(foreign.PUBLISHED, foreign._md5(tmp_path / "model-790000.ckpt"), "raw")
    assert convert(tmp_path / "model-790000.ckpt", tmp_path / "raw", resolution=16)["weights"] == "raw"


def test_the_published_ddpm_network_is_known_from_its_shapes():
    with torch.device("meta"):
        tensors = ImageNet("ddpm", 32, 3, blocks=2, dropout=0.1).build().state_dict()
    assert foreign.ddpm_net("x", tensors) == ImageNet("ddpm", 32, 3, blocks=2, dropout=0.1)


@pytest.mark.parametrize("old", [False, True], ids=["to_q", "query"])
def test_diffusers_folders_round_trip(old, tmp_path):
    torch.manual_seed(3)
    net = DDPM.build()
    diffusers.write(tmp_path / "theirs", DDPM, net.state_dict(), old_names=old)
    convert(tmp_path / "theirs", tmp_path / "ours")
    model = Model.from_pretrained(tmp_path / "ours")
    assert model.card.net == DDPM
    assert all(v.equal(model.net.state_dict()[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("old", [False, True], ids=["to_q", "query"])
def test_diffusers_computes_the_same(old, tmp_path):
    theirs = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    net = DDPM.build().eval()
    diffusers.write(tmp_path / "theirs", DDPM, net.state_dict(), old_names=old)
    unet = theirs.UNet2DModel.from_pretrained(tmp_path / "theirs", low_cpu_mem_usage=False).eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 500.5])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t).sample, net(x, t), rtol=1e-4, atol=1e-5)
    unet.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "ours")
    assert all(v.equal(net.state_dict()[k]) for k, v in Model.from_pretrained(tmp_path / "ours").net.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos = True, not False"),
        ({"downsample_padding": 1}, "downsample_padding = 1, not 0"),
        ({"down_block_types": ["SkipDownBlock2D"]}, "block SkipDownBlock2D"),
        ({"attention_head_dim": 8}, r"attention_head_dim = 8, not null"),
    ],
)
def test_other_unets_of_diffusers_are_refused(change, message, tmp_path):
    diffusers.write(tmp_path / "u", DDPM, DDPM.build().state_dict())
    config = json.loads((tmp_path / "u" / "config.json").read_text()) | change
    (tmp_path / "u" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        convert(tmp_path / "u", tmp_path / "out")


def _saved(tmp_path: Path, spec: ImageNet = NETS["ncsn++"]) -> Path:
    Model(Card(spec, (-8.0, 12.0), "ema", "MIT", {})).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_dim": 3}, r"model.map_label.weight is missing; .*one is class-conditional and the other is not"),
        ({"augment_dim": 9}, "one takes augmentation labels and the other does not"),
        ({"kind": "ddpm++"}, "one is DDPM\\+\\+ and the other NCSN\\+\\+"),
        ({"width": 32}, r"is \(.*\), not \(.*\).*more.*widths differ"),
        ({"blocks": 2}, "levels, blocks or attention differ"),
    ],
)
def test_a_checkpoint_for_another_architecture_lists_keys_and_the_likely_cause(change, message, tmp_path):
    folder = _saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["net"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message) as caught:
        Model.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_broken_files_are_one_line(tmp_path, monkeypatch):
    folder = _saved(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UsageError, match="truncated"):
        Model.from_pretrained(folder)
    (folder / "config.json").write_text('{"format": "contrastive-diffusion-model", "version": 1}')
    with pytest.raises(UsageError, match="a whole model card"):
        Model.from_pretrained(folder)
    assert inspect(folder / "model.safetensors")["kind"] == "a truncated safetensors file"
    for name, content, kind in (("a", b"", "an unknown kind"), ("b", b"\x80\x04N.", "a pickle of something else"), ("c", whole[:200], "truncated")):
        (tmp_path / name).write_bytes(content)
        assert kind in inspect(tmp_path / name)["kind"]
        with pytest.raises(UsageError, match="cdl inspect"):
            convert(tmp_path / name, tmp_path / "out")
    _snapshot(tmp_path / "net.pkl", NETS["ncsn++"])
    (tmp_path / "net.pkl").write_bytes((tmp_path / "net.pkl").read_bytes()[:-500])
    with pytest.raises(UsageError, match="a whole pickle"):
        convert(tmp_path / "net.pkl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="No space left on device; free space"):
        _saved(tmp_path / "full")


def test_models_go_to_the_hub_and_come_back(tmp_path, monkeypatch):
    """With the hub's client replaced: what is uploaded is a whole model folder, and its id is downloaded again."""
    import shutil

    import huggingface_hub

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return types.SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / "hub")
            return "uploaded"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", lambda filename, **_: str(tmp_path / "hub" / filename))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    model = Model.from_pretrained(_saved(tmp_path))
    model.push_to_hub("someone/net")
    assert {p.name for p in (tmp_path / "hub").iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    assert "library_name: contrastive-diffusion" in (tmp_path / "hub" / "README.md").read_text()
    again = Model.from_pretrained("someone/net")
    assert again.card == model.card
    assert all(v.equal(again.net.state_dict()[k]) for k, v in model.net.state_dict().items())


def test_the_adm_network_of_imagenet_is_named(tmp_path):
    content = {"ema": Persistent("EDMPrecond", {"_init_kwargs": {"model_type": "DhariwalUNet"}, "_parameters": {}})}
    (tmp_path / "adm.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UsageError, match="'DhariwalUNet', expected SongUNet"):
        convert(tmp_path / "adm.pkl", tmp_path / "out")


def test_a_model_is_a_denoiser_with_and_without_labels(tmp_path):
    model = Model.from_pretrained(_saved(tmp_path, NETS["ddpm++"]))
    z, level = torch.randn(3, 1, 8, 8), torch.tensor([-9.0, 0.0, 20.0])
    with torch.no_grad():
        for p in model.parameters():  # a fresh network's last layers are almost zero
            p.add_(0.1)
        assert model(z, level).shape == z.shape
        one, two = model.denoiser(torch.eye(3)[:1])(z, level), model.denoiser(torch.eye(3))(z, level)
    assert torch.allclose(one[0], two[0], atol=1e-5)
    assert not torch.allclose(one[1], two[1], atol=1e-3)
    assert Model.from_pretrained(_saved(tmp_path / "b")).shape == (1, 8, 8)
