"""The rooms of the package, and the one way in which their imports run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nnunet_sauron

PACKAGE = Path(nnunet_sauron.__file__).parent
ROOT = Path(__file__).parents[1]
DESIGN = ROOT / "docs" / "design.md"
NAMED = re.compile(r"`([\w.]+)`\)? in `([\w/]+\.py)`")
# Each room, and those that it may import from. A room is a package, or a module that lies beside them.
BELOW = {
    "runtime": set(),
    "files": set(),
    "threads": set(),
    "console": set(),
    "pruning": set(),
    "datasets": {"files", "runtime"},
    "methods": {"pruning"},
    "plugin": {"files", "console"},
    "model": {"files", "console", "pruning", "plugin", "runtime"},
    "planning": {"files", "console", "pruning", "plugin", "model"},
    "trainers": {"files", "console", "pruning", "methods", "plugin", "model"},
    "compression": {"files", "console", "pruning", "methods", "plugin", "model", "planning", "trainers"},
    "deploy": {"files", "console", "plugin", "model", "compression", "runtime"},
    "analysis": {"files", "console", "pruning", "plugin", "model", "runtime"},
    "dataset_conversion": {"files", "console", "plugin", "model"},
    "demo": {"files", "console", "datasets", "plugin", "threads", "analysis", "runtime"},
    "cli": {"console", "plugin", "model", "planning", "compression", "deploy", "analysis", "demo", "runtime"},
}
# Where the whole package is installed as well, its command with all verbs takes over.
EXCEPTION = ("runtime/cli.py", "cli")
# nnU-Net imports these from its own folder, to find our classes: they are above everything.
SHIMS = ("plugin/shims", "plugin/planner_shim")


def imports(source: str, place: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and room of every import from this package, also of those inside functions.

    Args:
        source: A module's text.
        place: The packages that it lies in, from `nnunet_sauron` on.
    """
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = place[: len(place) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            # `from .. import __version__` names no room, `from .. import trainers` does.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "nnunet_sauron" else [base]
        for name in names:
            package, _, rest = name.partition(".")
            room = rest.split(".")[0]
            if package == "nnunet_sauron_runtime":
                yield node.lineno, "runtime"
            elif package == "nnunet_sauron" and room and room != "__version__":
                yield node.lineno, room


def wrong(path: Path, source: str) -> list[str]:
    """A line for each import of a module that runs upwards or sideways."""
    place = ("nnunet_sauron", *path.parent.parts)
    room = path.parts[0] if len(path.parts) > 1 else path.stem
    return [
        f"{path}:{line} imports {other}, which is not below {room}"
        for line, other in imports(source, place)
        if other not in (room, *BELOW[room]) and (path.as_posix(), other) != EXCEPTION
    ]


def modules() -> dict[Path, Path]:
    """Every module's place in the package, and its file; those of two rooms lie beside the package."""
    found = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
    found |= {path.relative_to(ROOT): path for path in (ROOT / "dataset_conversion").rglob("*.py")}
    found |= {Path("runtime", path.name): path for path in (ROOT / "runtime/nnunet_sauron_runtime").glob("*.py")}
    return {path: found[path] for path in sorted(found) if not path.as_posix().startswith(SHIMS)}


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_from_those_below_it(room: str) -> None:
    of_room = {path: file for path, file in modules().items() if path.parts[0].removesuffix(".py") == room}
    assert of_room, f"there is no room {room}"
    assert [line for path, file in of_room.items() for line in wrong(path, file.read_text("utf-8"))] == []


def test_every_module_is_in_a_room() -> None:
    assert {path.parts[0].removesuffix(".py") for path in modules()} == {*BELOW, "__init__"}


def test_below_runs_one_way() -> None:
    ordered: list[str] = []
    for room, below in BELOW.items():
        assert below <= {*ordered}, f"{room} must come after {below - {*ordered}}"
        ordered.append(room)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pruning/channels.py", "from nnunet_sauron.model.trained import TrainedModel"),
        ("pruning/channels.py", "import nnunet_sauron.methods.sauron"),
        ("model/networks.py", "def find():\n    from .. import trainers"),
        ("methods/sauron.py", "from ..model.checkpoints import read_checkpoint"),
        ("analysis/report/compare.py", "from ...trainers.pruning import SERIES"),
        ("analysis/report/compare.py", "from ...compression import compress as one"),
        ("files.py", "from .console.terminal import plain_console"),
        ("pruning/channels.py", "from nnunet_sauron_runtime import Bundle"),
        ("runtime/bundle.py", "from nnunet_sauron.files import locked"),
    ],
)
def test_a_wrong_import_is_seen(path: str, source: str) -> None:
    assert len(wrong(Path(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("analysis/report/compare.py", "from ..cost import network_cost\nfrom .scores import score_model"),
        ("analysis/report/data.py", "from ... import __version__"),
        ("model/trained.py", "from ..pruning.channels import channel_layout\nimport torch\nfrom torch import nn"),
    ],
)
def test_a_right_import_is_let_through(path: str, source: str) -> None:
    assert wrong(Path(path), source) == []


def test_the_walks_name_what_is_there() -> None:
    """`NAME` in `FILE` of docs/design.md, a name such as Class.method."""
    named = NAMED.findall(" ".join(DESIGN.read_text("utf-8").split()))
    assert len(named) > 40
    missing = []
    for name, path in named:
        inside = ast.parse((PACKAGE / path).read_text("utf-8")).body
        for part in name.split("."):
            inside = next((node.body for node in inside if getattr(node, "name", None) == part), None)
            if inside is None:
                missing.append((name, path))
                break
    assert missing == []
