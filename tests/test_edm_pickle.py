"""EDM's trained network, read without running any of its pickle."""
import io
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill
from scripts import TINY, run
from test_start_from import small

from configurator import UserError
from edm_pickle import read_edm
from model import DisCoDiff
from start_from import start_from
from trained import load_stage1
from unet import edm_settings, from_edm

REFERENCE = Path(__file__).parent / "reference"
ADM_TINY = dict(img_resolution=16, img_channels=3, label_dim=10, model_channels=64, channel_mult=(1, 2), num_blocks=1,
                attn_resolutions=(8,))


def record(class_name, **state):
    """An object of EDM's persistence: pickled as a call of `_reconstruct_persistent_obj` with one dict."""
    made = Persistent()
    made.meta = dict(type="class", version=6, module_src="raise SystemExit('the source in the file was run')",
                     class_name=class_name, state=state)
    return made


class Persistent:
    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class Call:
    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


@pytest.fixture(autouse=True)
def torch_utils(monkeypatch):
    """EDM's package, as far as a pickle of its objects needs it."""
    persistence = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the original was called")

    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = persistence.__name__, "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)


def module_record(module, class_name=None):
    """A module of ours as EDM's program would have pickled it: every class is persistent but for ModuleDict."""
    modules = OrderedDict((name, module_record(child)) for name, child in module._modules.items())
    state = dict(training=False, _parameters=module._parameters, _buffers=OrderedDict(), _modules=modules,
                 _backward_hooks=OrderedDict())
    if isinstance(module, torch.nn.ModuleDict):
        made = torch.nn.ModuleDict()
        made.__dict__.update(state)
        return made
    return record(class_name or type(module).__name__, **state, _init_args=(), _init_kwargs=dict(dropout=0.1))


def edm_file(path, change=None, classes=("EDMPrecond", "DhariwalUNet"), **settings):
    """A file of EDM's kind around a network with the reference's weights."""
    net = DisCoDiff(num_latents=0, **{**ADM_TINY, **settings})
    net.load_state_dict({name: fill(name, p.shape) for name, p in net.state_dict().items()})
    unet = module_record(net.model, classes[1])
    unet.meta["state"]["_buffers"]["resample_filter"] = torch.ones(1, 1, 2, 2)
    ema = record(classes[0], _parameters=OrderedDict(), _buffers=OrderedDict(), _modules=OrderedDict(model=unet),
                 img_resolution=16, label_dim=10, sigma_min=0, sigma_max=float("inf"), sigma_data=0.5,
                 init_scale=np.float64(0.5), dtype=np.dtype("float32"))
    saved = dict(ema=ema, loss_fn=record("EDMLoss", P_mean=-1.2), augment_pipe=None, dataset_kwargs=dict(path="a.zip"))
    if change:
        change(saved, ema.meta["state"], unet.meta["state"])
    path.write_bytes(pickle.dumps(saved))
    return path


def test_the_network_equals_edms(tmp_path):
    """The reference's weights through such a file: D as the authors' program computed it, also with latents at step 0."""
    weights, sigma_data = read_edm(edm_file(tmp_path / "edm.pkl"))
    settings = edm_settings(weights)
    assert settings == {**ADM_TINY, "channel_mult_emb": 4} and sigma_data == 0.5
    with np.load(REFERENCE / "adm_tiny.npz") as f:
        x, sigma, D = (torch.from_numpy(f[key]) for key in ("x", "sigma", "D"))
        has, labels = torch.from_numpy(f["labels"]).max(1)
    labels[has == 0] = -1
    net = DisCoDiff(num_latents=0, **settings).eval()
    net.load_state_dict(from_edm(weights))
    disco = DisCoDiff(num_latents=3, codebook_size=5, encoder_dim=24, encoder_heads=2, encoder_layers=1, **settings).eval()
    disco.load_state_dict(from_edm(weights), strict=False)
    with torch.no_grad():
        assert (net.denoise(x, sigma, labels) - D).abs().max() < 1e-5
        z = torch.tensor([[0, 1, 2], [4, 4, 4], [1, 0, 3], [2, 2, 2]])
        assert (disco.denoise(x, sigma, labels, disco.condition(z)) - D).abs().max() < 1e-5


