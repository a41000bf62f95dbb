"""Files of strangers: too large for what is in them, too deep, or with other things in them than code expects."""

import argparse
import gzip
import io
import json
import os
import random
import sys
import types
import zipfile
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from fewshot_ext import FewShotClassifier
from fewshot_ext._formats import check_schema, read_json, read_weights, repeated, typed
from fewshot_ext.cli import main
from fewshot_ext.data import ImageArchive, load_split
from fewshot_ext.evaluation import FrozenBackbone
from fewshot_ext.experiments.sweep import Sweep
from fewshot_ext.models import load_network

# The commands set the number of threads of the process; the fixture sets it back.
pytestmark = pytest.mark.usefixtures("one_thread")

MEBIBYTE = bytes(1 << 20)


def npz(path, members, compression=zipfile.ZIP_DEFLATED):
    """A zip file of arrays, given as bytes or as (header, MiB of zeros)."""
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as file:
        for name, content in members.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as stream:
                head, mebibytes = content if isinstance(content, tuple) else (content, 0)
                stream.write(head)
                for _ in range(mebibytes):
                    stream.write(MEBIBYTE)
    return path


def header(description):
    """The bytes of a .npy file before its data."""
    text = description.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def array(value):
    stream = io.BytesIO()
    np.save(stream, value)
    return stream.getvalue()


def shaped(dtype, shape):
    return header(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}")


