"""Feature maps to look at: pictures of one slice and, for viewers, volumes.

A picture has image, reference and prediction on top, then every map in grey. It stands upright as radiologists look at
slices, whatever order the image is stored in: the patient's front or head on top, their right (or front) on the left,
with letters that say so. Where the image does not tell directions, it is drawn as it is stored, the first row on top.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import SimpleITK
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from ...files import check_writable, new_folder
from ...model.reading import check_file
from ..plot_text import as_is, font_families
from .grid import Grid
from .maps import FeatureMaps
from .windows import Bar, silent

COLUMNS, ROWS = 8, 6  # of maps on a page, at most
MOST_INPUTS = 4  # channels of the image beside reference and prediction
DPI = 150
WIDTH, MARGIN, GAP, LINE = 10.0, 0.35, 0.12, 0.2  # inches; for A4 with its margins when printed
WIDEST = 2.9  # of the image
SHEET = 40.0  # more than any page is high
LEGEND_COLUMNS = 5
# Height over width of a map's panel; very long or very flat slices do not fill it.
FLATTEST, LONGEST = 0.4, 1.6
# Voxels stay squares where there is room for them; where there is not, none is left out.
SAMPLING = "antialiased"
DIRECTIONS = ("RL", "AP", "IS")  # ITK's axes: from their low end to their high one
ON_TOP_OR_LEFT = "RAS"
TITLE, TEXT = {"size": 13, "weight": "bold"}, {"size": 10}


def check_output(folder: Path) -> None:
    """Raise OSError if there is a file of that name, a folder with something in it, or one that cannot be written."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; give another -o, or remove it first.")
    check_writable(folder)


def write(maps: FeatureMaps, folder: Path, nifti: bool = False, bar: Bar = silent) -> list[Path]:
    """Write pictures and, if asked for, volumes: into a folder beside, which is then moved to its place.

    Returns:
        The files, pictures first.

    Raises:
        FileExistsError: The folder exists and is not empty.
        OSError: It could not be written, and nothing was.
    """
    check_output(folder)
    with new_folder(folder) as beside:
        files = draw(maps, beside) + (write_nifti(maps, beside, bar) if nifti else [])
    return [folder / path.name for path in files]


def draw(maps: FeatureMaps, folder: Path) -> list[Path]:
    """Write pages of at most 8 x 6 maps as PNG; image, reference and prediction are on the first one.

    Every map is scaled by its own smallest and largest value in this slice, which stand above it behind the channel's
    number.

    Args:
        maps: What `feature_maps` returned.
        folder: Where to write; made if missing, and what it holds of these names is overwritten.

    Returns:
        The files written, in order: feature_maps_1.png, ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    upright = _Upright(maps.grid)
    pages = np.array_split(np.arange(len(maps.maps)), math.ceil(len(maps.maps) / (COLUMNS * ROWS)))
    files = []
    with matplotlib.rc_context({"font.family": font_families()}):
        for number, channels in enumerate(pages, 1):
            files.append(folder / f"feature_maps_{number}.png")
            _page(maps, upright, channels, number, len(pages)).save(files[-1])
    return files


def write_nifti(maps: FeatureMaps, folder: Path, bar: Bar = silent) -> list[Path]:
    """Write every map's whole volume (map_000.nii.gz, ...), the image, the prediction and the reference.

    The volumes have the grid's voxels, and lie where the original image does: a viewer overlays them on it. Axes are
    in the order of nnU-Net's reader. While it runs, all maps lie uncompressed in a file of the folder, which has no
    name, 4 bytes a voxel, and not in memory.

    Args:
        maps: What `feature_maps` returned; the network runs once more.
        folder: Where to write; made if missing, and what it holds of these names is overwritten.
        bar: Shows progress.

    Returns:
        The files written: image, prediction, reference, maps.

    Raises:
        OSError: There is no room for a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    several = len(maps.image) > 1
    volumes = {f"image_{i:04d}" if several else "image": channel for i, channel in enumerate(maps.image)}
    volumes["prediction"] = maps.prediction
    if maps.reference is not None:
        volumes["reference"] = maps.reference
    files = [_write_volume(volume, maps.grid, folder / f"{name}.nii.gz") for name, volume in volumes.items()]
    gathered = maps.windows.volumes(folder, bar)
    with bar("writing", len(gathered)) as step:
        for channel, volume in enumerate(gathered):
            files.append(_write_volume(volume, maps.grid, folder / f"map_{channel:03d}.nii.gz"))
            step(files[-1].name)
    return files