def bytes_of(storage, zipped=False):
    buffer = io.BytesIO()
    torch.save(storage, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def harm(saved, ema, unet):
    saved["loss_fn"] = Call(os.system, "touch harmed")


def harm_in_a_state(saved, ema, unet):
    unet["_modules"]["map_layer0"].meta["state"]["_init_kwargs"]["device"] = Call(os.system, "touch harmed")


def harm_in_a_storage(saved, ema, unet):
    """In the bytes of a weight, which are a torch file, and so a pickle."""
    evil = bytes_of(Call(os.system, "touch harmed"))
    weight(unet, evil, 0, (4,), (1,))


def weight(unet, storage, *geometry):
    tensor = Call(torch._utils._rebuild_tensor_v2, Call(torch.storage._load_from_bytes, storage), *geometry, False, OrderedDict())
    unet["_modules"]["map_layer0"].meta["state"]["_parameters"] = OrderedDict(weight=tensor)


FOUR = torch.storage.TypedStorage(wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True)


@pytest.mark.parametrize("change, message", [
    (harm, r"refers to (posix|nt)\.system, which EDM's networks do not; nothing in it was run"),
    (harm_in_a_state, r"refers to (posix|nt)\.system"),
    (lambda saved, ema, unet: saved.update(loss_fn=Call(getattr, saved, "clear")), r"refers to builtins\.getattr"),
    (harm_in_a_storage, r"not one of EDM's networks, or damaged \(UnpicklingError: .*"),
    (lambda saved, ema, unet: saved.update(loss_fn=Call(pickle.loads, b"")), r"refers to _pickle\.loads"),
    (lambda saved, ema, unet: saved.update(loss_fn=Call(eval, "1")), r"refers to builtins\.eval"),
    (lambda saved, ema, unet: saved.update(loss_fn=Call(torch.load, "x")), r"refers to torch\.serialization\.load"),
    (lambda saved, ema, unet: saved.update(loss_fn=torch.nn.Linear(1, 1)), r"refers to torch\.nn\.modules\.linear\.Linear"),
    (lambda saved, ema, unet: saved.pop("ema"), "KeyError: 'ema'"),
    (lambda saved, ema, unet: ema.pop("sigma_data"), "KeyError: 'sigma_data'"),
    (lambda saved, ema, unet: ema["_modules"].update(model=saved["loss_fn"]), "KeyError: '_parameters'"),
    (lambda saved, ema, unet: unet["_modules"].update(again=unet["_modules"]["map_layer0"]), "the same module twice"),
    (lambda saved, ema, unet: unet["_modules"].update(again=5), "a int where a module should be"),
    (lambda saved, ema, unet: unet["_parameters"].update(w=[1, 2]), "a list where a tensor should be"),
    (lambda saved, ema, unet: weight(unet, bytes_of(FOUR), 0, (8,), (1,)), "out of bounds for storage"),
    (lambda saved, ema, unet: weight(unet, bytes_of(FOUR), -1, (2,), (1,)), "storage_offset|offset"),
    (lambda saved, ema, unet: weight(unet, bytes_of(FOUR), 0, (10 ** 12,), (0,)), "larger than its storage"),
    (lambda saved, ema, unet: weight(unet, bytes_of(FOUR, zipped=True), 0, (4,), (1,)), "a storage in a zip file"),
])
def test_hostile_and_damaged_files(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        read_edm(edm_file(tmp_path / "edm.pkl", change))
    assert "\n" not in str(error.value) and not Path("harmed").exists()


def test_other_files(tmp_path):
    whole = edm_file(tmp_path / "edm.pkl").read_bytes()
    for content, message in ((b"", "EOFError"), (whole[:1000], "UnpicklingError"), (whole[:-1000], "truncated|UnpicklingError|EOFError"),
                             (b"\x80\x04" + b"(" * 10_000, "EOFError"), (b"PK\x03\x04 a zip", "UnpicklingError")):
        (tmp_path / "bad.pkl").write_bytes(content)
        with pytest.raises(UserError, match=f"bad.pkl is not one of EDM's networks, or damaged .*({message})"):
            read_edm(tmp_path / "bad.pkl")
    with pytest.raises(UserError, match="can't read .*: No such file"):
        read_edm(tmp_path / "nothing.pkl")


@pytest.mark.parametrize("classes, message", [
    (("VPPrecond", "SongUNet"), "its preconditioning is a VPPrecond"), (("VEPrecond", "SongUNet"), "its preconditioning is a VEPrecond"),
    (("iDDPMPrecond", "DhariwalUNet"), "its preconditioning is a iDDPMPrecond"), (("EDMPrecond", "SongUNet"), "its network is a SongUNet"),
    (("a\nb", "SongUNet"), "its preconditioning is a stranger")])
def test_edms_other_networks_are_named(tmp_path, classes, message):
    def others(saved, ema, unet):
        if classes[0] != "EDMPrecond":
            ema.pop("sigma_data")  # which EDM's preconditioning alone has

    with pytest.raises(UserError, match=f"{message}; only ADM's .DhariwalUNet. with EDM's preconditioning .EDMPrecond. fits") as error:
        read_edm(edm_file(tmp_path / "edm.pkl", others, classes))
    assert "\n" not in str(error.value)


def test_training_goes_on_from_it(tmp_path):
    """--init_from: before the first step the averaged network is the file's, whatever the latents; other settings are named."""
    unet = dict(img_resolution=28, img_channels=1, model_channels=8, attn_resolutions=(14,))
    path = edm_file(tmp_path / "edm.pkl", **unet)
    weights, _ = read_edm(path)
    settings = [*TINY, "--num_blocks=1", f"--init_from={path}", "--log_every=8"]
    with pytest.raises(UserError, match=r"of other settings: model_channels=8 there, 16 here$"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *settings, "--model_channels=16")
    with pytest.raises(UserError, match=r"of other settings: sigma_data=0.5 there, 0.4 here$"):
        run("train_stage1.py", f"--out_dir={tmp_path}", *settings, "--sigma_data=0.4")
    for change, message in ((lambda saved, ema, unet: unet["_modules"].pop("map_layer1"), "it has no model.map_layer1.weight$"),
                            (lambda saved, ema, unet: unet["_modules"].update(x=module_record(torch.nn.Linear(2, 2))), "it has model.x.weight, which"),
                            (lambda saved, ema, unet: unet["_modules"].pop("map_layer0"), "not a network of ADM's architecture")):
        other = edm_file(tmp_path / "other.pkl", change, **unet)
        with pytest.raises(UserError, match=message):
            run("train_stage1.py", f"--out_dir={tmp_path}", *settings, f"--init_from={other}")
    run("train_stage1.py", f"--out_dir={tmp_path / 'a'}", *settings, "--lr=1e-9", "--encoder_lr=1e-9", "--total_images=8")
    trained = torch.load(tmp_path / "a" / "stage1.pt")
    assert all((trained["ema"][name] - value).abs().max() < 1e-7 for name, value in from_edm(weights).items())
    path.unlink()  # a run that goes on does not need the file
    run("train_stage1.py", f"--out_dir={tmp_path / 'a'}", *settings, "--lr=1e-9", "--encoder_lr=1e-9", "--total_images=16")
    assert load_stage1(tmp_path / "a", "cpu")[1]["step"] == 2


FITTING = dict(img_resolution=28, img_channels=1, model_channels=8, attn_resolutions=(14,))


def test_augmentation_is_left_out(tmp_path, capsys):
    def augmented(saved, ema, unet):
        unet["_modules"]["map_augment"] = module_record(torch.nn.Linear(9, 8, bias=False), "Linear")

    path, plain = (edm_file(tmp_path / name, change, **FITTING) for name, change in (("a.pkl", augmented), ("b.pkl", None)))
    found = []
    for source in (path, plain):
        torch.manual_seed(0)
        found.append(DisCoDiff(**small()))
        start_from(source, found[-1], small())
        said = capsys.readouterr().err
        assert said == (f"{path} was trained with augmentation: its map_augment is left out; it adds nothing without augmentation\n"
                        if source == path else "")
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in found)))
