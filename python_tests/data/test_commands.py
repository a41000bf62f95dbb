"""``fewshot-ext data`` as its users meet it: what it prints, what it writes, what it says to a mistake."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from fewshot_ext.cli import main
from fewshot_ext.data import ImageArchive, Split, load_images, read_image
from fewshot_ext.data.download import REMOTE, RemoteSet

TREE = {
    "train/cat/1.png": (20, 30),
    "train/cat/2.png": (40, 30),
    "train/dog/3.png": (25, 25),
    "val/emu/4.png": (9, 9),
    "test/fox/5.png": (20, 20),
}


@pytest.fixture
def pack(picture_tree, tmp_path):
    """Runs ``data pack`` on a tree of five pictures; gives the exit code and the archive's path."""
    root = picture_tree(TREE)

    def run(*arguments, source=root, output=tmp_path / "out" / "set.npz"):
        return main(["data", "pack", "--source", str(source), "--output", str(output), *arguments]), output

    return run


def test_pack_and_info(pack, tmp_path, capsys):
    code, output = pack("--size", "16")
    assert code == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:5] == [
        "5 images of 16 x 16 pixels, RGB",
        "              classes    images    images a class",
        "base                2         3            1 to 2",
        "validation          1         1                 1",
        "novel               1         1                 1",
    ]
    assert f"written: {output}" in printed.out
    assert sorted(os.listdir(output.parent)) == ["set.npz", "set.npz.json"]
    archive = ImageArchive.load(output)
    assert archive.class_names == ("cat", "dog", "emu", "fox")
    assert archive.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40]

    preview = tmp_path / "made" / "preview.png"
    assert main(["data", "info", str(output), "--preview", str(preview)]) == 0
    printed = capsys.readouterr().out
    assert "checksum: ok" in printed
    assert f"sha256 of the content: {archive.checksum()}" in printed
    assert "borders: blue for base" in printed
    sheet = read_image(preview)
    assert sheet.shape[2] == 4 * (96 + 8) + 8
    # Each picture is a flat color, shown in the middle of its cell.
    assert sheet[:, 50, 8 + 48 :: 104].T.tolist() == [[0, 0, 255], [20, 0, 235], [30, 0, 225], [40, 0, 215]]


def test_pack_as_jpeg_inverted_gray_and_stretched(pack, tmp_path):
    code, output = pack("--size", "16", "--jpeg-quality", "95", "--invert", "--mode", "L", "--resize-mode", "stretch")
    assert code == 0
    plain = pack("--size", "16", "--mode", "L", "--resize-mode", "stretch", output=tmp_path / "plain.npz")[1]
    inverted, plain = ImageArchive.load(output).images.int(), ImageArchive.load(plain).images.int()
    assert plain.shape == (5, 1, 16, 16)
    assert (255 - inverted - plain).abs().max() <= 2
    assert "data" in np.load(output)


def test_pack_with_a_split_says_what_is_left_out(pack, tmp_path, capsys):
    (tmp_path / "mine.json").write_text('{"train": ["fox"], "test": ["cat"]}')
    code, output = pack("--size", "8", "--split", str(tmp_path / "mine.json"))
    assert code == 0
    assert "pictures that the split does not name left out: 2, such as 'train/dog/3.png'" in capsys.readouterr().err
    archive = load_images(output)
    assert archive.subset(Split.BASE).class_names == ("fox",)
    assert archive.subset(Split.NOVEL).class_names == ("cat",)


# 14
def test_pack_says_and_records_what_it_passes_over(pack, tmp_path, capsys):
    (tmp_path / "pictures" / "val" / "emu" / "4.raw").touch()
    code, output = pack("--size", "8")
    assert code == 0
    told = "files of other kinds (1 .raw) passed over: 1, namely 'val/emu/4.raw'"
    assert told in capsys.readouterr().err
    record = json.loads((output.parent / "set.npz.json").read_text())
    assert record["passed_over"] == [told]
    assert record["sha256"] == ImageArchive.load(output).checksum()


# 14
@pytest.mark.parametrize("command", [["pack", "--output", "set.npz", "--source"], ["info"]])
def test_a_folder_that_cannot_be_read_stops_the_command(command, picture_tree, tmp_path, monkeypatch, capsys):
    root = picture_tree(TREE)
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.chdir(tmp_path)
    assert main(["data", *command, str(root)]) == 2
    error = capsys.readouterr().err
    assert "this folder cannot be read: Permission denied" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "set.npz").exists()


