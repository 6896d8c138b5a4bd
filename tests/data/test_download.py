"""Downloads, from files of this machine: no test touches the network."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from fastgen.cli import main
from fastgen.data import DATASETS, DataError, download
from fastgen.data.remote import REMOTE_FILES, RemoteFile, bits_of_amat


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """remote(content, checksum): the data set "mnist" is one file with that content."""

    def serve(content: bytes, checksum: str | None = None) -> Path:
        source = tmp_path / "source.bin"
        source.write_bytes(content)
        checksum = checksum or hashlib.md5(content).hexdigest()
        file = RemoteFile(source.as_uri(), "mnist/file.bin", checksum)
        monkeypatch.setitem(REMOTE_FILES, "mnist", (file,))
        return source

    return serve


def test_a_file_is_fetched_once(tmp_path, remote):
    source, lines = remote(b"pixels"), []
    root = tmp_path / "new" / "root"
    (path,) = download("mnist", root, lines.append)
    assert path == root / "mnist/file.bin" and path.read_bytes() == b"pixels"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    source.unlink()
    assert download("mnist", root, lines.append) == [path]
    assert len(lines) == 2 and lines[1].endswith("is there")


def test_a_wrong_checksum_leaves_nothing(tmp_path, remote):
    remote(b"other", hashlib.md5(b"pixels").hexdigest())
    with pytest.raises(DataError, match="gave another file than it should: its checksum is"):
        download("mnist", tmp_path / "root")
    assert not list(tmp_path.glob("root/**/*.*"))


def test_no_network(tmp_path, remote):
    remote(b"pixels").unlink()
    with pytest.raises(DataError, match="cannot be fetched .*put it at .*root/mnist/file.bin"):
        download("mnist", tmp_path / "root")


def test_a_folder_that_cannot_be_made(tmp_path, remote):
    remote(b"pixels")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        download("mnist", tmp_path / "file")


def test_bits_are_checked_whatever_the_spaces():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (3, 784), np.uint8)
    digest = REMOTE_FILES["binarized-mnist"][0].digest
    texts = [
        b"".join(space.join(b"%d" % bit for bit in row) + b"\n" for row in bits)
        for space in (b" ", b"  ")
    ]
    assert np.array_equal(bits_of_amat(texts[0]), bits)
    expected = hashlib.sha256(np.packbits(bits, axis=1).tobytes()).hexdigest()
    assert digest(texts[0]) == digest(texts[1]) == expected


def test_every_checksum_is_one():
    for name, files in REMOTE_FILES.items():
        assert name in DATASETS
        for file in files:
            assert len(bytes.fromhex(file.checksum)) in (16, 32)
            assert file.url.startswith("http") and not file.path.startswith("/")


def test_the_command(tmp_path, remote, monkeypatch, capsys):
    monkeypatch.delenv("FASTGEN_DATA", raising=False)
    remote(b"pixels")
    assert main(["download", "mnist", "--data-root", str(tmp_path / "root")]) == 0
    assert (tmp_path / "root/mnist/file.bin").exists()
    capsys.readouterr()
    assert main(["download", "mnist"]) == 2
    assert "no data folder is set" in capsys.readouterr().err
    assert main(["download", "faces", "--data-root", str(tmp_path)]) == 2
    assert "'faces' cannot be downloaded; these can: mnist, " in capsys.readouterr().err
