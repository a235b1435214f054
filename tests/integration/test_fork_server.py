"""What the other tests run their commands in: a command ends as it would by itself, and leaves nothing behind."""

from __future__ import annotations

import fcntl
import signal
import sys

import pytest

from .nnunet import fork_server

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path):
    def run(program: str, *words: str, seconds: int = 60, **environment: str):
        script = tmp_path / "program.py"
        script.write_text(program)
        return fork_server().run([sys.executable, str(script), *words], environment, seconds)

    return run


def test_it_has_its_own_words_environment_and_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    look = "import os, sys; print([sys.argv[1:], dict(os.environ), os.getcwd(), sys.stdin.read()])"
    for environment in ({"A": "1", "nnUNet_raw": "x"}, {"B": "2"}):
        ended = run(look, "a word", *environment, **environment)
        assert ended.stdout == f"{[['a word', *environment], environment, str(tmp_path), '']}\n"


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import sys; print('out'); sys.exit(3)", 3, "out\n"),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("import atexit; atexit.register(print, 'bye'); raise ValueError('no')", 1, "ValueError: no\nbye\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import os, sys; print('err', file=sys.stderr); os._exit(0)", 0, "err\n"),
    ],
)
def test_it_ends_with_its_own_code_and_output(run, program, code, said):
    ended = run(program)
    assert ended.returncode == code and ended.stdout.endswith(said)


def test_a_command_that_hangs_is_killed(run):
    assert run("import time; time.sleep(60)", seconds=1).returncode == -signal.SIGALRM


def test_what_a_command_started_ends_with_it(run, tmp_path):
    held = tmp_path / "held"
    child = (
        f"import fcntl, time; held = open({str(held)!r}, 'w'); fcntl.flock(held, fcntl.LOCK_EX);"
        "print('ready', flush=True); time.sleep(20); held.write('alive')"
    )
    program = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], stdout=-1).stdout.readline()"
    )
    assert run(program).returncode == 0
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is gone, by itself or not
        assert file.read() == ""


def test_of_two_commands_each_draws_its_own_numbers(run):
    drawn = {run("import random, numpy; print(random.random(), numpy.random.rand())").stdout for _ in range(2)}
    assert len(drawn) == 2
    one, two = (line.split() for line in drawn)
    assert one[0] != two[0] and one[1] != two[1]