# 21
def test_info_counts_the_sizes_of_a_folder(picture_tree, tmp_path, capsys):
    root = picture_tree(TREE)
    (root / "README.txt").touch()
    assert main(["data", "info", str(root), "--preview", str(tmp_path / "preview.png")]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:7] == [
        "5 images of 5 sizes, which data pack --size brings to one",
        "         1 of 20 x 30 pixels",
        "         1 of 40 x 30 pixels",
        "         1 of 25 x 25 pixels",
        "         1 of 9 x 9 pixels",
        "         1 of 20 x 20 pixels",
        "              classes    images    images a class",
    ]
    assert "base                2         3            1 to 2" in printed.out
    assert "files of other kinds (1 .txt) passed over: 1, namely 'README.txt'" in printed.err
    assert read_image(tmp_path / "preview.png").shape[2] == 4 * (96 + 8) + 8
    (root / "val/emu/4.png").write_bytes((root / "val/emu/4.png").read_bytes()[:50])
    assert main(["data", "info", str(root)]) == 2
    assert "4.png" in capsys.readouterr().err


# 21
def test_training_on_a_folder_without_roles_names_the_option(picture_tree, tmp_path, capsys):
    root = picture_tree({"a/1.png": (8, 8), "b/2.png": (8, 8)})
    arguments = ["--data", str(root), "--output", str(tmp_path / "out"), "--margin", "-0.3"]
    assert main(["pretrain", *arguments]) == 2
    assert "no base classes, all are novel: `fewshot-ext data pack --split`" in capsys.readouterr().err


def test_pack_with_one_role_for_all(picture_tree, pack):
    root = picture_tree({"only/a/1.png": (8, 8), "only/b/2.png": (8, 8)})
    code, output = pack("--split", "base", source=root / "only")
    assert code == 0
    assert set(ImageArchive.load(output).class_split.tolist()) == {Split.BASE}


def test_the_source_of_cifar_fs(cifar, tmp_path, capsys):
    command = ["data", "pack", "--source", str(cifar), "--output", str(tmp_path / "cifar_fs.npz")]
    assert main([*command, "--split", "cifar_fs"]) == 0
    assert ImageArchive.load(tmp_path / "cifar_fs.npz").class_split.bincount().tolist() == [64, 16, 20]
    assert main([*command, "--size", "84"]) == 2
    assert "CIFAR-100 is packed as it is, 32 x 32 RGB" in capsys.readouterr().err


def test_damaged_pictures_are_left_out_counted_and_recorded(pack, picture_tree, capsys):
    root = picture_tree({"train/dog/5.png": (9, 9)})
    whole = (root / "train/dog/5.png").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no picture"):
        (root / "train/dog/5.png").write_bytes(damaged)
        code, output = pack("--size", "8", "--skip-corrupt")
        assert code == 0
        told = capsys.readouterr().err
        assert "pictures that cannot be read left out: 1, such as this: " in told and "5.png" in told
        assert ImageArchive.load(output).labels.bincount().tolist() == [2, 1, 1, 1]
        (line,) = json.loads((output.parent / "set.npz.json").read_text())["passed_over"]
        assert line.startswith("pictures that cannot be read left out: 1")
    (root / "val/emu/4.png").write_bytes(b"")
    assert pack("--size", "8", "--skip-corrupt")[0] == 1
    assert "class 'emu' has no picture that can be read; nothing was written" in capsys.readouterr().err


def test_a_damaged_picture_stops_the_packing_and_nothing_is_written(pack, picture_tree, capsys):
    root = picture_tree(TREE)
    (root / "val/emu/4.png").write_bytes((root / "val/emu/4.png").read_bytes()[:50])
    code, output = pack("--size", "8")
    assert code == 1
    error = capsys.readouterr().err
    assert "4.png" in error
    assert "nothing was written" in error
    assert len(error.splitlines()) == 1
    assert os.listdir(output.parent) == []


