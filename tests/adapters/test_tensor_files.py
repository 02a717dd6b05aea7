"""Files of tensors: read piece by piece, and nothing outside of their directory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lora_kernels.adapters.tensor_files import LazyTensors, read_checkpoint, read_pickled


def shards(directory, names=("a.safetensors", "b.safetensors"), save=save_file):
    state = {"x": torch.arange(4.0), "y": torch.ones(2, 2)}
    for (key, tensor), name in zip(state.items(), names, strict=True):
        save({key: tensor}, directory / name)
    return state, {"weight_map": dict(zip(state, names, strict=True))}


@pytest.mark.parametrize(
    ("index", "names", "save"),
    [
        ("model.safetensors.index.json", ("a.safetensors", "b.safetensors"), save_file),
        ("pytorch_model.bin.index.json", ("a.bin", "b.bin"), torch.save),
    ],
)
def test_pieces_are_one_mapping(tmp_path, index, names, save):
    state, content = shards(tmp_path, names, save)
    (tmp_path / index).write_text(json.dumps(content))
    read = read_checkpoint(tmp_path)
    assert sorted(read) == ["x", "y"]
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_where_there_is_no_checkpoint(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    assert read_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"x": "../x.safetensors"}}, "names '../x.safetensors', expected a file"),
        ({"weight_map": {"x": 3}}, "names 3, expected a file"),
        (
            {"weight_map": {"x": "gone.safetensors"}},
            "gone.safetensors is a link that leads nowhere",
        ),
        ({"weight_map": ["a.safetensors"]}, "index.json cannot be read"),
        ([], "index.json cannot be read"),
    ],
)
def test_a_strange_index_is_refused(tmp_path, content, message):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path)


def test_a_piece_that_is_a_link_out_is_not_followed(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    (inside / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="outside the directory"):
        read_checkpoint(inside)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(8.0), "y": torch.ones(8)}, path)
    lazy = LazyTensors(path)
    with open(path, "r+b") as file:  # the last tensor's bytes, after the file has been opened
        file.seek(-32, 2)
        file.write(b"\0" * 32)
    assert len(lazy) == 2 and lazy["y"].tolist() == [0.0] * 8
    with pytest.raises(KeyError):
        lazy["z"]


def test_a_pickle_of_the_older_kind_is_read_too(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"x": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert read_pickled(path)["x"].tolist() == [1.0] * 3