class _Upright:
    """How a slice (rows, columns) is turned for looking at it.

    Attributes:
        aspect: Height over width of a voxel, turned.
        letters: Left, right, top and bottom, turned; empty where directions are not known.
    """

    def __init__(self, grid: Grid):
        directions = grid.affine[:3, 1:3] / grid.spacing[1:]
        patient = np.abs(directions).argmax(axis=0)  # the patient's axis that rows, and columns, are nearest to
        self.turns, self.flips, self.letters = False, (False, False), ""
        if grid.oriented and patient[0] != patient[1]:
            self.turns = bool(patient[0] < patient[1])  # the patient's higher axis is drawn upright
            ends = [DIRECTIONS[axis][:: int(np.sign(directions[axis, i]))] for i, axis in enumerate(patient)]
            ends = ends[::-1] if self.turns else ends
            self.flips = tuple(pair[0] not in ON_TOP_OR_LEFT for pair in ends)
            rows, columns = (pair[::-1] if flip else pair for pair, flip in zip(ends, self.flips, strict=True))
            self.letters = columns + rows
        height, width = grid.spacing[1:]
        self.aspect = width / height if self.turns else height / width

    def __call__(self, plane: np.ndarray) -> np.ndarray:
        plane = plane.T if self.turns else plane
        return plane[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]


class _Sheet:
    """A figure that is filled from the top; empty space below is cut off. Lengths are in inches."""

    def __init__(self):
        self.figure = Figure(figsize=(WIDTH, SHEET))
        self.top = MARGIN

    def text(self, text: str, style: dict) -> None:
        self.figure.text(MARGIN / WIDTH, 1 - self.top / SHEET, as_is(text), va="top", **style)
        self.top += LINE * style["size"] / TEXT["size"]

    def row(self, count: int, width: float, height: float, left: float = MARGIN) -> list[Axes]:
        """Axes side by side, with room for a title above and a gap below."""
        self.top += LINE + height
        lefts = [left + i * (width + GAP) for i in range(count)]
        size = (width / WIDTH, height / SHEET)
        axes = [self.figure.add_axes((left / WIDTH, 1 - self.top / SHEET, *size)) for left in lefts]
        self.top += GAP
        return axes

    def legend(self, entries: dict[str, tuple]) -> None:
        handles = [Patch(color=colour, label=as_is(name)) for name, colour in entries.items()]
        at = {"loc": "upper center", "bbox_to_anchor": (0.5, 1 - self.top / SHEET)}
        self.figure.legend(handles=handles, ncol=LEGEND_COLUMNS, frameon=False, fontsize=TEXT["size"], **at)
        self.top += LINE * (math.ceil(len(entries) / LEGEND_COLUMNS) + 0.5)

    def save(self, path: Path) -> None:
        used = self.top + MARGIN
        self.figure.savefig(path, dpi=DPI, bbox_inches=Bbox(((0, SHEET - used), (WIDTH, SHEET))))


def _page(maps: FeatureMaps, upright: _Upright, channels: Sequence[int], number: int, pages: int) -> _Sheet:
    sheet = _Sheet()
    for text, style in _title(maps, channels, number, pages):
        sheet.text(text, style)
    rows, columns = upright(maps.maps[0]).shape
    ratio = min(max(upright.aspect * rows / columns, FLATTEST), LONGEST)
    inner = WIDTH - 2 * MARGIN + GAP
    if number == 1:
        sheet.top += LINE / 2
        panels, colours = _panels(maps), _colours(maps)
        width = min(inner / len(panels) - GAP, WIDEST)
        left = (WIDTH + GAP - len(panels) * (width + GAP)) / 2
        for axes, panel in zip(sheet.row(len(panels), width, width * ratio, left), panels, strict=True):
            _show_image(axes, upright, maps, *panel, colours)
        sheet.legend({maps.classes.get(value, f"value {value}"): colour for value, colour in colours.items()})
    # As many maps side by side as give a page that is neither a strip nor a tower.
    across = min(COLUMNS, max(4, math.ceil(math.sqrt(1.6 * ratio * len(channels)))))
    width = inner / across - GAP
    for begin in range(0, len(channels), across):
        shown = channels[begin : begin + across]
        for axes, channel in zip(sheet.row(len(shown), width, width * ratio), shown, strict=True):
            _show_map(axes, upright, maps.maps[channel], channel)
    foot = "Each map is drawn from black, its smallest value in this slice, to white, its largest; both stand above it."
    sheet.text(foot, {"size": 8, "color": "0.35"})
    return sheet


