"""Commands as they are installed, in processes of their own. What they do is tested elsewhere; plan, install, compress,
train and predict are started so in the tests of what they do.
"""

from __future__ import annotations

import json

import pytest

from .nnunet import NnUNet

pytestmark = pytest.mark.slow


def test_doctor_finds_nothing_that_stops_training(tmp_path):
    here = NnUNet.below(tmp_path)
    for folder in (here.raw, here.preprocessed, here.results):
        folder.mkdir()
    said = here.run("nnUNetv2_sauron", "doctor", "--json", anew=True)
    told = json.loads(said[said.index("{") :])
    assert told["ok"]


def test_demo_refuses_a_folder_of_other_things(tmp_path):
    (tmp_path / "thesis.tex").touch()
    said = NnUNet.below(tmp_path).run("nnUNetv2_sauron", "demo", "-o", tmp_path, fails=True, anew=True)
    assert "thesis.tex" in said
