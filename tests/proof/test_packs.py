"""The file that carries kernels: what is written is read, and nothing else is."""

from __future__ import annotations

import io
import json
import lzma
import random
import tarfile
import tracemalloc

import pytest

from lora_kernels.proof import packs
from lora_kernels.proof.packs import Packed, PackError

METADATA = {
    "name": "sum_kernel",
    "shared": 0,
    "target": {"backend": "cuda", "arch": 90, "warp_size": 32},
    "num_warps": 4,
}
CODE = b"\x7fELF" + bytes(range(256)) * 20
KERNELS = [
    Packed("room.sums.sum_kernel", "c" * 64, f"{number:064x}", "0" * 64, CODE, METADATA)
    for number in range(3)
]
VERSIONS = {"triton": "3.9.0", "ptxas": "release 13", "environment": ""}


@pytest.fixture
def pack(tmp_path):
    path = tmp_path / "kernels.pack"
    path.write_bytes(packs.write(KERNELS, (9, 0), VERSIONS))
    return path


def refusal(path):
    with pytest.raises(PackError) as refused:
        packs.read(path)
    text = str(refused.value)
    assert str(path) in text and len(text) < 1000 and "\n" not in text
    return text


def members(path):
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def repack(path, contents, extra=()):
    """Write the pack anew from contents by name, and members as they are."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra:
            archive.addfile(member, io.BytesIO(b"0" * member.size))
    path.write_bytes(lzma.compress(plain.getvalue()))


def changed_manifest(path, change):
    contents = members(path)
    manifest = json.loads(contents["manifest.json"])
    manifest = change(manifest) or manifest
    repack(path, contents | {"manifest.json": json.dumps(manifest).encode()})


def test_what_is_written_is_read(pack):
    manifest, kernels = packs.read(pack)
    assert kernels == KERNELS
    assert manifest["capability"] == [9, 0]
    assert {name: manifest[name] for name in VERSIONS} == VERSIONS
    assert packs.write(KERNELS, (9, 0), VERSIONS) == pack.read_bytes()
    repack(pack, members(pack))  # the tests' own way of writing one is as good
    assert packs.read(pack) == (manifest, KERNELS)


def test_a_pack_of_nothing_is_a_pack(tmp_path):
    path = tmp_path / "none.pack"
    path.write_bytes(packs.write([], (9, 0), VERSIONS))
    assert packs.read(path)[1] == []


def test_what_is_no_pack(tmp_path, pack):
    for content in (b"", b"kernels", b"PK\x03\x04" + b"0" * 100, lzma.compress(b"no tar" * 999)):
        pack.write_bytes(content)
        refusal(pack)
    with pytest.raises(OSError):
        packs.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        packs.read(tmp_path / "absent")


def test_a_pack_cut_short_or_with_a_wrong_byte(pack):
    whole = pack.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 50)):
        pack.write_bytes(whole[:length])
        refusal(pack)
    for place in range(0, len(whole), max(1, len(whole) // 100)):
        pack.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refusal(pack)
    pack.write_bytes(whole + b"more")
    assert "follows its end" in refusal(pack)


def test_sizes_are_bounded(pack, monkeypatch):
    size, plain = len(pack.read_bytes()), len(lzma.decompress(pack.read_bytes()))
    for name, enough in (("MOST_PACKED", size), ("MOST_UNPACKED", plain)):
        with monkeypatch.context() as patch:
            patch.setattr(packs, name, enough)
            packs.read(pack)
            patch.setattr(packs, name, enough - 1)
            assert f"more than {enough - 1} bytes" in refusal(pack)
    monkeypatch.setattr(packs, "MOST_TO_DECOMPRESS", 1 << 20)
    assert "emory" in refusal(pack)


def peak_of_refusal(path):
    tracemalloc.start()
    try:
        refusal(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_unpacks_to_more_takes_no_more_memory(pack, monkeypatch):
    pack.write_bytes(lzma.compress(bytes(64 << 20), preset=0))
    monkeypatch.setattr(packs, "MOST_UNPACKED", 1 << 20)
    assert peak_of_refusal(pack) < 24 << 20


def test_sparse_members_are_not_filled_with_zeros(pack):
    old = tarfile.TarInfo("0/sum_kernel.cubin")
    header = bytearray(old.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[483:495] = b"00400000000\0"  # the size it reads as, 64 MiB
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    newer = tarfile.TarInfo("0/sum_kernel.cubin")
    newer.pax_headers = {"GNU.sparse.size": str(64 << 20), "GNU.sparse.map": "0,0"}
    for made in (bytes(header), newer.tobuf(tarfile.PAX_FORMAT)):
        pack.write_bytes(lzma.compress(made + bytes(1024)))
        with tarfile.open(pack) as archive:
            (member,) = archive
            assert member.issparse() and len(archive.extractfile(member).read()) == 64 << 20
        assert peak_of_refusal(pack) < 24 << 20


def linked(kind, name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


STRANGE = [
    linked(tarfile.SYMTYPE, "3/sum_kernel.cubin", "/etc/passwd"),
    linked(tarfile.LNKTYPE, "3/sum_kernel.cubin", "0/sum_kernel.cubin"),
    linked(tarfile.FIFOTYPE, "pipe", ""),
    linked(tarfile.CHRTYPE, "device", ""),
    linked(tarfile.DIRTYPE, "folder", ""),
    tarfile.TarInfo("../outside"),
    tarfile.TarInfo("/tmp/outside"),
    tarfile.TarInfo("0/another.cubin"),
    tarfile.TarInfo("0/sum_kernel.cubin"),  # a second one
    tarfile.TarInfo("manifest.json"),
]


@pytest.mark.parametrize("member", STRANGE, ids=lambda member: f"{member.type}{member.name}")
def test_members_that_do_not_belong(member, pack):
    repack(pack, members(pack), [member])
    assert repr(member.name) in refusal(pack)


def test_a_member_that_claims_more_than_there_is(pack):
    plain = bytearray(lzma.decompress(pack.read_bytes()))
    end = plain.rindex(b"sum_kernel.json")
    header = tarfile.TarInfo.frombuf(bytes(plain[end - 2 : end + 510]), "utf-8", "strict")
    header.size = 1 << 40
    plain[end - 2 : end + 510] = header.tobuf(tarfile.GNU_FORMAT)
    pack.write_bytes(lzma.compress(bytes(plain)))
    refusal(pack)


@pytest.mark.parametrize("name", ["manifest.json", "0/sum_kernel.cubin", "2/sum_kernel.json"])
def test_a_member_that_is_missing(name, pack):
    contents = members(pack)
    del contents[name]
    repack(pack, contents)
    refusal(pack)


def with_kernel(*fields):
    def change(manifest):
        manifest["kernels"][0] = list(fields)

    return change


HASH = "0" * 64
MANIFESTS = {
    "no dictionary": lambda manifest: ["format"],
    "another format": lambda manifest: manifest | {"format": "lora_kernels pack 2"},
    "no triton": lambda manifest: manifest.pop("triton") and None,
    "a number for triton": lambda manifest: manifest | {"triton": 3},
    "a list for ptxas": lambda manifest: manifest | {"ptxas": []},
    "half a capability": lambda manifest: manifest | {"capability": [9]},
    "a negative capability": lambda manifest: manifest | {"capability": [-9, 0]},
    "a text for a capability": lambda manifest: manifest | {"capability": "90"},
    "another capability": lambda manifest: manifest | {"capability": [8, 0]},
    "no list of kernels": lambda manifest: manifest | {"kernels": 5},
    "kernels by name": lambda manifest: manifest | {"kernels": {"a": 1}},
    "one kernel less": lambda manifest: manifest["kernels"].pop() and None,
    "a path for a kernel": with_kernel("../../sum_kernel", HASH, HASH, HASH),
    "a path in a kernel": with_kernel("room.sums/../sum_kernel", HASH, HASH, HASH),
    "a path for a hash": with_kernel("room.sums.sum_kernel", HASH, "../" + HASH[3:], HASH),
    "a short hash": with_kernel("room.sums.sum_kernel", HASH, HASH, "0"),
    "a line end after a hash": with_kernel("room.sums.sum_kernel", HASH, HASH, HASH + "\n"),
    "a number for a hash": with_kernel("room.sums.sum_kernel", HASH, HASH, 0),
    "a field too few": with_kernel("room.sums.sum_kernel", HASH, HASH),
    "a kernel of another name": with_kernel("room.sums.other_kernel", HASH, HASH, HASH),
    "a name in no module": with_kernel("sum_kernel", HASH, HASH, HASH),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_is_wrong(name, pack):
    changed_manifest(pack, MANIFESTS[name])
    assert "damaged" in refusal(pack)


DESCRIPTIONS = {
    "no dictionary": [],
    "for another GPU": METADATA | {"target": {"backend": "cuda", "arch": 80, "warp_size": 32}},
    "for no GPU": {name: METADATA[name] for name in METADATA if name != "target"},
    "of another kernel": METADATA | {"name": "product_kernel"},
    "with no shared memory": METADATA | {"shared": None},
    "with a word of Python": METADATA | {"class": 1},
    "with a name of two words": METADATA | {"num warps": 1},
    "with a hidden name": METADATA | {"_num": 1},
    "with a key": METADATA | {"hash": HASH},
    "with a path": METADATA | {"extern_libs": [["libdevice", "/tmp/x.bc"]]},
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_that_is_wrong(name, pack):
    contents = members(pack)
    contents["1/sum_kernel.json"] = json.dumps(DESCRIPTIONS[name]).encode()
    repack(pack, contents)
    assert "sum_kernel.json" in refusal(pack)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b"NaN"])
@pytest.mark.parametrize("name", ["manifest.json", "1/sum_kernel.json"])
def test_a_text_that_is_no_json(name, text, pack):
    repack(pack, members(pack) | {name: text})
    refusal(pack)


def test_machine_code_that_is_none(pack):
    repack(pack, members(pack) | {"1/sum_kernel.cubin": b"#!/bin/sh"})
    assert "no machine code" in refusal(pack)


def test_any_other_damage_inside(pack):
    """A few bytes changed under a right checksum: refused, or kernels of the same kind."""
    plain, draw = lzma.decompress(pack.read_bytes()), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(plain)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(plain))] = draw.randrange(256)
        pack.write_bytes(lzma.compress(bytes(damaged), preset=0))
        try:
            _, kernels = packs.read(pack)
        except PackError:
            refused += 1
        else:
            assert all(kernel.cubin[:4] == b"\x7fELF" for kernel in kernels)
    assert 10 < refused < 300
