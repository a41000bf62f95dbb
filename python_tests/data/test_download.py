"""Downloads from a server of our own, and archives that try to write elsewhere."""

import gzip
import hashlib
import io
import os
import stat
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fewshot_ext import _extras
from fewshot_ext.data import SPLIT_NAMES
from fewshot_ext.data.download import BY_HAND, REMOTE, RemoteFile, RemoteSet, download, remote_set
from fewshot_ext.data.unpack import unpack


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """Serves a folder; gives the folder, the address and the paths that were asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked = []

    class Handler(Quiet):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{http.server_port}", asked
    http.shutdown()
    http.server_close()
    thread.join()


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def remote(path, address, sha256=None):
    content = path.read_bytes()
    sha256 = sha256 or hashlib.sha256(content).hexdigest()
    return RemoteSet("", (RemoteFile(f"{address}/{path.name}?download=1", sha256, len(content)),), "")


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def test_a_set_is_fetched_checked_unpacked_and_tidied(server, target):
    folder, address, asked = server
    path = zipped(folder / "set.zip", {"images/a/1.png": "one", "images/b/2.png": "two"})
    assert download(remote(path, address), target, progress=False) == [target / "images"]
    assert (target / "images/a/1.png").read_text() == "one"
    assert os.listdir(target) == ["images"]
    assert asked == ["/set.zip?download=1"]


def test_a_fetched_file_is_not_fetched_again(server, target):
    folder, address, asked = server
    path = zipped(folder / "set.zip", {"a.txt": "one"})
    (target / "set.zip").write_bytes(path.read_bytes())
    download(remote(path, address), target)
    assert asked == []
    assert (target / "a.txt").read_text() == "one"


def test_another_file_than_expected_is_refused_and_removed(server, target):
    folder, address, _ = server
    path = zipped(folder / "set.zip", {"a.txt": "one"})
    with pytest.raises(ValueError, match=r"set\.zip\?download=1 gave another file than expected, which was removed"):
        download(remote(path, address, "0" * 64), target)
    assert os.listdir(target) == []


def test_an_address_that_is_gone(server, target):
    folder, address, _ = server
    wanted = remote(zipped(folder / "set.zip", {"a.txt": "one"}), address)
    (folder / "set.zip").unlink()
    with pytest.raises(OSError, match=r"cannot fetch http://127.*404"):
        download(wanted, target)
    assert os.listdir(target) == []


def test_no_network(target):
    # Port 9 of the own machine: nobody answers there.
    wanted = RemoteSet("", (RemoteFile("http://127.0.0.1:9/set.zip", "0" * 64, 1),), "")
    with pytest.raises(OSError, match=r"cannot fetch http://127\.0\.0\.1:9/set\.zip: 127\.0\.0\.1:9 does not answer"):
        download(wanted, target)
    assert os.listdir(target) == []


def test_without_pooch(target, monkeypatch):
    monkeypatch.setattr(_extras, "is_installed", lambda name: name != "pooch")
    with pytest.raises(ImportError, match=r"'pooch' is missing; pip install 'fewshot_ext\[train\]'"):
        download(REMOTE["cub"], target)


def test_names():
    assert remote_set("cub") is REMOTE["cub"]
    with pytest.raises(ValueError, match=r"name: expected one of omniglot, cifar100, cub, sop .*, got 'birds'"):
        remote_set("birds")
    for name in BY_HAND:
        split = name if name in SPLIT_NAMES else r"FOLDER/\w+\.(mat|txt)"
        with pytest.raises(ValueError, match=rf"{name} cannot be downloaded by a program: .*--split {split} "):
            remote_set(name)


def test_every_known_file_has_a_whole_checksum_and_a_safe_name():
    for known in REMOTE.values():
        for file in known.files:
            assert len(file.sha256) == 64
            assert int(file.sha256, 16)
            # The one host without https; its file is as safe, because it is held against its checksum.
            assert file.url.startswith(("https://", "http://ftp.cs.stanford.edu/"))
            assert file.name.endswith((".zip", ".tgz", ".tar.gz"))


def tarred(path, *members, mode="w:gz"):
    with tarfile.open(path, mode) as file:
        for member in members:
            member = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            member.size = 3 if member.isfile() else 0
            file.addfile(member, io.BytesIO(b"abc"))
    return path


def special(name, kind, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def zip_link(path):
    member = zipfile.ZipInfo("link")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zipped(path, {"a/good.txt": "x", member: "/etc/passwd"})


@pytest.mark.parametrize("name", ["set.tar.gz", "set.tgz"])
def test_tar_files(tmp_path, target, name):
    unpacked = []
    path = tarred(tmp_path / name, special("a", tarfile.DIRTYPE), "a/1.txt", "./a/b/2.txt", "c.txt")
    assert unpack(path, target, unpacked.append) == [target / "a", target / "c.txt"]
    assert (target / "a/b/2.txt").read_bytes() == b"abc"
    assert unpacked == [3, 3, 3]
    # Once more, over what is there.
    (target / "a/stale.txt").write_text("")
    unpack(path, target)
    assert not (target / "a/stale.txt").exists()


@pytest.mark.parametrize(
    "build",
    [
        lambda path: tarred(path / "t.tgz", "a/good.txt", "../evil.txt"),
        lambda path: tarred(path / "t.tgz", "a/good.txt", "/tmp/evil.txt"),
        lambda path: tarred(path / "t.tgz", "a/../../evil.txt"),
        lambda path: tarred(path / "t.tgz", "a/good.txt", special("../evil", tarfile.DIRTYPE)),
        lambda path: tarred(path / "t.tgz", "a/good.txt", special("link", tarfile.SYMTYPE, "/etc")),
        lambda path: tarred(path / "t.tgz", "a/good.txt", special("link", tarfile.LNKTYPE, "a/good.txt")),
        lambda path: tarred(path / "t.tgz", special("pipe", tarfile.FIFOTYPE)),
        lambda path: tarred(path / "t.tgz", special("device", tarfile.CHRTYPE)),
        lambda path: zipped(path / "t.zip", {"a/good.txt": "x", "../evil.txt": "x"}),
        lambda path: zipped(path / "t.zip", {"/evil.txt": "x"}),
        lambda path: zipped(path / "t.zip", {"a\\..\\evil.txt": "x"}),
        lambda path: zipped(path / "t.zip", {"C:evil.txt": "x"}),
        lambda path: zip_link(path / "t.zip"),
    ],
)
def test_members_that_would_lead_elsewhere_are_refused(tmp_path, target, build):
    path = build(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"t\.(tgz|zip)' is refused: its member"):
        unpack(path, target)
    assert os.listdir(target) == []
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_packed_files_cut_short(tmp_path, target, kind, kept):
    noise = os.urandom(5000)
    if kind == "zip":
        path = zipped(tmp_path / "t.zip", {"a.bin": noise})
    else:
        path = tmp_path / "t.tgz"
        (tmp_path / "a.bin").write_bytes(noise)
        with tarfile.open(path, "w:gz") as file:
            file.add(tmp_path / "a.bin", "a.bin")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"t\.(zip|tgz)' is damaged or cut short"):
        unpack(path, target)
    assert os.listdir(target) == []


def test_an_empty_packed_file(tmp_path, target):
    with pytest.raises(ValueError, match=r"t\.zip' holds no files"):
        unpack(zipped(tmp_path / "t.zip", {}), target)


def test_a_tar_file_of_the_folder_itself(tmp_path, target):
    path = tarred(tmp_path / "t.tgz", special(".", tarfile.DIRTYPE), "./a.txt")
    assert unpack(path, target) == [target / "a.txt"]


class TestItem26:
    """Damaged and hostile packed files get one line, and leave nothing behind."""

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, target):
        yield
        assert os.listdir(target) == []

    def test_damage_behind_what_tar_reads(self, tmp_path, target):
        path = tarred(tmp_path / "t.tgz", "a.txt")
        content = bytearray(path.read_bytes())
        content[-5] ^= 1  # of the checksum, which 4 bytes of length follow
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.tgz' is damaged or cut short: CRC check failed"):
            unpack(path, target)

    def test_a_sparse_member(self, tmp_path, target):
        member = tarfile.TarInfo("hole")
        member.size, member.type = 0, tarfile.GNUTYPE_SPARSE
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[483:495] = b"%011o\0" % (1 << 33)  # the size that it has once it is unpacked
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
        path = tmp_path / "t.tgz"
        with gzip.open(path, "wb") as file:
            file.write(bytes(header) + bytes(1024))
        with pytest.raises(ValueError, match=r"t\.tgz' is refused: its member 'hole' has holes"):
            unpack(path, target)

    @pytest.mark.parametrize("where", ["member", "name", "behind"])
    def test_a_tar_file_that_unpacks_to_far_more(self, where, tmp_path, target):
        huge = tarfile.TarInfo("huge")
        huge.size, huge.type = 1 << 29, tarfile.GNUTYPE_LONGNAME if where == "name" else tarfile.REGTYPE
        path = tmp_path / "t.tgz"
        with gzip.open(path, "wb", 1) as file:
            if where != "behind":
                file.write(huge.tobuf(tarfile.GNU_FORMAT))
            else:
                file.write(bytes(1024))
            for _ in range(1 << 9):
                file.write(bytes(1 << 20))
        with pytest.raises(ValueError, match=r"t\.tgz' is refused: it would unpack to .* bytes or more from"):
            unpack(path, target)

    def test_a_zip_file_that_unpacks_to_far_more(self, tmp_path, target):
        path = tmp_path / "t.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("zeros", "w") as stream:
            for _ in range(1 << 9):
                stream.write(bytes(1 << 20))
        with pytest.raises(ValueError, match=r"t\.zip' is refused: it would unpack to 536,870,912 bytes or more from"):
            unpack(path, target)

    def test_damaged_lzma(self, tmp_path, target):
        path = tmp_path / "t.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
            file.writestr("a.bin", bytes(1000))
        content = bytearray(path.read_bytes())
        content[45] ^= 255
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.zip' is damaged or cut short"):
            unpack(path, target)

    def test_an_encrypted_member(self, tmp_path, target):
        path = zipped(tmp_path / "t.zip", {"a.txt": "x"})
        content = bytearray(path.read_bytes())
        content[6] |= 1
        content[content.index(b"PK\1\2") + 8] |= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.zip' is refused: its member 'a.txt' is encrypted"):
            unpack(path, target)

    @pytest.mark.parametrize("kind", ["zip", "tgz"])
    def test_a_member_without_a_name(self, kind, tmp_path, target):
        path = tmp_path / f"t.{kind}"
        path = tarred(path, "") if kind == "tgz" else zipped(path, {zipfile.ZipInfo("\0"): "x"})
        with pytest.raises(ValueError, match="is refused: it has a member without a name"):
            unpack(path, target)

    def test_tar_of_another_compression(self, tmp_path, target):
        with pytest.raises(ValueError, match=r"t\.tgz' is damaged or cut short: Not a gzipped file"):
            unpack(tarred(tmp_path / "t.tgz", "a.txt", mode="w:xz"), target)
