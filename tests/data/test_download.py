"""Downloads, from a server on this machine: no test touches the network."""

import errno
import hashlib
import http.server
import io
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastgen.cli import main
from fastgen.data import DATASETS, DataError, download, remote
from fastgen.data.remote import REMOTE_FILES, RemoteFile, bits_of_amat

CONTENT = bytes(range(256)) * 4
MAX_BYTES = 5000


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each request by the next name of `server.plan`, the last one for ever."""

    def do_GET(self):
        plan = self.server.plan
        self.server.asked += 1
        getattr(self, plan.pop(0) if len(plan) > 1 else plan[0])()

    def reply(self, content: bytes, length: int | None = None, status: int = 200) -> None:
        self.send_response(status)
        if length != -1:
            self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def right(self):
        self.reply(CONTENT)

    def without_length(self):
        self.reply(CONTENT, -1)

    def wrong(self):
        self.reply(CONTENT[::-1])

    def cut(self):
        self.reply(CONTENT[:100], len(CONTENT))

    def no_answer(self):
        self.close_connection = True

    def not_http(self):
        self.wfile.write(b"220 welcome\x1b\r\n")

    def silent(self):
        self.reply(CONTENT[:100], len(CONTENT))
        self.server.over.wait(10)

    def slow(self):
        self.reply(CONTENT[:1], len(CONTENT))
        for _ in range(500):
            if self.server.over.wait(0.02):
                return
            self.wfile.write(b"x")

    def long(self):
        self.reply(b"", 10**12)

    def endless(self):
        self.reply(b"", -1)
        for _ in range(1000):
            self.wfile.write(bytes(4096))

    def missing(self):
        self.reply(b"", status=404)

    def broken(self):
        self.reply(b"", status=500)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Knows its plan, how often it was asked, and when the test is over."""

    plan: list[str]
    asked = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.over = threading.Event()

    def handle_error(self, *_):
        """A client that hangs up is what some tests are about."""