def _title(maps: FeatureMaps, channels: Sequence[int], number: int, pages: int) -> list[tuple[str, dict]]:
    layer = maps.layer
    strides = " x ".join(str(stride) for stride in layer.strides)
    resolution = "full resolution" if max(layer.strides) == 1 else f"one voxel for {strides} of the image"
    which = f", here {channels[0]} to {channels[-1]} (page {number} of {pages})" if pages > 1 else ""
    lines = [maps.model, f"{layer.channels} channels{which}, {resolution}"]
    if len(maps.prediction) > 1:
        lines.append(
            f"slice {maps.slice_index} of 0 to {len(maps.prediction) - 1} that the network sees; in the original image "
            f"{maps.grid.slice_axis} = {maps.grid.original_slice(maps.slice_index)}, counted from 0"
        )
    lines += [maps.note] if maps.note else []
    first = textwrap.wrap(f"{maps.case}: feature maps of {layer.name}", 75)
    return [(text, TITLE) for text in first] + [(part, TEXT) for text in lines for part in textwrap.wrap(text, 105)]


def _panels(maps: FeatureMaps) -> list[tuple[str, int, np.ndarray | None]]:
    """The panels above the maps, as title, channel of the image, and segmentation to lay over it."""
    panels: list[tuple[str, int, np.ndarray | None]] = []
    panels += [(name, i, None) for i, name in enumerate(maps.input_channels[:MOST_INPUTS])]
    panels += [("reference", 0, maps.reference)] if maps.reference is not None else []
    return [*panels, ("prediction", 0, maps.prediction)]


def _colours(maps: FeatureMaps) -> dict[int, tuple[float, ...]]:
    """Colours of the values that this slice has; a class has the same one in every picture of a model."""
    shown = [labels[maps.slice_index] for labels in (maps.prediction, maps.reference) if labels is not None]
    there = np.unique(np.concatenate(shown)).tolist()
    # Values that have no name of their own, in nested regions, share the colour of the region.
    names = {value: maps.classes.get(value, value) for value in sorted({*maps.classes, *there} - {0})}
    order = list(dict.fromkeys(names.values()))
    palette = "tab10" if len(order) <= 10 else "tab20" if len(order) <= 20 else "hsv"
    # hsv is a circle: its last colour is its first.
    pick = colormaps[palette].resampled(len(order) + 1) if palette == "hsv" else colormaps[palette]
    return {value: pick(order.index(names[value])) for value in there if value}


def _show_image(
    axes: Axes, upright: _Upright, maps: FeatureMaps, title: str, channel: int, labels: np.ndarray | None,
    colours: dict[int, tuple[float, ...]],
) -> None:  # fmt: skip
    plane = upright(maps.image[channel, maps.slice_index])
    # Single bright voxels (vessels, metal) would leave the rest dark.
    low, high = np.percentile(plane, (0.5, 99.5))
    axes.imshow(plane, cmap="gray", vmin=low, vmax=high, aspect=upright.aspect, interpolation=SAMPLING)
    axes.set_title(as_is(title), size=11)
    if labels is not None:
        labels = upright(labels[maps.slice_index])
        overlay = np.zeros((*labels.shape, 4))
        for value, colour in colours.items():
            overlay[labels == value] = (*colour[:3], 0.5)
        axes.imshow(overlay, aspect=upright.aspect, interpolation=SAMPLING)
    elif channel == 0:
        places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"),
                  (0.5, 0.02, "center", "bottom"))  # fmt: skip
        for letter, (x, y, ha, va) in zip(upright.letters, places, strict=False):
            outline = [withStroke(linewidth=2, foreground="black")]
            axes.text(x, y, letter, ha=ha, va=va, transform=axes.transAxes, color="w", size=10, path_effects=outline)
    _no_ticks(axes)


def _show_map(axes: Axes, upright: _Upright, plane: np.ndarray, channel: int) -> None:
    axes.imshow(upright(plane), cmap="gray", aspect=upright.aspect, interpolation=SAMPLING)
    low, high = plane.min(), plane.max()
    axes.set_title(str(channel), size=9, weight="bold", loc="left", pad=2)
    axes.set_title(f"{low:.2g} to {high:.2g}" if low < high else f"all {low:.2g}", size=8, loc="right", pad=2)
    _no_ticks(axes)


def _no_ticks(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("0.5")


def _write_volume(volume: np.ndarray, grid: Grid, path: Path) -> Path:
    """A volume on the grid, as an image with its axes in the order in which nnU-Net's reader has the original's."""
    back = np.argsort(grid.transpose_forward)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(volume.transpose(back)))
    columns = grid.affine[:3, back[::-1]]  # SimpleITK counts axes x, y, z
    spacing = np.linalg.norm(columns, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((columns / spacing).ravel().tolist())
    image.SetOrigin(grid.affine[:3, 3].tolist())
    try:
        SimpleITK.WriteImage(image, str(path), True)
        check_file(path)  # where the disk is full, the writer returns as if nothing were
    except (RuntimeError, ValueError) as error:
        raise OSError(f"{path.name} was not written to its end") from error
    return path
