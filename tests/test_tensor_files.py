"""Files of weights: a network's parts. (What is in a file: test_vae.py.)"""
import json

import pytest
import torch
from vaes import safetensors

from configurator import UserError
from tensor_files import parts_of, read_safetensors


def test_parts_of_a_network(tmp_path):
    """A file; a folder's only file; those in its index, not others beside them."""
    for i in range(3):
        (tmp_path / f"model-{i}.safetensors").write_bytes(safetensors({f"w{i}": torch.full((2,), float(i))}))
    one = tmp_path / "model-1.safetensors"
    assert parts_of(str(one)) == [one] and len(parts_of(tmp_path)) == 3
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w0": "model-0.safetensors", "w1": "model-1.safetensors", "v1": "model-1.safetensors"}}))
    assert [path.name for path in parts_of(tmp_path)] == ["model-0.safetensors", "model-1.safetensors"]
    assert read_safetensors(one)["w1"].tolist() == [1, 1]
    one.unlink()
    with pytest.raises(UserError, match="lacks 1 of its 2 files: model-1.safetensors"):
        parts_of(tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match="index.json is damaged: it lists no files"):
        parts_of(tmp_path)
    with pytest.raises(UserError, match="there are no weights .*nowhere: a .safetensors file, or a folder with such files, is wanted"):
        parts_of(tmp_path / "nowhere")
