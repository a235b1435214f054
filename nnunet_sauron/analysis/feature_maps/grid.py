"""Where the voxels that a network sees lie in the original image, and in the patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from SimpleITK import DICOMOrientImageFilter

OPPOSITE = dict(zip("LRAPIS", "RLPASI", strict=True))


@dataclass(frozen=True, eq=False)
class Grid:
    """The preprocessed image's voxels: axes slice, row, column.

    Attributes:
        transpose_forward: For each axis the axis of the array (z, y, x) that it is, as nnU-Net's reader gives it.
        to_original: (4, 4): from indices to those of the array (z, y, x) in the image's file, which readers may turn.
        affine: (4, 4): from indices to mm, in ITK's directions (towards left, posterior, superior).
        oriented: Whether those directions are the patient's; an image such as PNG does not tell.
    """

    transpose_forward: tuple[int, ...]
    to_original: np.ndarray
    affine: np.ndarray
    oriented: bool

    @classmethod
    def of(cls, properties: dict, transpose_forward: Sequence[int], shape: Sequence[int]) -> Grid:
        """Where nnU-Net's preprocessing has put an image.

        Resampling leaves the outer edges where they are and rounds the number of voxels, so a voxel is as large as the
        extent over that number, which is not quite the plans' spacing.

        Args:
            properties: What preprocessing noted.
            transpose_forward: The plans'.
            shape: Voxels per axis after preprocessing.
        """
        to_original = np.diag([0.0, 0, 0, 1])
        for axis, original in enumerate(transpose_forward):
            scale = properties["shape_after_cropping_and_before_resampling"][axis] / shape[axis]
            to_original[original, axis] = scale
            to_original[original, 3] = properties["bbox_used_for_cropping"][axis][0] + 0.5 * scale - 0.5
        affine, oriented = _affine_as_read(properties)
        affine = affine @ to_original[[2, 1, 0, 3]]
        of_reader = dict(zip(transpose_forward, properties["shape_before_cropping"], strict=True))
        to_original = _to_file(properties, [of_reader[axis] for axis in range(3)]) @ to_original
        return cls(tuple(transpose_forward), to_original, affine, oriented)

    @property
    def spacing(self) -> tuple[float, ...]:
        """In mm per axis."""
        return tuple(float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def slice_axis(self) -> str:
        """The original image's axis that slices are counted on: "x", "y" or "z"."""
        return "zyx"[self._slice_axis]

    def original_slice(self, index: int) -> int:
        """The slice of the original image, on `slice_axis`, that a slice lies nearest to."""
        return round(float((self.to_original @ (index, 0, 0, 1))[self._slice_axis]))

    @property
    def _slice_axis(self) -> int:
        return int(np.abs(self.to_original[:3, 0]).argmax())


def _to_file(properties: dict, shape: Sequence[int]) -> np.ndarray:
    """(4, 4): from indices (z, y, x) of the array that nnU-Net's reader gave to those of the array in the file.

    Args:
        properties: The reader's.
        shape: (z, y, x), of the array that it gave.
    """
    to_file = np.eye(4)  # x, y, z
    if "reoriented_affine" in (nibabel := properties.get("nibabel_stuff", {})):
        to_file = np.round(np.linalg.inv(nibabel["original_affine"]) @ nibabel["reoriented_affine"])
    elif "original_orientation" in (itk := properties.get("sitk_stuff", {})) and len(itk["spacing"]) == 3:
        now = DICOMOrientImageFilter.GetOrientationFromDirectionCosines(itk["direction"])
        to_file[:3] = 0
        for axis, side in enumerate(itk["original_orientation"]):
            turned = next(i for i, letter in enumerate(now) if letter in (side, OPPOSITE[side]))
            flipped = now[turned] != side
            to_file[axis, turned] = -1 if flipped else 1
            to_file[axis, 3] = shape[2 - turned] - 1 if flipped else 0
    order = [2, 1, 0, 3]
    return to_file[np.ix_(order, order)]


def _affine_as_read(properties: dict) -> tuple[np.ndarray, bool]:
    """From indices x, y, z of the image as it was read to mm, and whether the directions are the patient's."""
    affine = np.eye(4)
    if "sitk_stuff" in properties:
        of_file = properties["sitk_stuff"]
        dims = len(of_file["spacing"])
        spatial = min(dims, 3)  # a fourth axis counts channels
        direction = np.reshape(of_file["direction"], (dims, dims))[:spatial, :spatial]
        affine[:spatial, :spatial] = direction * np.asarray(of_file["spacing"])[:spatial]
        affine[:spatial, 3] = of_file["origin"][:spatial]
        return affine, dims >= 3
    if "nibabel_stuff" in properties:
        of_file = properties["nibabel_stuff"]
        # nibabel counts towards right, anterior, superior.
        return np.diag([-1.0, -1, 1, 1]) @ of_file.get("reoriented_affine", of_file["original_affine"]), True
    affine[range(3), range(3)] = properties["spacing"][::-1]
    return affine, False
