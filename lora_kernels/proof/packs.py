"""The file that carries compiled kernels: how it is laid out, written, and read with mistrust.

An xz-compressed tar archive: ``manifest.json``, then of each kernel its cubin and Triton's own
description of it. Whatever the file holds, reading it writes nothing, takes bounded memory, and
raises `PackError` or gives kernels that Triton's cache can hold.
"""

from __future__ import annotations

import io
import json
import keyword
import lzma
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = "lora_kernels pack 1"
# Several times what a pack of everything has.
MOST_PACKED = 64 << 20
MOST_UNPACKED = 512 << 20
MOST_TO_DECOMPRESS = 128 << 20  # what lzma may take for its dictionary
# Of the description: the key, and where files lie, are the machine's own.
LOCAL = ("hash", "extern_libs")


class PackError(ValueError):
    """A pack that is damaged, or none; says which file and what is wrong with it."""


class Packed(NamedTuple):
    """One compiled kernel.

    Attributes:
        kernel: the kernel's function, with its module.
        code: Triton's hash of that function's source and of all that it calls.
        source, options: Triton's hashes of what was compiled, code included, and how.
        cubin: the machine code.
        metadata: Triton's description of it.
    """

    kernel: str
    code: str
    source: str
    options: str
    cubin: bytes
    metadata: dict[str, Any]

    @property
    def stem(self) -> str:
        """Its files' name in Triton's cache, without the ending."""
        return self.kernel.rpartition(".")[2][:150]


def write(
    kernels: Sequence[Packed], capability: tuple[int, int], versions: dict[str, str]
) -> bytes:
    """The bytes of a pack of these kernels; equal for equal ones."""
    manifest = {
        "format": FORMAT,
        "capability": list(capability),
        **versions,
        "kernels": [[one.kernel, one.code, one.source, one.options] for one in kernels],
    }
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        add("manifest.json", json.dumps(manifest, indent=1).encode())
        for index, one in enumerate(kernels):
            add(f"{index}/{one.stem}.cubin", one.cubin)
            add(f"{index}/{one.stem}.json", json.dumps(one.metadata).encode())
    return lzma.compress(plain.getbuffer(), check=lzma.CHECK_SHA256, preset=3)


def read(path: Path) -> tuple[dict[str, Any], list[Packed]]:
    """The manifest and the kernels of a pack, all of it looked at, nothing written.

    Raises:
        PackError: it is damaged or no pack, or larger than packs are.
        OSError: it cannot be read.
    """
    try:
        return _parse(_unpacked(path))
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        raise PackError(f"{path} is no pack, or it is damaged: {error}") from None
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise PackError(f"{path} is damaged: {str(error)[:300]}") from None


def _unpacked(path: Path) -> bytes:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_PACKED:
            raise ValueError(f"it has more than {MOST_PACKED} bytes, which no pack has")
        packed = file.read(size)
    unpacker = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MOST_TO_DECOMPRESS)
    plain = unpacker.decompress(packed, max_length=MOST_UNPACKED + 1)
    if len(plain) > MOST_UNPACKED:
        raise ValueError(f"it unpacks to more than {MOST_UNPACKED} bytes, which no pack does")
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("it ends too early, or something follows its end")
    return plain


def _parse(plain: bytes) -> tuple[dict[str, Any], list[Packed]]:
    contents: dict[str, bytes] = {}
    # Members are read by name and never extracted: no path of theirs is a path here.
    with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
        for member in archive:
            # A sparse one would read as many zeros as it says.
            plainly = member.isreg() and not member.issparse()
            file = archive.extractfile(member) if plainly else None
            if file is None or member.name in contents:
                raise ValueError(f"{member.name[:200]!r} is no plain file, or is there twice")
            contents[member.name] = file.read()
    manifest = json.loads(contents.pop("manifest.json", b"null"))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"its manifest is not that of a {FORMAT!r}")
    major, minor = (_whole(number) for number in manifest["capability"])
    for name in ("triton", "ptxas", "environment"):
        if not isinstance(manifest[name], str):
            raise ValueError(f"{name} in its manifest is no text")
    kernels = []
    for index, (kernel, code, source, options) in enumerate(manifest["kernels"]):
        if not _KERNEL.fullmatch(kernel) or not all(
            _HASH.fullmatch(text) for text in (code, source, options)
        ):
            raise ValueError(f"kernel {index} of its manifest is not named as kernels are")
        one = Packed(kernel, code, source, options, b"", {})
        cubin = contents.pop(f"{index}/{one.stem}.cubin")
        metadata = json.loads(contents.pop(f"{index}/{one.stem}.json"))
        _look_at(one.stem, cubin, metadata, major * 10 + minor)
        kernels.append(one._replace(cubin=cubin, metadata=metadata))
    if contents:
        raise ValueError(f"{next(iter(contents))[:200]!r} is not in its manifest")
    return manifest, kernels


_KERNEL = re.compile(r"[A-Za-z_]\w{0,99}(\.[A-Za-z_]\w{0,149}){1,9}", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}")


def _whole(number: Any) -> int:
    if not isinstance(number, int) or not 0 <= number < 100:
        raise ValueError(f"a capability of {str(number)[:50]}")
    return number


def _look_at(stem: str, cubin: bytes, metadata: Any, arch: int) -> None:
    """Refuse what Triton would stumble over when it finds this in its cache."""
    if not cubin.startswith(b"\x7fELF"):
        raise ValueError(f"{stem}.cubin is no machine code")
    target = {"backend": "cuda", "arch": arch, "warp_size": 32}
    if not isinstance(metadata, dict) or metadata.get("target") != target:
        raise ValueError(f"{stem}.json does not describe a kernel for sm_{arch}")
    if metadata.get("name") != stem or not isinstance(metadata.get("shared"), int):
        raise ValueError(f"{stem}.json does not describe {stem}")
    odd = [n for n in metadata if not n.isidentifier() or keyword.iskeyword(n) or n[0] == "_"]
    if odd or any(name in metadata for name in LOCAL):
        raise ValueError(f"{stem}.json has names that do not belong there")
