"""The build asks for torch only where there is none to compile against, and says what it cannot build."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def backend(monkeypatch):
    """The backend, in an interpreter without site-packages, and without setuptools running setup.py."""
    spec = importlib.util.spec_from_file_location("backend", CHECKOUT / "build_backend" / "backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_wheel", lambda settings=None: ["wheel-tool"])
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_editable", lambda settings=None: [])
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: "nowhere")
    monkeypatch.setattr(module.site, "getsitepackages", list)
    monkeypatch.setattr(module.sys, "prefix", "a virtual environment")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return module


def install_torch(folder, version, headers=True):
    information = folder / f"torch-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (folder / "torch" / ("include" if headers else "lib")).mkdir(parents=True)
    return str(folder)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.13.0+cu130", "3.0.0a0+git0123abc"])
def test_installed_torch_is_lent_and_nothing_asked(backend, monkeypatch, tmp_path, version):
    folder = install_torch(tmp_path, version)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: folder)
    assert backend.get_requires_for_build_wheel() == ["wheel-tool"]
    assert backend.get_requires_for_build_editable() == []
    assert sys.path[-1] == folder, "behind the build environment, whose setuptools must win"
    assert sys.path.count(folder) == 1


def test_torch_of_the_base_installation_is_found_from_a_venv_that_sees_it(backend, monkeypatch, tmp_path):
    folder = install_torch(tmp_path, "2.13.0")
    monkeypatch.setattr(backend.site, "getsitepackages", lambda: [folder])
    assert backend.torch_requirement() == []


def test_torch_of_the_user_is_found_outside_a_venv_only(backend, monkeypatch, tmp_path):
    folder = install_torch(tmp_path, "2.13.0")
    monkeypatch.setattr(backend.site, "getusersitepackages", lambda: folder)
    assert backend.torch_requirement() == ["torch>=2.11"]
    monkeypatch.setattr(backend.sys, "prefix", sys.base_prefix)
    assert backend.torch_requirement() == []


def test_torch_is_asked_for_where_there_is_none(backend):
    before = list(sys.path)
    assert backend.get_requires_for_build_wheel() == ["wheel-tool", "torch>=2.11"]
    assert backend.get_requires_for_build_editable() == ["torch>=2.11"]
    assert sys.path == before


@pytest.mark.parametrize(("version", "headers"), [("2.10.1", True), ("1.13.1", True), ("2.13.0", False)])
def test_torch_is_asked_for_where_it_is_too_old_or_has_no_headers(backend, monkeypatch, tmp_path, version, headers):
    folder = install_torch(tmp_path, version, headers)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: folder)
    assert backend.get_requires_for_build_wheel() == ["wheel-tool", "torch>=2.11"]


def test_old_setuptools_gets_one_clear_error(backend, monkeypatch):
    monkeypatch.setattr(backend, "setuptools_version", "65.5.0")
    with pytest.raises(SystemExit, match=r"needs setuptools>=77\.0, found 65\.5\.0; run pip install -U setuptools"):
        backend.prepare_metadata_for_build_wheel("unused")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FEWSHOT_EXT_CUDA": "yes"}, "FEWSHOT_EXT_CUDA: expected 0 or 1, got 'yes'"),
        (
            {"FEWSHOT_EXT_CUDA": "1", "CUDA_HOME": "/nonexistent"},
            "FEWSHOT_EXT_CUDA=1, but no CUDA toolkit was found; set CUDA_HOME",
        ),
    ],
)
def test_build_settings_get_one_clear_error(settings, message):
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=CHECKOUT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_pip_builds_in_isolation_against_the_installed_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", tmp_path, CHECKOUT],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Collecting torch" not in done.stdout
    assert [wheel.name for wheel in tmp_path.glob("fewshot_ext-*-cp310-abi3-*.whl")]
