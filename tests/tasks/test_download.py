"""data/tasks/download.py, against a server on this machine that breaks off, or knows no ranges."""

import gzip
import hashlib
import io
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from data import InputError
from data.tasks import download

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted, start = self.server, self.headers.get("Range"), 0
        server.asked.append(wanted)
        if wanted and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        if start and start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start:][: server.breaks.pop(0) if server.breaks else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """`ranges`: does it know them; `breaks`: bytes to send in each of the next answers."""
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.ranges, server.breaks, server.asked = True, [], []
    server.url = f"http://127.0.0.1:{server.server_port}/file.bin"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_is_resumed(server, tmp_path, ranges):
    """From where it broke off, or from the start if the server sends everything again."""
    server.ranges, server.breaks = ranges, [700_000, 100_000]
    path = tmp_path / "new" / "file.bin"
    at = (700_000, 800_000) if ranges else (700_000, 100_000)
    for size in at:
        with pytest.raises(InputError, match=f"ended after {size:,} of 1,280,000 bytes.*continue"):
            download.download(server.url, path, SHA256, pauses=())
        assert not path.exists()
    assert download.download(server.url, path, SHA256) == path
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["file.bin"]
    assert server.asked == [None, *(f"bytes={size}-" for size in at)]
    download.download(server.url, path, SHA256)
    assert len(server.asked) == 3  # what is there is not asked for again


def test_a_part_that_was_whole_already(server, tmp_path):
    """A run that was stopped between the last byte and the renaming is only checked."""
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert download.download(server.url, tmp_path / "file.bin", SHA256).read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    """Neither the file nor a part, on which a later run would build."""
    with pytest.raises(InputError, match=f"{SHA256} instead of {'0' * 64}"):
        download.download(server.url, tmp_path / "file.bin", "0" * 64)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file.bin.part").write_bytes(b"of another file")
    with pytest.raises(InputError, match="instead of"):
        download.download(server.url, tmp_path / "file.bin", SHA256)
    assert download.download(server.url, tmp_path / "file.bin", SHA256)


def test_a_file_that_is_there_is_checked_and_kept(tmp_path):
    """Another file of its name is refused, and is not touched."""
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match="file.bin has the hash"):
        download.download("http://127.0.0.1:9/file.bin", tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"


def test_offline(server, tmp_path):
    """The one sentence names the address, and where to put the file by hand."""
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError) as error:
        download.download(server.url, tmp_path / "file.bin", SHA256)
    assert server.url in str(error.value) and str(tmp_path / "file.bin") in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_fetching_unpacks(server, tmp_path, monkeypatch, capsys):
    """All files of a name arrive in their places."""
    base, _, name = server.url.rpartition("/")
    files = {f"MRPC/{name}": (base, SHA256), name: (base, SHA256)}
    monkeypatch.setitem(download.SOURCES, "X", files)
    monkeypatch.setattr("sys.argv", ["x.py", "--download", str(tmp_path)])
    download.command_line(print, "X")
    assert (tmp_path / "MRPC" / name).read_bytes() == (tmp_path / name).read_bytes() == CONTENT
    monkeypatch.setattr("sys.argv", ["x.py", "--data", str(tmp_path), "--download", str(tmp_path)])
    seen = []
    download.command_line(seen.append, "X")  # what is there already is not fetched again
    assert seen == [str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["x.py", "--download", str(tmp_path / "one"), "--only", "X"])
    monkeypatch.setitem(download.SOURCES, "Y", {"y.bin": ("http://127.0.0.1:9", SHA256)})
    download.command_line(seen.append, "Y", "X")  # Y cannot be downloaded
    assert (tmp_path / "one" / name).exists() and seen == [str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["x.py", "--help"])
    with pytest.raises(SystemExit):
        download.command_line(seen.append, "X")
    assert server.url in capsys.readouterr().out


def packed(path, name, content=b"content"):
    """An archive that holds one file of a name."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)
    else:
        with tarfile.open(path, "w") as archive:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_unpack_inside_their_folder(kind, tmp_path):
    """An archive writes to no other folder, and a damaged one is refused."""
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / f"a.{kind}"
    download.unpack(packed(archive, "CoLA/train.tsv"))
    assert (tmp_path / "in/CoLA/train.tsv").read_bytes() == b"content"
    for name in ("../evil", f"{tmp_path}/evil"):
        packed(archive, name)
        if kind == "tar" and name.startswith(".."):
            with pytest.raises(InputError, match="cannot be unpacked"):
                download.unpack(archive)
        else:
            download.unpack(archive)  # into the folder
        assert [p.name for p in tmp_path.iterdir()] == ["in"]
    archive.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=f"a.{kind} cannot be unpacked"):
        download.unpack(archive)


def test_a_single_packed_file(tmp_path):
    """It is unpacked beside itself, whole or not at all."""
    path = tmp_path / "trees.jsonl.gz"
    path.write_bytes(gzip.compress(CONTENT))
    download.unpack(path)
    assert (tmp_path / "trees.jsonl").read_bytes() == CONTENT
    path.write_bytes(gzip.compress(b"other")[:-9])
    with pytest.raises(InputError, match="trees.jsonl.gz cannot be unpacked"):
        download.unpack(path)
    assert (tmp_path / "trees.jsonl").read_bytes() == CONTENT  # half a file takes no name


def test_sources():
    """GLUE's eight tasks, MMLU and the instructions, each with a sum; no two are the same."""
    glue = {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE"}
    assert set(download.SOURCES) == glue | {"MMLU", "Alpaca", "Dolly", "OASST1", "MT-Bench"}
    files = [file for files in download.SOURCES.values() for file in files.values()]
    assert all(base.startswith("https://") and not base.endswith("/") for base, _ in files)
    sums = [sha256 for _, sha256 in files]
    assert all(re.fullmatch("[0-9a-f]{64}", s) for s in sums) and len(set(sums)) == len(sums) == 14


def test_a_damaged_member(tmp_path):
    """A .zip whose list is whole, but whose content is not, is one sentence too."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.tsv", "text " * 50)
    path.write_bytes(path.read_bytes().replace(b"text text", b"next text", 1))
    with pytest.raises(InputError, match="a.zip cannot be unpacked"):
        download.unpack(path)