def test_a_full_disk_stops_the_packing(pack, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewshot_ext.data.archive_file._write", full)
    code, output = pack("--size", "8")
    assert code == 1
    assert "No space left on device; nothing was written" in capsys.readouterr().err
    assert os.listdir(output.parent) == []


def test_ctrl_c_leaves_no_half_file(tmp_path):
    root = tmp_path / "pictures" / "a"
    root.mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    noise.save(root / "0.png", compress_level=1)
    for number in range(1, 400):
        os.link(root / "0.png", root / f"{number}.png")
    output = tmp_path / "out" / "set.npz"
    command = [sys.executable, "-m", "fewshot_ext.cli", "data", "pack", "--source", str(root.parent), "--size", "8"]
    running = subprocess.Popen([*command, "--output", str(output)], stderr=subprocess.PIPE, text=True)
    # The folder is made when every check is done; reading 400 pictures then takes many seconds.
    while not output.parent.exists() and running.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130, error
    assert f"interrupted; nothing was written to {output}" in error
    assert "Traceback" not in error
    assert os.listdir(output.parent) == []


def test_download_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    steps = []

    def fetch(remote, folder):
        steps.append((remote, folder))
        (folder / "images").mkdir()
        return [folder / "images"]

    monkeypatch.setattr("fewshot_ext.commands.data.download.download", fetch)
    assert main(["data", "download", "omniglot", "--output", str(tmp_path / "omniglot")]) == 0
    assert steps == [(REMOTE["omniglot"], tmp_path / "omniglot")]
    printed = capsys.readouterr().out
    assert f"written: {tmp_path / 'omniglot' / 'images'}" in printed
    assert f"fewshot-ext data pack --source {tmp_path / 'omniglot'} --class-depth 2 --size 28" in printed


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError("cannot fetch x: there\nis no network"), 1, "error: cannot fetch x: there is no network"),
        (ValueError("x gave another file"), 1, "error: x gave another file"),
        (KeyboardInterrupt(), 130, "interrupted; "),
    ],
)
def test_a_download_that_fails(error, code, message, monkeypatch, tmp_path, capsys):
    def fail(remote: RemoteSet, folder):
        raise error

    monkeypatch.setattr("fewshot_ext.commands.data.download.download", fail)
    assert main(["data", "download", "cub", "--output", str(tmp_path)]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_the_next_step_of_every_download_is_a_command_that_parses(tmp_path):
    from fewshot_ext.cli import _as_declared, _build_parsers

    for remote in REMOTE.values():
        command = remote.next_step.format(folder=tmp_path).partition(" (")[0].split()
        assert command[0] == "fewshot-ext"
        assert _build_parsers()["fewshot-ext"].parse_args(_as_declared(command[1:])).data.command == "pack"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data"], 'data: error: expected "command" to be one of {download,pack,info}'),
        (["data", "fly"], "data: error: "),
        (["data", "pack"], "data pack: error: the following arguments are required: source, output"),
        (["data", "pack", "--source", "missing", "--output", "a.npz"], "'missing' is not a folder"),
        (["data", "pack", "--source", ".", "--output", "a.npz"], "no pictures in '.'"),
        (
            ["data", "pack", "--source", ".", "--output", "a.zip"],
            "output: expected the name of an .npz file, got 'a.zip'",
        ),
        (["data", "pack", "--source", ".", "--output", "folder.npz"], "output 'folder.npz' is a folder"),
        (["data", "pack", "--source", "tree", "--output", "a.npz", "--size", "0"], "size: expected at least 1, got 0"),
        (["data", "pack", "--source", "tree", "--output", "a.npz", "--size", "big"], "big"),
        (
            ["data", "pack", "--source", "tree", "--output", "a.npz", "--jpeg-quality", "0"],
            "jpeg_quality: expected a number in",
        ),
        (["data", "pack", "--source", "tree", "--output", "a.npz", "--mode", "CMYK"], "CMYK"),
        (["data", "pack", "--source", "tree", "--output", "a.npz", "--resize-mode", "fold"], "fold"),
        (["data", "pack", "--source", "tree", "--output", "a.npz", "--split", "cup"], "there is no split 'cup'"),
        (["data", "pack", "--source", "tree", "--output", "a.npz", "--split", "cub"], "200 of them have no picture"),
        (["data", "pack", "--source", "tree", "--output", "file/a.npz"], "cannot write to the output folder"),
        (["data", "info"], "data info: error: "),
        (["data", "info", "nothing_like_it"], "there is no image set 'nothing_like_it'"),
        (["data", "info", "data.info.npz"], "there is no image set 'data.info.npz'"),
        (["data", "info", "--config", "data.info.yaml"], "data.info.yaml"),
        (["data", "info", "file"], "'file' is not an .npz file"),
        (["data", "info", "digits", "--preview", "a.jpg"], "preview: expected the name of a .png file, got 'a.jpg'"),
        (["data", "download", "birds", "--output", "x"], "name: expected one of omniglot, cifar100, cub"),
        (["data", "download", "miniimagenet", "--output", "x"], "miniimagenet cannot be downloaded by a program"),
        (["data", "download", "cub"], "the following arguments are required: output"),
        (["data", "download", "cub", "--output", "file"], "cannot write to the output folder 'file'"),
    ],
)
def test_a_mistake_gets_one_line_and_writes_nothing(arguments, message, tmp_path, picture_tree, monkeypatch, capsys):
    picture_tree({"tree/a/1.png": (8, 8)}).rename(tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "file").write_text("")
    (tmp_path / "work" / "folder.npz").mkdir()
    if "." in arguments:
        (tmp_path / "work" / "tree" / "a" / "1.png").unlink()
    before = sorted(os.listdir())
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("fewshot-ext data")
    assert len(printed.err.splitlines()) == 1
    assert sorted(os.listdir()) == before


def test_info_of_a_pack_without_checksum(tmp_path, capsys, archive):
    archive.save(tmp_path / "a.npz")
    arrays = {key: value for key, value in np.load(tmp_path / "a.npz").items() if key != "sha256"}
    np.savez(tmp_path / "a.npz", **arrays)
    assert main(["data", "info", str(tmp_path / "a.npz")]) == 0
    assert "checksum: none in the file" in capsys.readouterr().out


def test_info_of_a_set_that_is_no_file(capsys):
    assert main(["data", "info", "digits"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1,797 images of 8 x 8 pixels, gray")
    assert "checksum:" not in printed


@pytest.mark.parametrize("command", [[], ["pack"], ["info"], ["download"]])
def test_every_help_can_be_read(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data", *command, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: fewshot-ext data", *command]))