class TestItem24:
    """No small file takes memory or time without bound."""

    def test_a_deflated_archive(self, tmp_path):
        path = npz(tmp_path / "a.npz", {"images": (shaped("|u1", (1 << 9, 1024, 1024)), 1 << 9)})
        with pytest.raises(ValueError, match=r"a\.npz' is refused: it would unpack to 536,87\d,\d+ bytes or more from"):
            ImageArchive.load(path)

    def test_a_central_directory_that_lies(self, tmp_path):
        path = npz(tmp_path / "a.npz", {"images": shaped("|u1", (1 << 34, 1, 1))}, zipfile.ZIP_STORED)
        content = bytearray(path.read_bytes())
        start = content.index(b"PK\1\2")
        content[start + 20 : start + 28] = (0xFFFFFFF0).to_bytes(4, "little") * 2
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"a\.npz' is refused: it would unpack to 4,294,967,280 bytes or more from"
        ):
            ImageArchive.load(path)

    def test_offsets_to_large_pictures(self, tmp_path):
        from PIL import Image

        buffer = io.BytesIO()
        Image.new("L", (7900, 7900)).save(buffer, "PNG")
        file, count = buffer.getvalue(), 60
        members = {
            "data": np.frombuffer(file * count, np.uint8),
            "offsets": np.arange(count + 1) * len(file),
            "labels": np.zeros(count, np.uint8),
            "class_names": np.array(["a"]),
            "class_split": np.zeros(1, np.uint8),
        }
        np.savez(tmp_path / "a.npz", **members)
        with pytest.raises(
            ValueError, match=r"a\.npz' is refused: it would unpack to 3,744,600,000 bytes or more from"
        ):
            ImageArchive.load(tmp_path / "a.npz")

    def test_pictures_of_a_folder(self, tmp_path):
        from PIL import Image

        from fewshot_ext.data import read_folder

        (tmp_path / "a").mkdir()
        for number in range(5):
            Image.new("L", (7900, 7900)).save(tmp_path / "a" / f"{number}.png")
        with pytest.raises(
            ValueError, match=r"0\.png' and the other pictures is refused: it would unpack to 312,050,000"
        ):
            read_folder(tmp_path)
        assert read_folder(tmp_path, size=8).images.shape == (5, 1, 8, 8)

    def test_a_split(self, tmp_path):
        path = tmp_path / "split.json.gz"
        with gzip.open(path, "wb", 1) as file:
            for _ in range(64):
                file.write(b" " * (1 << 20))
        with pytest.raises(ValueError, match=r"split\.json\.gz' is refused: it would unpack to .* bytes or more from"):
            load_split(path)

    @pytest.mark.parametrize("option", ["--config", "--finetuning"])
    def test_yaml_aliases(self, option, tmp_path, capsys):
        lines = ["lr: &a [x, x, x, x, x, x, x, x, x]"]
        lines += [
            f"{new}: &{new} [{', '.join(['*' + old] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ]
        (tmp_path / "bomb.yaml").write_text("\n".join(lines))
        assert main(["demo", option, str(tmp_path / "bomb.yaml")]) == 2
        error = capsys.readouterr().err
        assert "aliases such as *name are not taken in YAML: write the value out" in error
        assert len(error.splitlines()) == 1

    def test_yaml_aliases_in_a_text_where_a_number_belongs(self, tmp_path, capsys):
        """Such a text is read as YAML once more."""
        anchors = ["a0: &a0 [x,x,x,x,x,x,x,x,x]", *(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]" for n in range(1, 4))]
        (tmp_path / "bomb.yaml").write_text(json.dumps({"seed": f"{{{', '.join(anchors)}}}"}))
        assert main(["pretrain", "--config", str(tmp_path / "bomb.yaml")]) == 2
        error = capsys.readouterr().err
        assert "Parser key \"seed\": Expected a <class 'int'>" in error
        assert len(error) < 1000, "the aliases were followed"

    @pytest.mark.parametrize("text", ["epochs: 3\nseed: 1\nepochs: 4\n", "backbone: {width: 8, width: 16}\n"])
    def test_a_setting_that_comes_twice(self, text, tmp_path, capsys):
        (tmp_path / "twice.yaml").write_text(text)
        assert main(["pretrain", "--config", str(tmp_path / "twice.yaml")]) == 2
        error = capsys.readouterr().err
        assert "comes twice in YAML: leave one out" in error
        assert len(error.splitlines()) == 1

    def test_names_that_repeat_are_found_among_many(self):
        assert repeated(["b", "a", "c", "a", "c"]) == "a"
        assert repeated(map(str, range(300_000))) is None  # would take minutes if each were counted by itself

    def test_yaml_that_is_too_deep(self, tmp_path, capsys):
        (tmp_path / "deep.yaml").write_text("cosine_margins: " + "[" * 100_000)
        assert main(["demo", "--config", str(tmp_path / "deep.yaml")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

    def test_a_deflated_checkpoint(self, checkpoints, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
            with zipfile.ZipFile(checkpoints[0]) as whole:
                for name in whole.namelist():
                    packed.writestr(name, whole.read(name))
            packed.writestr("archive/data/999", bytes(1 << 26))
        with pytest.raises(ValueError, match=r"is not the checkpoint of .*: the file is refused: it would unpack to"):
            load_network(tmp_path / "a.ckpt")

    @pytest.mark.parametrize("kind", ["settings", "classes", "stride"])
    def test_a_checkpoint_of_a_network_that_is_not_in_it(self, kind, checkpoints, tmp_path):
        content = torch.load(checkpoints[0], weights_only=True)
        if kind == "settings":
            content["hyper_parameters"]["network"]["backbone"]["width"] = 2_000_000
        elif kind == "classes":
            content["hyper_parameters"]["num_classes"] = 1 << 40
        else:
            name = next(iter(content["state_dict"]))
            content["state_dict"][name] = torch.zeros(1).expand(1 << 20, 1 << 20)
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"a\.ckpt (does not fit this version|is not the checkpoint)"):
            load_network(tmp_path / "a.ckpt")


HEADERS = {
    "negative": shaped("|u1", (-4, -3, 3)),
    "absurd": shaped("|u1", (1 << 62, 1 << 62, 1 << 62)),
    "empty texts": shaped("<U0", (1 << 60,)),
    "no dictionary": header("[1, 2]"),
    "deep": header("(" * 5000 + ")" * 5000),
    "minus": header("-" * 9000 + "1"),
    "long": header("{" + " " * 60_000 + "}"),
    "other keys": header("{'a': 1}"),
    "unknown dtype": shaped("|q9", (1,)),
    "no text": header("\xff\xfe"),
    "version": b"\x93NUMPY\x09\x09" + array(np.zeros(2))[8:],
    "nothing": b"",
}


class TestItem25:
    """One line that names the file, whatever is in it."""

    @pytest.mark.parametrize("key", ["images", "class_names", "another"])
    @pytest.mark.parametrize("kind", HEADERS)
    def test_headers_of_arrays(self, key, kind, tmp_path):
        path = npz(tmp_path / "a.npz", {key: HEADERS[kind]})
        with pytest.raises(ValueError, match=r"a\.npz'") as refused:
            ImageArchive.load(path)
        assert "allow_pickle" not in str(refused.value), "nobody should be advised to run what is in the file"

    def test_images_without_pixels(self, tmp_path):
        arrays = {"images": np.zeros((2, 0, 0), np.uint8), "labels": np.zeros(2, np.uint8)}
        np.savez(tmp_path / "a.npz", **arrays, class_names=np.array(["a"]), class_split=np.zeros(1, np.uint8))
        with pytest.raises(ValueError, match=r"a\.npz': images: expected pixels"):
            ImageArchive.load(tmp_path / "a.npz")

    def test_deep_json(self, tmp_path):
        deep = "[" * 100_000 + "]" * 100_000
        (tmp_path / "split.json").write_text(deep)
        (tmp_path / "sweep.json").write_text(deep)
        for read in (
            lambda: load_split(tmp_path / "split.json"),
            lambda: Sweep.read(tmp_path, None),
        ):
            with pytest.raises(ValueError, match=r"\.json'? (is damaged|does not hold)"):
                read()

    def test_mutated_checkpoints(self, checkpoints, tmp_path):
        whole = torch.load(checkpoints[0], weights_only=True)
        content = {key: whole[key] for key in ("hyper_parameters", "state_dict")}
        refused = 0
        for mutant in mutants(content, 150):
            torch.save(mutant, tmp_path / "a.ckpt")
            try:
                backbone = FrozenBackbone.from_checkpoint(tmp_path / "a.ckpt")
            except ValueError as error:
                assert "a.ckpt" in str(error)
                refused += 1
            else:
                backbone.network(torch.zeros(1, backbone.network.channels, 8, 8, dtype=torch.uint8))
        assert refused > 50

    @pytest.mark.parametrize("source", ["checkpoint", "module", "deepemd"])
    def test_mutated_classifiers(self, source, checkpoints, tmp_path):
        images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        module = nn.Flatten() if source == "module" else None
        head = "deepemd_mean" if source == "deepemd" else "protonet"
        classifier = FewShotClassifier(module or checkpoints[0], head).fit(images, ["a", "b", "a", "b"])
        classifier.save(tmp_path / "a.pt")
        content = torch.load(tmp_path / "a.pt", weights_only=True)
        refused = 0
        for mutant in mutants(content, 100):
            torch.save(mutant, tmp_path / "b.pt")
            try:
                loaded = FewShotClassifier.load(tmp_path / "b.pt", module)
            except ValueError as error:
                assert "b.pt" in str(error)
                refused += 1
                continue
            try:
                assert len(loaded.predict(images)) == 4
            except ValueError as error:
                # Of a module nothing is in the file, and what it gives is known only now.
                assert source == "module" and "images: expected the size of those learned" in str(error)
        assert refused > 40

    @pytest.mark.parametrize(("head", "path"), [("finetune", ("steps",)), ("deepemd_mean", ("classifier", "passes"))])
    def test_classifiers_that_ask_for_endless_fitting(self, head, path, checkpoints, tmp_path):
        images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        FewShotClassifier(checkpoints[0], head).fit(images, ["a", "b"]).save(tmp_path / "a.pt")
        content = torch.load(tmp_path / "a.pt", weights_only=True)
        part = content["head"]
        for name in path[:-1]:
            part = part["settings"][name]
        part["settings"][path[-1]] = 2**40
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(
            ValueError, match=rf"a\.pt does not hold .* {path[-1]}: expected at most 1,000,000 in a file"
        ):
            FewShotClassifier.load(tmp_path / "a.pt")

    def test_saved_files_never_cause_a_download(self, checkpoints, tmp_path, monkeypatch):
        timm = types.ModuleType("timm")
        timm.is_model, timm.create_model = lambda name: True, lambda *_, **__: pytest.fail("a model is made")
        monkeypatch.setitem(sys.modules, "timm", timm)
        monkeypatch.setattr("fewshot_ext._extras.is_installed", lambda name: True)
        images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        FewShotClassifier(checkpoints[0], "protonet").fit(images, ["a", "b"]).save(tmp_path / "a.pt")
        content = torch.load(tmp_path / "a.pt", weights_only=True)
        for origin in ({"timm": "resnet18", "state_dict": None}, {"timm": "resnet18"}, {"timm": None}):
            torch.save({**content, "backbone": origin}, tmp_path / "a.pt")
            with pytest.raises(ValueError, match=r"a\.pt does not hold a FewShotClassifier"):
                FewShotClassifier.load(tmp_path / "a.pt")

    def test_torchs_advice_to_run_code_is_not_passed_on(self, tmp_path):
        torch.save(nn.Flatten(), tmp_path / "a.pt")
        with pytest.raises(ValueError, match="something that is not weights and settings") as refused:
            read_weights(tmp_path / "a.pt")
        assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
class TestNumbersOfNumpy:
    def read(self, value, folder, legacy, **options):
        torch.save({"acc": value, "w": torch.ones(2)}, folder / "a.tar", _use_new_zipfile_serialization=not legacy)
        return read_weights(folder / "a.tar", **options)["acc"]

    def test_they_are_read_as_those_of_python(self, legacy, tmp_path):
        for value in (np.float64(0.5), np.float32(0.25), np.float16(2), np.int64(-7), np.uint8(255), np.bool_(True)):
            found = self.read(value, tmp_path, legacy, scalars=True)
            assert type(found) is type(value.item()) and found == value
        # Where nobody needs them they are refused as before.
        with pytest.raises(ValueError, match=r"needs code to run: numpy\._?core\.multiarray\.scalar"):
            self.read(np.float64(0.5), tmp_path, legacy)

    def test_what_would_need_code_is_refused_by_its_name(self, legacy, tmp_path):
        class Trap:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        for value, name in (
            (Trap(), r"posix\.mkdir"),
            (nn.Flatten(), r"torch\.nn\.modules\.flatten\.Flatten"),
            (argparse.Namespace(a=1), r"argparse\.Namespace"),
            (np.ones(2), r"numpy\._?core\.multiarray\._reconstruct"),
        ):
            with pytest.raises(ValueError, match=f"something that is not weights and settings, .*: {name}$"):
                self.read(value, tmp_path, legacy, scalars=True)
        assert not (tmp_path / "made").exists()
        for value in (np.str_("x"), np.datetime64(3, "s")):
            with pytest.raises(ValueError, match="a scalar of numpy that is no number"):
                self.read(value, tmp_path, legacy, scalars=True)


JUNK = (None, "text", -1, 10**30, 0.5, float("nan"), [], {}, [[]], {"a": 1}, True, (1, 2), b"x")


def mutants(content, count):
    """Copies with one part that is gone, is something else, or is a tensor of another shape, dtype or value."""
    draw = random.Random(0)
    for _ in range(count):
        yield mutated(content, draw, draw.randrange(1, 6))


def mutated(content, draw, depth):
    if isinstance(content, torch.Tensor) and draw.random() < 0.7:
        return draw.choice((lambda x: x[None], lambda x: x.to(torch.int32), lambda x: x.flatten(), lambda x: x - 99))(
            content
        )
    if depth and isinstance(content, dict) and content:
        key = draw.choice(list(content))
        if depth == 1 and draw.random() < 0.4:
            return {name: value for name, value in content.items() if name != key}
        return {**content, key: mutated(content[key], draw, depth - 1)}
    if depth and isinstance(content, list | tuple) and content:
        index = draw.randrange(len(content))
        return type(content)([*content[:index], mutated(content[index], draw, depth - 1), *content[index + 1 :]])
    return draw.choice(JUNK)


@dataclass(frozen=True)
class Settings:
    name: Literal["a", "b"] = "a"
    rate: float = 1.0
    sizes: tuple[int, ...] | None = None


def test_typed_settings():
    assert typed(Settings, {"name": "b", "rate": 1, "sizes": (1, 2)}) == Settings("b", 1, (1, 2))
    for values, message in (
        ({"nam": "a"}, "there is no setting 'nam' of Settings"),
        ({"name": "c"}, "name of Settings: expected Literal"),
        ({"name": []}, "name of Settings: expected .*, got list"),
        ({"rate": "1"}, "rate of Settings: expected float, got '1'"),
        ({"rate": True}, "rate of Settings: expected float, got bool"),
        ({"rate": 2**70}, "rate of Settings: expected numbers of 64 bits, got a longer one"),
        ({"sizes": (1, 2.5)}, "sizes of Settings: expected .*, got tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            typed(Settings, values)


def test_settings_within_settings():
    @dataclass(frozen=True)
    class Outer:
        inner: Settings = Settings()
        other: Settings | None = None

    values = {"inner": {"name": "b", "sizes": [1, 2]}, "other": {"rate": 2}}
    assert typed(Outer, values) == Outer(Settings("b", sizes=(1, 2)), Settings(rate=2))
    with pytest.raises(ValueError, match="there is no setting 'nam' of Settings"):
        typed(Outer, {"inner": {"nam": "a"}})
    with pytest.raises(ValueError, match="inner of Outer: expected Settings, got int"):
        typed(Outer, {"inner": 3})


def test_schema():
    check_schema({"a": [1, 2.5], "b": None, 3: 4}, {"a": [float], "b": (str, type(None)), "c?": int})
    for value, schema, message in (
        ([], {}, "content: expected dict, got list"),
        ({"a": True}, {"a": int}, r"content\['a'\]: expected int, got bool"),
        ({1: 2}, {str: int}, "a key of content: expected str, got int"),
        ({"a": "x"}, {str: (int, type(None))}, r"content\['a'\]: expected int or null, got str"),
        (torch.zeros(1).expand(9), torch.Tensor, "content: expected a dense tensor"),
        (torch.eye(2).to_sparse(), torch.Tensor, "content: expected a dense tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            check_schema(value, schema)


def test_json_of_other_kinds_is_named(tmp_path):
    path = tmp_path / "a.json"
    for text in ("{", "\xff", "[" * 100_000, "1" * 10_000, json.dumps([1])):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"a\.json does not hold results: "):
            read_json(path, dict, "results")
