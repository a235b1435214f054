"""README and docs: links lead somewhere, commands and settings are ones that exist."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from nnunet_sauron import cli, trainers
from nnunet_sauron.planning import planners
from nnunet_sauron.trainers.settings import VARIABLE, Given

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.append(ROOT / "benchmarks" / "results" / "README.md")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
SETTINGS = re.compile(rf'{VARIABLE}="([^"]*)"')


def commands() -> list[tuple[str, str]]:
    """Every indented line that calls one of nnU-Net's or our commands, with its page; comments are left out."""
    found = []
    for page in PAGES[:-1]:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("    ") and "nnUNetv2_" in line:
                found += [(page.name, part.strip()) for part in line.split("&&") if "nnUNetv2_" in part]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_there_are_commands():
    assert len(commands()) > 25


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_is_one_that_exists(page, line, monkeypatch):
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words.pop(0)
    if words[0] == "nnUNetv2_sauron":
        assert cli._parser().parse_args(words[1:]).verb == words[1]
        return
    if "-tr" in words:
        assert words[words.index("-tr") + 1] in trainers.__all__
    if "-pl" in words:
        assert hasattr(planners, words[words.index("-pl") + 1])


@pytest.mark.parametrize(("page", "line"), [pair for pair in commands() if SETTINGS.search(pair[1])])
def test_settings_are_ones_that_its_trainer_has(page, line, monkeypatch, tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)
    trainer = getattr(trainers, words[words.index("-tr") + 1])
    for name in os.environ:
        if name.lower() == VARIABLE:
            monkeypatch.delenv(name)
    monkeypatch.setenv(VARIABLE, SETTINGS.search(line)[1])
    Given(trainer, *trainer.settings_classes()).settings()


def test_readme_is_a_page_or_two():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 120
