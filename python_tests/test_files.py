import hashlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fewshot_ext._files import alone_in, file_sha256, remove_leftovers, replace_file, replace_text, temporary_folder


def test_the_file_is_replaced_and_readable_as_any_other(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "other").write_text("")
    replace_file(tmp_path / "a.txt", lambda path: path.write_text("new"))
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "other"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_changes_nothing(tmp_path, error):
    def write(path):
        path.write_text("half")
        raise error

    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(type(error)):
        replace_file(tmp_path / "a.txt", write)
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_text_and_checksum(tmp_path):
    replace_text(tmp_path / "a.txt", "Größe")
    assert (tmp_path / "a.txt").read_bytes() == "Größe".encode()
    assert file_sha256(tmp_path / "a.txt") == hashlib.sha256("Größe".encode()).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "missing")


def test_a_long_name_stays_writable_while_it_is_replaced(tmp_path):
    path = tmp_path / ("x" * 250 + ".txt")
    replace_text(path, "whole")
    assert path.read_text() == "whole"


WRITER = """
import sys, time
from pathlib import Path
from fewshot_ext._files import replace_file, temporary_folder

def write(path):
    path.write_text("half")
    with temporary_folder(path.parent, "unpacking") as folder:
        (folder / "a").write_text("half")
        print("writing", flush=True)
        time.sleep(60)

replace_file(Path(sys.argv[1]), write)
"""


def test_item_28_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    users = [".best-20240101.ckpt", ".hidden", "best.ckpt"]
    for name in users:
        (tmp_path / name).write_text("a user's")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "best.ckpt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "writing\n"
            names = sorted(os.listdir(tmp_path))
            assert len(names) == len(users) + 2
            remove_leftovers(tmp_path)
            assert sorted(os.listdir(tmp_path)) == names
        finally:
            process.kill()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == users
    remove_leftovers(tmp_path / "missing")


def test_item_28_a_writer_makes_another_file_where_the_first_was_taken_for_a_leftover(tmp_path, monkeypatch):
    import fewshot_ext._files as files

    lock, calls = files._lock, []

    def late(path):
        if not calls:
            remove_leftovers_unlocked(path)
        calls.append(path)
        return lock(path)

    def remove_leftovers_unlocked(path):
        with monkeypatch.context() as context:
            context.setattr(files, "_lock", lock)
            remove_leftovers(path.parent)

    monkeypatch.setattr(files, "_lock", late)
    replace_text(tmp_path / "a.txt", "whole")
    assert len(calls) == 2
    assert os.listdir(tmp_path) == ["a.txt"]


def test_one_process_at_a_time_is_alone_in_a_folder(tmp_path):
    order, inside = [], threading.Event()

    def follow():
        inside.wait()
        order.append("second waits")
        with alone_in(tmp_path):
            order.append("second is in")

    with ThreadPoolExecutor() as pool:
        with alone_in(tmp_path):
            second = pool.submit(follow)
            inside.set()
            time.sleep(0.3)
            # What a killed process left behind goes, and this is none.
            remove_leftovers(tmp_path)
            order.append("first leaves")
        second.result()
    assert order == ["second waits", "first leaves", "second is in"]
    assert not list(tmp_path.iterdir())


def test_a_temporary_folder_goes_with_its_content(tmp_path):
    with temporary_folder(tmp_path, "unpacking") as folder:
        (folder / "a").write_text("")
    assert not os.listdir(tmp_path)
