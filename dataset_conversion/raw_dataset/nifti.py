"""NIfTI and MINC files as nnU-Net reads them: opened, all of their values read, and what is wrong told by name."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

from ...model.reading import check_file
from .cases import Image, Mask

# Of a value that was stored as float, from the whole number that it stands for: some of ATLAS's masks hold 0.9999.
ROUNDING = 1e-3
LARGEST = float(np.finfo(np.float32).max)  # nnU-Net reads images as float32
# How far a voxel of the segmentation may lie from the same voxel of the image, in voxels. Real pairs differ by
# rounding, thousandths of that; half a voxel would move every contour.
TOLERANCE = 0.1


def read_mask(mask: Mask) -> tuple[nibabel.Nifti1Image, np.ndarray]:
    """A mask's file, opened, and its values as they will be written: whole numbers (x, y, z), uint8 if they fit.

    Raises:
        ValueError: The file is damaged, has other than three axes, values that are no whole numbers, or ones that
            `mask.values` does not name.
    """
    stored = _opened(mask.file)
    found = _data(stored, mask.file)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{mask.file} has values of type {found.dtype}, expected whole numbers")
    if found.dtype.kind == "f":
        if mask.shifted and _is_shifted(found):
            found = np.where(found > found.min() + 0.5, 1.0, 0.0)
        if not (whole := np.isfinite(found) & (np.abs(found - np.rint(found)) <= ROUNDING)).all():
            raise ValueError(
                f"{mask.file} has {np.count_nonzero(~whole)} values that are no whole numbers, such as "
                f"{found[~whole].flat[0]:g}; a segmentation has one whole number a voxel"
            )
        if found.any() and not np.rint(found).any():
            raise ValueError(
                f"{mask.file} has no value above {found.max():g}, which rounds to 0; expected whole numbers"
            )
        found = np.rint(found)
    there = np.unique(found).astype(np.int64)
    if mask.values is not None and (unknown := sorted(set(there.tolist()) - {0, *mask.values})):
        raise ValueError(f"{mask.file} has the values {some(unknown)}; expected {some([0, *mask.values])}")
    written = np.array([0 if v == 0 else v if mask.values is None else mask.values[v] for v in there.tolist()])
    kind = np.result_type(*(np.min_scalar_type(int(value)) for value in (written.min(), written.max())))
    if mask.values is None:  # without the numbers below, of 8 bytes a voxel
        return stored, np.asarray(found).astype(kind, copy=False)
    return stored, written.astype(kind)[np.searchsorted(there, found)]


def is_minc(file: Path) -> bool:
    """Whether a file is not of NIfTI, and must be written anew."""
    return file.suffix.lower() == ".mnc"


def load(file: Path) -> nibabel.Nifti1Image:
    """A file, opened; MINC, whose axes are z, y, x, as x, y, z from left to right, back to front, bottom to top."""
    stored = nibabel.load(file)
    if not is_minc(file):
        return stored
    canonical = nibabel.as_closest_canonical(stored)
    image = nibabel.Nifti1Image(np.asanyarray(canonical.dataobj, dtype=np.float32), canonical.affine)
    image.file_map["image"].filename = str(file)
    return image


def affine_of(stored: nibabel.Nifti1Image) -> np.ndarray:
    """From voxels to mm (right, front, top), as nnU-Net's reader, SimpleITK, understands a file.

    Where sform and qform tell two spacings, as in most files of ACDC, nibabel takes the sform's, SimpleITK the qform's.

    Raises:
        RuntimeError: SimpleITK does not take the file.
    """
    if is_minc(Path(stored.get_filename())):  # is written anew
        return stored.affine
    reader, warns = SimpleITK.ImageFileReader(), SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    reader.SetFileName(stored.get_filename())
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # it warns of two spacings, once a file
    try:
        reader.ReadImageInformation()
    finally:
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(warns)
    axes = reader.GetDimension()
    matrix = np.reshape(reader.GetDirection(), (axes, axes)) * reader.GetSpacing()
    to_right_and_front = np.diag([-1, -1, 1, 1])
    return to_right_and_front @ nibabel.affines.from_matvec(matrix[:3, :3], reader.GetOrigin()[:3])


def check_same_place(one: nibabel.Nifti1Image, other: nibabel.Nifti1Image) -> None:
    """Raise ValueError unless two images have the same shape and every voxel the same place, within `TOLERANCE`."""
    shape, other_shape = one.shape[:3], other.shape[:3]
    names = [image.get_filename() for image in (one, other)]
    if shape != other_shape:
        raise ValueError(f"{names[1]} has the shape {other_shape}, {names[0]} {shape}; they must be the same")
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(length - 1 for length in shape), 1]
    affine, other_affine = affine_of(one), affine_of(other)
    away = np.linalg.norm(corners @ (affine - other_affine).T, axis=1).max()
    if away > TOLERANCE * min(nibabel.affines.voxel_sizes(affine)):
        raise ValueError(
            f"{names[1]} ({_place(other_affine)}) lies elsewhere than {names[0]} ({_place(affine)}): voxels are up to "
            f"{away:.3g} mm apart"
        )


def read_image(image: Image, volumes: int, labels: frozenset[int]) -> nibabel.Nifti1Image:
    """One channel, opened.

    Raises:
        ValueError: It is damaged, has other than three axes (or `volumes` along a fourth one), values that are not
            finite, the same value everywhere, labels for values, or a geometry that nnU-Net's reader does not take.
    """
    stored = _opened(image.file, image.channel)
    if image.channel is not None and stored.shape[3:] != (volumes,):
        raise ValueError(f"{image.file} has the shape {stored.shape}; expected {volumes} volumes, one a channel")
    found = _data(stored, image.file, image.channel)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{image.file} has values of type {found.dtype}, expected one number a voxel")
    if found.dtype.kind == "f" and (bad := found.size - np.count_nonzero((found >= -LARGEST) & (found <= LARGEST))):
        raise ValueError(f"{image.file} has {bad} values that are nan or infinite, as float32 at least")
    low, high = found.min(), found.max()
    if low == high:
        raise ValueError(f"{image.file} has the value {low:g} everywhere; expected an image")
    if low >= 0 and high <= max(labels, default=0) and {*np.unique(found).tolist()} <= labels:
        raise ValueError(f"{image.file} has no values but the labels'; expected an image, not a segmentation")
    return stored


def _opened(file: Path, channel: int | None = None) -> nibabel.Nifti1Image:
    check_file(file)
    _check_ending(file)
    try:
        stored = load(file)
        affine, shape = stored.affine, stored.shape
    except ImportError as error:
        raise ValueError(f"{file} cannot be read without {error.name}: pip install {error.name}") from error
    except Exception as error:  # nibabel's own, of many kinds
        kind = "MINC" if is_minc(file) else "NIfTI"
        raise ValueError(f"{file} is no {kind} file that can be read: {error}") from error
    if len(shape) != (3 if channel is None else 4) and not (len(shape) > 3 and set(shape[3:]) == {1}):
        wanted = "three axes" if channel is None else "four axes"
        raise ValueError(f"{file} has the shape {shape}, expected {wanted}")
    if 0 in shape or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise ValueError(f"{file} has the shape {shape} and an affine that gives voxels no size: {affine.tolist()}")
    try:
        affine_of(stored)
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1]
        raise ValueError(f"{file} cannot be read by SimpleITK, which nnU-Net reads NIfTI with: {why}") from error
    return stored


def _check_ending(file: Path) -> None:
    """Raise ValueError if a name's ending is not that of the contents."""
    with file.open("rb") as opened:
        first = opened.read(4)
    named = file.name.lower().endswith(".gz")
    if first[:2] == b"\x1f\x8b" and not named:
        raise ValueError(f"{file} is compressed, though its name says otherwise; rename it to end in .nii.gz")
    if named and {int.from_bytes(first, order) for order in ("little", "big")} & {348, 540}:
        raise ValueError(f"{file} is not compressed, though its name says otherwise; rename it to end in .nii")


def _data(stored: nibabel.Nifti1Image, file: Path, channel: int | None = None) -> np.ndarray:
    """All voxels (x, y, z) of a file, or of one of its channels, in the type in which they are stored if unscaled."""
    try:
        data = np.asanyarray(stored.dataobj) if channel is None else np.asanyarray(stored.dataobj[..., channel])
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{file} is damaged or was cut short: {error}. Copy it anew.") from error
    return data.reshape(data.shape[:3])


def _is_shifted(found: np.ndarray) -> bool:
    low, high = found.min(), found.max()
    apart = abs(high - low - 1) < 0.01 and abs(low - np.rint(low)) > ROUNDING
    return bool(apart and ((found == low) | (found == high)).all())


def _place(affine: np.ndarray) -> str:
    spacing, origin = nibabel.affines.voxel_sizes(affine), affine[:3, 3]
    axes = "".join(nibabel.aff2axcodes(affine))
    return f"spacing {np.round(spacing, 5).tolist()} mm, origin {np.round(origin, 4).tolist()}, axes {axes}"


def some(values: list) -> str:
    """The first ten of them, for an error."""
    return ", ".join(f"{value:g}" for value in values[:10]) + (", ..." if len(values) > 10 else "")
