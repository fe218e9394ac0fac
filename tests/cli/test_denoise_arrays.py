"""`fastpref denoise` on damaged and hostile .npy and .npz: one line with the file's name, and no memory for them."""

import io
import random
import struct
import zipfile

import numpy as np
import pytest
import torch

from fastpref.cli.denoise import files
from fastpref.cli.denoise.files import read_array
from fastpref.cli.main import main
from fastpref.errors import InputError


@pytest.fixture(autouse=True)
def _fresh_places(_fresh_inputs):
    random.seed(torch.randint(2**31, ()).item())


def npy(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy_with(header: bytes, data=b"", version=(1, 0)) -> bytes:
    size = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + size + header + data


def archive(path, members: dict, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def changed(path, old: bytes, new: bytes):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def damaged_deflate(path):
    archive(path, {"a.npy": npy(np.random.default_rng(0).normal(size=(40, 40)))})
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)


def encrypted(path):
    archive(path, {"a.npy": npy(np.eye(4))})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # of the member, and of its entry in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def unknown_method(path):
    archive(path, {"a.npy": npy(np.eye(4))})
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, 8, 99)
    struct.pack_into("<H", content, content.index(b"PK\x01\x02") + 10, 99)
    path.write_bytes(content)


def wrong_checksum(path):
    archive(path, {"a.npy": npy(np.eye(4))}, zipfile.ZIP_STORED)
    changed(path, struct.pack("<d", 1.0), struct.pack("<d", 2.0))


