"""The walk over folders: what is a picture, and what becomes of everything else."""

import os
import socket

import pytest

from fewshot_ext.cli import main
from fewshot_ext.data import list_images
from fewshot_ext.data.walk import FOLDER_RULE, find_pictures


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root):
    return ["/".join(parts) for parts in find_pictures(root).parts]


def test_all_pictures_and_nothing_else(tmp_path):
    names = ("b/2.JPG", "b/1.png", "a.jpeg", ".hidden.png", ".cache/3.png", "notes.txt", "b/._1.png")
    touch(tmp_path, *names)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert found(tmp_path) == ["a.jpeg", "b/1.png", "b/2.JPG"]
    with pytest.warns(UserWarning, match=r"files of other kinds \(1 \.txt\) passed over: 1, namely 'notes\.txt'"):
        assert list_images(tmp_path) == [tmp_path / name for name in ("a.jpeg", "b/1.png", "b/2.JPG")]


# 14, 15
def test_everything_that_is_passed_over_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("fewshot_ext.data.walk.suffixes", lambda: frozenset({".png"}))
    touch(tmp_path, "a/1.png", "a/2.heic", "a/3.heic", "a/4.txt", "README", ".DS_Store", "a/.thumbs/1.png")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "itself.png").symlink_to(tmp_path / "a" / "itself.png")
    (tmp_path / "again").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        assert found(tmp_path) == ["a/1.png"]
        assert find_pictures(tmp_path).passed_over == (
            "files of other kinds (2 .heic (with pillow-heif installed they are read), 1 without a suffix, 1 .txt) "
            "passed over: 4, such as 'README'",
            "hidden files and folders passed over: 2, such as '.DS_Store'",
            "pipes, broken links and the like passed over: 4, such as 'socket.png'",
            "links to folders that were read already passed over: 1, namely 'again'",
            "folders without pictures passed over: 1, namely 'empty'",
        )


def test_links_are_followed(tmp_path):
    touch(tmp_path, "store/x/1.png", "store/2.png")
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "b").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "set" / "a" / "2.png").symlink_to(tmp_path / "store" / "2.png")
    assert found(tmp_path / "set") == ["a/2.png", "b/1.png"]
    assert find_pictures(tmp_path / "set").passed_over == ()


# 15
def test_many_kinds_are_not_all_named(tmp_path):
    touch(tmp_path, "1.png", *(f"{number}.kind{number}" for number in range(9)))
    assert find_pictures(tmp_path).passed_over[0].endswith(".kind5, 3 others) passed over: 9, such as '0.kind0'")


# 14
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.png", "locked/2.png")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"this folder cannot be read: Permission denied: '.*locked'"):
        find_pictures(tmp_path)


# 14
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_permission(tmp_path):
    touch(tmp_path, "a/1.png", "locked/2.png")
    (tmp_path / "locked").chmod(0)
    try:
        with pytest.raises(PermissionError, match="locked"):
            find_pictures(tmp_path)
    finally:
        (tmp_path / "locked").chmod(0o700)


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match=r"no pictures in .* looked for \.apng, \.avif"):
        list_images(tmp_path)
    touch(tmp_path, "a/1.raw")
    with pytest.raises(ValueError, match=r"files of other kinds \(1 \.raw\) passed over: 1, namely 'a/1\.raw'"):
        list_images(tmp_path)
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        list_images(tmp_path / "missing")


@pytest.mark.parametrize(
    "command",
    [
        "classify",
        "retrieve",
        "evaluate",
        "data pack",
        "data info",
        "pretrain",
        "meta-train",
        "metric-train",
        "analyze margins",
        "analyze matches",
    ],
)
def test_every_help_tells_the_rule(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert FOLDER_RULE in " ".join(capsys.readouterr().out.split())


def test_the_page_tells_the_rule(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "command_line.md").read_text(encoding="utf-8")
    assert FOLDER_RULE.partition(": ")[2] in " ".join(page.split())