@pytest.fixture
def serve(monkeypatch) -> Callable[..., Server]:
    """serve(*plan): the data set "mnist" is one file, at a server that answers so."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "_WAITS_SECONDS", (0, 0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/file.bin"
        checksum = hashlib.md5(CONTENT).hexdigest()
        file = RemoteFile(url, "mnist/file.bin", checksum, MAX_BYTES)
        monkeypatch.setitem(REMOTE_FILES, "mnist", (file,))

        def answer(*plan: str) -> Server:
            server.plan = list(plan)
            return server

        yield answer
        server.over.set()
        server.shutdown()
        thread.join()


def files_under(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("plan", ["right", "without_length"])
def test_a_file_is_fetched_once(tmp_path, serve, plan):
    server, lines = serve(plan), []
    root = tmp_path / "new" / "root"
    (path,) = download("mnist", root, lines.append)
    assert path == root / "mnist/file.bin" and path.read_bytes() == CONTENT
    assert files_under(root) == ["file.bin"]
    assert download("mnist", root, lines.append) == [path]
    assert len(lines) == 2 and lines[1].endswith("is there") and server.asked == 1


FAULTS = ["cut", "no_answer", "not_http", "broken", "silent", "slow"]


@pytest.fixture
def impatient(monkeypatch, fault):
    """Only where it is tested: on a busy machine other answers may take their time."""
    monkeypatch.setattr(remote, "_SILENCE_SECONDS", 0.5 if fault == "silent" else 30)
    monkeypatch.setattr(remote, "_WINDOW_SECONDS", 0.2 if fault == "slow" else 60)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_is_tried_again(tmp_path, serve, impatient, fault):
    server, lines = serve(fault, fault, "right"), []
    (path,) = download("mnist", tmp_path / "root", lines.append)
    assert path.read_bytes() == CONTENT
    assert files_under(tmp_path / "root") == ["file.bin"]
    assert server.asked == 3 and len(lines) == 3
    assert all(line.endswith("; again in 0 s") for line in lines[1:])


@pytest.mark.parametrize(
    ("fault", "asked", "message"),
    [
        ("cut", 3, "it ended after 100 of 1024 bytes; tried 3 times"),
        ("no_answer", 3, "the connection failed: .*tried 3 times"),
        ("not_http", 3, "the connection failed: 220 welcome.x1b; tried 3 times"),
        ("silent", 3, "the connection failed: timed out; tried 3 times"),
        ("slow", 3, "less than 2000 bytes/s came; tried 3 times"),
        ("broken", 3, "HTTP status 500 Internal Server Error; tried 3 times"),
        ("missing", 1, "HTTP status 404 Not Found"),
        ("long", 1, "it has 1000000000000 bytes, more than 5000"),
        ("endless", 1, "it has .* and more bytes, more than 5000"),
    ],
)
def test_a_fetch_that_fails_is_one_line(tmp_path, serve, impatient, fault, asked, message):
    server = serve(fault)
    with pytest.raises(DataError, match=message) as caught:
        download("mnist", tmp_path / "root", lambda line: None)
    text = str(caught.value)
    assert "/file.bin cannot be fetched (" in text and "\n" not in text
    assert text.endswith(f"put it at {tmp_path}/root/mnist/file.bin")
    assert server.asked == asked and files_under(tmp_path / "root") == []


def test_a_wrong_checksum_leaves_nothing(tmp_path, serve):
    server = serve("wrong")
    with pytest.raises(DataError, match="gave another file than it should: its checksum is"):
        download("mnist", tmp_path / "root")
    assert files_under(tmp_path / "root") == [] and server.asked == 1


def test_no_network(tmp_path, serve):
    serve("right").server_close()
    with pytest.raises(
        DataError,
        match="cannot be fetched .the connection failed: .Errno 111. Connection refused; tried 3",
    ):
        download("mnist", tmp_path / "root", lambda line: None)


def test_an_address_that_is_none(tmp_path, serve, monkeypatch):
    serve("right")
    (file,) = REMOTE_FILES["mnist"]
    monkeypatch.setitem(REMOTE_FILES, "mnist", (replace(file, url="http://[nowhere/file.bin"),))
    with pytest.raises(DataError, match="cannot be fetched .the connection failed: Invalid IPv6"):
        download("mnist", tmp_path / "root", lambda line: None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1], "its checksum is .*; remove it to have it fetched again"),
        (b"", "its checksum is .*; remove it to have it fetched again"),
        (bytes(MAX_BYTES + 1), "it has 5001 bytes, more than 5000; remove it"),
    ],
)
def test_a_file_that_is_there_is_checked_and_kept(tmp_path, serve, content, message):
    server = serve("right")
    path = tmp_path / "mnist/file.bin"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"file.bin is there but is not the file at .*{message}"):
        download("mnist", tmp_path)
    assert path.read_bytes() == content and server.asked == 0


@pytest.mark.parametrize("kind", ["folder", "FIFO", "broken link"])
def test_what_is_no_file_is_in_the_way(tmp_path, serve, kind):
    serve("right")
    path = tmp_path / "mnist/file.bin"
    path.parent.mkdir()
    make = {"folder": os.mkdir, "FIFO": os.mkfifo, "broken link": lambda p: os.symlink("no", p)}
    make[kind](path)
    with pytest.raises(DataError, match="file.bin is in the way: it is not a regular file"):
        download("mnist", tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path, serve, monkeypatch):
    serve("right")

    class Full(io.FileIO):
        """A file on a disk without room."""

        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(remote, "open", Full, raising=False)
    with pytest.raises(DataError, match="file.bin cannot be written .No space left on device"):
        download("mnist", tmp_path)
    assert files_under(tmp_path) == []


def test_a_bar_on_a_terminal(tmp_path, serve, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    serve("right")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    download("mnist", tmp_path)
    assert "file.bin:   0%" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, serve):
    serve("right")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file.bin cannot be written"):
        download("mnist", tmp_path / "file")


def test_bits_are_checked_whatever_the_spaces(tmp_path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (3, 784), np.uint8)
    digest = REMOTE_FILES["binarized-mnist"][0].digest
    texts = [
        b"".join(space.join(b"%d" % bit for bit in row) + b"\n" for row in bits)
        for space in (b" ", b"  ")
    ]
    assert np.array_equal(bits_of_amat(texts[0]), bits)
    expected = hashlib.sha256(np.packbits(bits, axis=1).tobytes()).hexdigest()
    for text in texts:
        (tmp_path / "bits.amat").write_bytes(text)
        assert digest(tmp_path / "bits.amat") == expected


def test_every_checksum_is_one():
    for name, files in REMOTE_FILES.items():
        assert name in DATASETS
        for file in files:
            assert len(bytes.fromhex(file.checksum)) in (16, 32)
            assert file.url.startswith("http") and not file.path.startswith("/")


def test_the_command(tmp_path, serve, monkeypatch, capsys):
    monkeypatch.delenv("FASTGEN_DATA", raising=False)
    serve("right")
    assert main(["download", "mnist", "--data-root", str(tmp_path / "root")]) == 0
    assert (tmp_path / "root/mnist/file.bin").exists()
    capsys.readouterr()
    assert main(["download", "mnist"]) == 2
    assert "no data folder is set" in capsys.readouterr().err
    assert main(["download", "mnist", "--data-root", "~nobody-here/x"]) == 2
    assert "there is no such user" in capsys.readouterr().err
    assert main(["download", "faces", "--data-root", str(tmp_path)]) == 2
    assert "'faces' cannot be downloaded; these can: mnist, " in capsys.readouterr().err
