import hashlib
import os

import pytest

from fewshot_ext._files import file_sha256, replace_file, replace_text


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
