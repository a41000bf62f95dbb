"""PEP 517 backend: setuptools, compiled against the torch that is already installed.

A requirement ``torch`` in ``[build-system]`` would make pip's isolated build download a second torch,
gigabytes of it, and compile against that one instead of the user's. Isolation hides the user's site-packages
from ``sys.path`` but leaves ``sysconfig`` and ``site`` as they are, so a fit torch can still be found and
lent to the build. Only where there is none is torch asked for. Frontends that isolate by a virtual
environment of their own (``python -m build``, uv) show the backend an interpreter without torch: they need
``--no-isolation`` for the same.
"""

import os
import re
import site
import sys
import sysconfig
from importlib import metadata

from setuptools import __version__ as setuptools_version
from setuptools import build_meta

MINIMUM_TORCH = (2, 11)
# The first setuptools that takes the SPDX license expression of pyproject.toml.
MINIMUM_SETUPTOOLS = (77, 0)

get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist


def site_folders():
    """Folders where the interpreter that will use the package finds its installed packages."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        # pip sets PYTHONNOUSERSITE for the build, so site.ENABLE_USER_SITE no longer tells.
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(folders))


def release(version):
    """Leading numbers of a version: ``"2.13.0+cpu"`` is (2, 13)."""
    return tuple(int(number) for number in re.match(r"(\d+)\.(\d+)", version).groups())


def find_torch(folders):
    """First folder whose torch is recent enough to compile against, or None."""
    for folder in folders:
        for distribution in metadata.distributions(name="torch", path=[folder]):
            has_headers = os.path.isdir(os.path.join(folder, "torch", "include"))
            if has_headers and release(distribution.version) >= MINIMUM_TORCH:
                return folder
    return None


def lend_torch():
    """Make an installed torch importable for the build; False where there is none to lend."""
    folder = find_torch(site_folders())
    if folder is not None and folder not in sys.path:
        # Last, so that the setuptools of the build environment keeps precedence over the user's.
        sys.path.append(folder)
    return folder is not None


def torch_requirement():
    return [] if lend_torch() else [f"torch>={'.'.join(map(str, MINIMUM_TORCH))}"]


def check_setuptools():
    if release(setuptools_version) < MINIMUM_SETUPTOOLS:
        needed = ".".join(map(str, MINIMUM_SETUPTOOLS))
        raise SystemExit(
            f"fewshot_ext: building needs setuptools>={needed}, found {setuptools_version}; "
            "run pip install -U setuptools ninja, or build without --no-build-isolation"
        )


def get_requires_for_build_wheel(config_settings=None):
    check_setuptools()
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    check_setuptools()
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirement()


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    lend_torch()
    check_setuptools()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    lend_torch()
    check_setuptools()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    lend_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    lend_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
