"""What is built from this tree holds what it should, and installs without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import nnunet_sauron

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; import sys; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tree: a build leaves folders behind, and what an earlier one left would be built again."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    left_out = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", ".*_cache", ".venv", "venv")
    shutil.copytree(ROOT, copy, ignore=left_out)
    return copy


def built(source: Path, what: str, folder: Path) -> Path:
    command = [sys.executable, "-c", BUILD, what, str(folder)]
    told = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True).stdout
    return folder / told.splitlines()[-1]


def test_a_wheel_holds_every_file_of_the_package_and_installs_offline(source, tmp_path):
    wheel = built(source, "build_wheel", tmp_path)
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = files_of(source, "nnunet_sauron") | files_of(source / "runtime", "nnunet_sauron_runtime")
    there |= {f"nnunet_sauron/{name}" for name in files_of(source, "dataset_conversion")}
    assert held == there and {"nnunet_sauron/py.typed", "nnunet_sauron/dataset_conversion/msd.py"} < held
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", tmp_path / "site"]
    subprocess.run([*install, wheel], check=True)
    code = "import nnunet_sauron.plugin as p; print(p.trainer_folder())"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert Path(told.strip()).is_relative_to(tmp_path / "site")
    assert (Path(told.strip()) / "nnunet_sauron_trainers.py").is_file()


def files_of(folder: Path, package: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in (folder / package).rglob("*") if path.is_file()}


def test_the_runtime_is_a_wheel_of_its_own_of_the_same_version(source, tmp_path):
    with zipfile.ZipFile(built(source / "runtime", "build_wheel", tmp_path)) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        told = message_from_bytes(wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))))
    assert held == files_of(source / "runtime", "nnunet_sauron_runtime")
    assert (told["Name"], told["Version"]) == ("nnunet-sauron-runtime", nnunet_sauron.__version__)
    needed = {re.match("[A-Za-z]+", line)[0] for line in told.get_all("Requires-Dist") if "extra" not in line}
    assert needed == {"numpy", "scipy", "SimpleITK", "openvino"}


def test_a_source_distribution_holds_tests_and_docs(source, tmp_path):
    with tarfile.open(built(source, "build_sdist", tmp_path)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "dataset_conversion/raw_dataset/cases.py",
        "docs/design.md",
        "nnunet_sauron/dataset_conversion/__init__.py",
        "runtime/pyproject.toml",
        "tests/test_packaging.py",
        "LICENSE",
        "README.md",
        "benchmarks/study/run.py",
    ):
        assert name in held
