"""A safetensors file that says what its tensors are, and is the same whenever it is written.

The checksum lies in the metadata, where other readers pass over it: the SHA-256 of every tensor's
name, dtype, shape and bytes, in the order of the names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

CHECKSUM = "lora_kernels.sha256"


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of these tensors, on the CPU."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if tensor.numel():
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            found.update(flat.numpy().data)
    return found.hexdigest()


def refuse_other_bytes(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the metadata have a checksum, and the tensors another."""
    said = metadata.get(CHECKSUM)
    if said is not None and said != checksum(tensors):
        raise ValueError(
            "its tensors are not those that its checksum is of: it is damaged, or was changed "
            "by a program that kept the metadata; fetch it again, or save it anew"
        )


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A ``.safetensors`` file with a checksum, the same bytes for the same contents.

    Source: https://huggingface.co/docs/safetensors, the format: eight bytes of the header's length,
    the header, padded with spaces to a multiple of eight, and the tensors.
    """
    content = safetensors.torch.save(dict(tensors), {**metadata, CHECKSUM: checksum(tensors)})
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    # The library writes the metadata in the order of a hash table's, which no two runs share.
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `to_bytes`."""
    path.write_bytes(to_bytes(tensors, metadata))
