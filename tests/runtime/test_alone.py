"""The runtime in an environment that has NumPy, SciPy, SimpleITK and an engine, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import nnunet_sauron_runtime
import numpy as np
import pytest
import SimpleITK

import nnunet_sauron

from .models import phantom, write_bundle, write_image, write_model

PACKAGES = ("numpy", "scipy", "simpleitk", "openvino", "openvino-telemetry", "onnxruntime")
RUN = """
import sys
from nnunet_sauron_runtime.cli import main
code = main()
sys.exit(code or [f"{name} was imported" for name in sys.modules if "telemetry" in name and "ovc" not in name] or 0)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A folder of links to those packages, to stand for site-packages."""
    place = tmp_path_factory.mktemp("bare")
    for name in PACKAGES:
        files = metadata.distribution(name).files
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (place / top).symlink_to(metadata.distribution(name).locate_file(top))
    (place / "nnunet_sauron_runtime").symlink_to(Path(nnunet_sauron_runtime.__file__).parent)
    return place


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("model")
    return write_bundle(place / "bundle.zip", write_model(place / "model", dim=2))


def run(bare: Path, *words: object) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(bare), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", RUN, *map(str, words)]  # without this environment's own packages
    return subprocess.run(command, env=environment, cwd=bare, capture_output=True, text=True)


def test_it_predicts_as_in_a_whole_environment(bare, bundle, tmp_path):
    write_image(tmp_path / "images/a_0000.nii.gz", phantom((3, 20, 30)))
    ran = run(bare, "predict", "-b", bundle, "-i", tmp_path / "images", "-o", tmp_path / "out", "--threads", 1)
    assert ran.returncode == 0, ran.stderr
    image = SimpleITK.ReadImage(str(tmp_path / "images/a_0000.nii.gz"))
    expected = nnunet_sauron_runtime.Bundle(bundle, threads=1).predict(image)
    found = SimpleITK.ReadImage(str(tmp_path / "out/a.nii.gz"))
    np.testing.assert_array_equal(*map(SimpleITK.GetArrayFromImage, (found, expected)))
    assert "[1/1] a" in ran.stderr


def test_a_package_that_is_missing_is_named_with_what_to_install(bare, bundle, tmp_path):
    for path in bare.iterdir():
        if path.name != "SimpleITK":
            (tmp_path / path.name).symlink_to(path)
    ran = run(tmp_path, "predict", "-b", bundle, "--check")
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1
    assert "the package SimpleITK is missing" in ran.stderr and "pip install ./runtime" in ran.stderr


def test_another_verb_says_what_to_install(bare):
    ran = run(bare, "compress", "-m", "model")
    assert (
        ran.returncode == 2
        and "`pip install .` in the top folder of its source" in ran.stderr
        and len(ran.stderr.splitlines()) == 1
    )


def test_it_has_the_version_of_the_whole_package(bare):
    assert nnunet_sauron_runtime.__version__ == nnunet_sauron.__version__
    assert run(bare, "--version").stdout == f"nnunet-sauron-runtime {nnunet_sauron.__version__}\n"


def test_where_all_is_installed_the_command_has_all_verbs(capsys):
    from nnunet_sauron_runtime.cli import main

    assert main([]) == 0
    told = capsys.readouterr().out
    assert "predict" in told and "compress" in told