GOOD = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2), }"
HOSTILE_NPZ = {
    "damaged deflate": (damaged_deflate, "cannot read in.npz: "),
    "encrypted": (encrypted, "cannot read in.npz: .*encrypted"),
    "an unknown method": (unknown_method, "cannot read in.npz: .*compression method"),
    "a wrong checksum": (wrong_checksum, "cannot read in.npz: Bad CRC-32"),
    "no .npy": ({"notes.txt": b"hello"}, "--array must name one of its arrays, found none"),
    "a folder": ({"a.npy/": b"", "b/": b""}, "--array must name one of its arrays, found none"),
    "a .npy that is none": ({"a.npy": b"hello, I am text"}, "cannot read in.npz: it holds no array of numbers"),
    "an empty .npy": ({"a.npy": b""}, "cannot read in.npz: "),
    "pickled objects": (
        {"a.npy": npy(np.array([[None]]), allow_pickle=True)},
        "cannot read a of in.npz: it holds pickled",
    ),
    "an array twice": (None, "--array must name one of its arrays, found a, a"),
    "a nested header": ({"a.npy": npy_with(b"(" * 9000)}, "cannot read in.npz: "),
    "a deeper header": ({"a.npy": npy_with(b"[" * 60_000, version=(2, 0))}, "cannot read in.npz: "),
    "a header with code": ({"a.npy": npy_with(b"__import__('os').system('touch hacked')")}, "cannot read in.npz: "),
    "a header of bytes": ({"a.npy": npy_with(b"\xff\xfe\x00{")}, "cannot read in.npz: "),
    "a header without end": ({"a.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"}, "cannot read in.npz: "),
    "a version from the future": (
        {"a.npy": npy_with(GOOD, bytes(32), version=(9, 9))},
        "cannot read in.npz: version 9.9",
    ),
    "too few bytes": ({"a.npy": npy_with(GOOD, bytes(31))}, "the header of a says 32 bytes, the archive has 31"),
    "too many bytes": (
        {"a.npy": npy_with(GOOD, bytes(1 << 20))},
        "the header of a says 32 bytes, the archive has 1048576",
    ),
    "a shape beyond all": (
        {"a.npy": npy_with(GOOD.replace(b"(2, 2)", b"(2**0, 1)").replace(b"2**0", b"9" * 30), bytes(32))},
        "the header of a says 7",
    ),
    "a negative shape": (
        {"a.npy": npy_with(GOOD.replace(b"(2, 2)", b"(-2, -2)"), bytes(32))},
        r"says shape \[-2, -2\]",
    ),
    "a shape of text": ({"a.npy": npy_with(GOOD.replace(b"(2, 2)", b"('2', 2)"), bytes(32))}, "cannot read in.npz: "),
    "another name": (
        {"scores.npy": npy(np.eye(3)), "b.npy": npy(np.eye(3))},
        "no array 'score', found scores, b; the nearest is scores",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_NPZ)
def test_a_hostile_archive_is_one_line(tmp_path, monkeypatch, capsys, recwarn, name):
    monkeypatch.chdir(tmp_path)
    make, message = HOSTILE_NPZ[name]
    if callable(make):
        make(tmp_path / "in.npz")
    elif make is None:
        with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "in.npz", "w") as file:
            file.writestr("a.npy", npy(np.eye(3)))
            file.writestr("a.npy", npy(np.eye(3)))
    else:
        archive(tmp_path / "in.npz", make)
    flags = ["--array", "score"] if name == "another name" else []
    assert main(["denoise", "in.npz", "out.npy", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("fastpref denoise: ")
    with pytest.raises(InputError, match=message):
        read_array("in.npz", "score" if flags else None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


@pytest.mark.parametrize(
    "content",
    [
        npy_with(b"(" * 9000),
        npy_with(b"{'descr': '<f8', 'fortran_order': False}"),
        npy_with(GOOD.replace(b"(2, 2)", b"(2, 10**9)").replace(b"10**9", b"1000000000"), bytes(32)),
        npy_with(GOOD.replace(b"(2, 2)", b"(-2, 2)"), bytes(32)),
        npy_with(GOOD.replace(b"'<f8'", b"[('a', '<f8')]"), bytes(32)),
        npy_with(GOOD, bytes(16)),
        b"\x93NUMPY",
        b"",
    ],
)
def test_a_hostile_npy_is_one_line(tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.npy").write_bytes(content)
    assert main(["denoise", "in.npy", "out.npy"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "in.npy" in err


def test_a_bomb_is_refused_before_it_unpacks(tmp_path, monkeypatch):
    """Zeros of 8 MB are 8 kB; what is read of them is counted."""
    monkeypatch.setattr(files, "BOMB_BYTES", 1 << 20)
    array = np.zeros((1000, 1000))
    path = archive(tmp_path / "in.npz", {"a.npy": npy(array)})
    read = []
    fill = files._fill
    monkeypatch.setattr(files, "_fill", lambda *arguments: read.append(True) or fill(*arguments))
    with pytest.raises(InputError, match=r"bytes and would unpack to 8000000: .* --max-dense 0\.0075 or more"):
        read_array(path, None, None)
    with pytest.raises(InputError, match=r"a of .*in.npz takes 0\.00745 GiB, more than --max-dense 0\.001"):
        read_array(path, None, 0.001)
    assert not read
    np.testing.assert_array_equal(read_array(path, None, 0.0075), array)
    noise = np.random.default_rng(0).normal(size=(1000, 1000))  # which packs badly, as measurements do
    archive(path, {"a.npy": npy(noise)})
    np.testing.assert_array_equal(read_array(path, None, None), noise)


def test_a_directory_that_lies_about_a_size(tmp_path):
    """The sizes in an archive's directory are the attacker's, too: no more is unpacked than the header has room for."""
    array = np.zeros((300, 300))
    for lie in (128, 10**6):
        path = archive(tmp_path / "in.npz", {"a.npy": npy(array)})
        changed(path, struct.pack("<I", len(npy(array))), struct.pack("<I", lie))
        with pytest.raises(InputError, match=r"the header of a says 720000 bytes, the archive has|Bad CRC-32"):
            read_array(path, None, None)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float64, ">f4", np.int8, bool, np.uint64])
def test_good_arrays_are_read_exactly(tmp_path, order, dtype):
    array = np.asarray(np.random.default_rng(0).integers(0, 2, size=(3, 5, 7)), dtype, order=order)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "in.npz", first=array, second=array[0])
        found = read_array(tmp_path / "in.npz", "first", None)
        assert found.dtype == array.dtype and found.flags.f_contiguous == array.flags.f_contiguous
        np.testing.assert_array_equal(found, array)
    np.save(tmp_path / "in.npy", array[0])
    np.testing.assert_array_equal(read_array(tmp_path / "in.npy", None, None), array[0])


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_random_damage_raises_nothing_else(tmp_path, ending):
    """Flipped bits, lost ends, bytes put in and taken out: an array or an InputError of one line."""
    path = tmp_path / f"in{ending}"
    if ending == ".npz":
        np.savez_compressed(path, a=np.arange(12.0).reshape(3, 4), b=np.eye(2))
    else:
        np.save(path, np.arange(12.0).reshape(3, 4))
    whole = path.read_bytes()
    refused = 0
    for _ in range(1500):
        content = bytearray(whole)
        for _ in range(random.choice([1, 1, 2, 8])):
            at = random.randrange(max(len(content), 1))
            what = random.choice(["flip", "set", "cut", "put", "end"])
            if not content:
                break
            if what == "flip":
                content[at] ^= 1 << random.randrange(8)
            elif what == "set":
                content[at] = random.choice([0, 255, 40, 39, 44])
            elif what == "cut":
                del content[at : at + random.randrange(1, 9)]
            elif what == "put":
                content[at:at] = random.randbytes(random.randrange(1, 9))
            else:
                del content[max(at, 1) :]
        path.write_bytes(content)
        try:
            array = read_array(path, "a" if ending == ".npz" else None, 0.001)
            assert array.ndim in (2, 3) and array.nbytes <= 0.001 * 2**30
        except InputError as error:
            refused += 1
            assert str(error).count("\n") == 0 and f"in{ending}" in str(error)
    assert refused > 300
