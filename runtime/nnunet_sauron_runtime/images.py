"""Images of one case as an array, and a segmentation as an image: nnU-Net's readers, with SimpleITK alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK

from .manifest import Manifest, is_length
from .whole_files import check_file

ORIENTED = "RAS"  # to which nnU-Net's readers with "Reorient" in their names bring images
SLICES_APART = 999  # by which nnU-Net multiplies the spacing of a 2D image for that of its missing axis


def read_case(files: Sequence[Path]) -> list[SimpleITK.Image]:
    """The images of one case.

    Raises:
        ValueError: A file is missing, damaged, cut short, or none that SimpleITK reads.
    """
    images = []
    for file in files:
        check_file(file)
        try:
            image = SimpleITK.ReadImage(str(file))
        except RuntimeError as error:
            raise ValueError(
                f"{file} cannot be read as an image: {_reason(error)}. Mend it or leave it out."
            ) from error
        # White in a PNG of one bit is 255 to SimpleITK and 1 to nnU-Net.
        images.append(image // 255 if _is_png_of_one_bit(file) else image)
    return images


def write_image(image: SimpleITK.Image, file: Path) -> None:
    """Write a file beside its place and then move it there.

    Raises:
        OSError: It could not be written.
    """
    ending = "".join(file.suffixes[-2:]) if file.name.endswith(".gz") else file.suffix
    beside = file.with_name(f".{file.name[: -len(ending)]}.{os.getpid()}.tmp{ending}")
    try:
        SimpleITK.WriteImage(image, str(beside), True)
        check_file(beside)  # where the disk is full, the writer of NIfTI returns as if nothing were
        os.replace(beside, file)
    except ValueError as error:
        raise OSError(f"{file} could not be written to its end. Make room, or choose another -o.") from error
    except RuntimeError as error:
        raise OSError(f"{file} could not be written: {_reason(error)}. Make room, or choose another -o.") from error
    finally:
        beside.unlink(missing_ok=True)


def to_array(images: Sequence[SimpleITK.Image], manifest: Manifest) -> tuple[np.ndarray, tuple[float, ...]]:
    """A case's channels as nnU-Net's reader gives them.

    Args:
        images: One per channel; or for `NaturalImage2DIO` one whose colours are the channels.
        manifest: Of the model.

    Returns:
        (channels, z, y, x), float32, and the spacing along z, y and x in mm.

    Raises:
        ValueError: They are not what the model takes, or do not fit each other.
    """
    for image in images:
        if not isinstance(image, SimpleITK.Image):
            raise ValueError(f"the image is a {type(image).__name__}, expected a SimpleITK.Image or a list of them")
    if not images:
        raise ValueError("there is no image in the list")
    colours = manifest.image_reader == "NaturalImage2DIO"
    axes = images[0].GetDimension()
    for image in images:
        _check_image(image, colours)
        if manifest.image_reader == "NibabelIOWithReorient" and _has_no_orientation(image):
            raise ValueError(
                "it has neither qform nor sform, and readers differ in which side they take for the front; set one"
            )
        if image.GetSize() != images[0].GetSize():
            raise ValueError(
                f"its images have different sizes, {images[0].GetSize()} and {image.GetSize()} voxels along x, y, z"
            )
        if not np.allclose(image.GetSpacing(), images[0].GetSpacing()):
            raise ValueError(
                f"its images have different spacings, {images[0].GetSpacing()} and {image.GetSpacing()} mm"
            )
        if not (
            np.allclose(image.GetOrigin(), images[0].GetOrigin())
            and np.allclose(image.GetDirection(), images[0].GetDirection())
        ):
            warnings.warn(
                "images of one case have different origins or directions; the first one's are used", stacklevel=2
            )
    if axes == 2 and (len(manifest.stages[0].patch_size) == 3 or _reorients(manifest)):
        raise ValueError(f"it is a 2D image of {images[0].GetSize()} pixels; the model takes volumes")
    if _reorients(manifest):
        images = [SimpleITK.DICOMOrient(image, ORIENTED) for image in images]
    arrays = [_array(image) for image in images]
    channels = sum(map(len, arrays))
    if channels != len(manifest.channel_names):
        raise ValueError(
            f"it has {channels} channel{'s' * (channels != 1)}; the model takes {len(manifest.channel_names)}: "
            f"{', '.join(manifest.channel_names)}"
        )
    array = np.concatenate(arrays)
    finite = np.isfinite(array)
    if not finite.all():
        raise ValueError(f"{np.count_nonzero(~finite)} of its values are infinite or not numbers")
    if colours:
        return array, (SLICES_APART, 1, 1)
    spacing = tuple(abs(length) for length in images[0].GetSpacing()[::-1])
    return array, spacing if axes == 3 else (max(spacing) * SLICES_APART, *spacing)


def from_array(segmentation: np.ndarray, like: SimpleITK.Image, manifest: Manifest) -> SimpleITK.Image:
    """A segmentation as an image with the geometry of the image that it is of.

    Args:
        segmentation: (z, y, x), of whole numbers.
        like: The case's first image as it was read.
        manifest: Of the model.

    Returns:
        Of 8 bits, or 16 where a label needs them.
    """
    segmentation = segmentation.astype(np.uint8 if segmentation.max() < 255 else np.uint16, copy=False)
    flat = like.GetDimension() == 2
    image = SimpleITK.GetImageFromArray(segmentation[0] if flat else segmentation)
    if not _reorients(manifest):
        image.CopyInformation(like)
        return image
    image.CopyInformation(SimpleITK.DICOMOrient(like, ORIENTED))
    orientation = SimpleITK.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(like.GetDirection())
    image = SimpleITK.DICOMOrient(image, orientation)
    image.CopyInformation(like)  # as it was, to the last digit
    return image


def _check_image(image: SimpleITK.Image, colours: bool) -> None:
    axes, parts = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    if image.GetNumberOfPixels() == 0:
        raise ValueError("it has no voxels")
    if colours and axes != 2:
        raise ValueError(f"it has {axes} axes; the model takes 2D pictures")
    if axes not in (2, 3):
        raise ValueError(f"it has {axes} axes; the model takes 2 or 3, and each channel in a file of its own")
    if parts != 1 and not (colours and parts in (3, 4)):
        raise ValueError(f"its voxels have {parts} parts (colours or vectors); the model takes one number a voxel")
    if not all(is_length(abs(length)) for length in image.GetSpacing()):
        raise ValueError(f"its spacing is {image.GetSpacing()} mm, expected lengths above 0 and below 1e6; mend it")
    if "complex" in image.GetPixelIDTypeAsString():
        raise ValueError("its voxels are complex numbers; the model takes real ones")


def _array(image: SimpleITK.Image) -> np.ndarray:
    """(channels, z, y, x), float32."""
    array = SimpleITK.GetArrayViewFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)[:, None]
    elif image.GetDimension() == 2:
        array = array[None, None]
    else:
        array = array[None]
    return array.astype(np.float32, order="C")


def _is_png_of_one_bit(file: Path) -> bool:
    with file.open("rb") as opened:
        header = opened.read(26)
    return header.startswith(b"\x89PNG") and header[24:] == bytes([1, 0])  # bits, and grey as the kind of colour


def _reorients(manifest: Manifest) -> bool:
    return manifest.image_reader.endswith("Reorient")


def _has_no_orientation(image: SimpleITK.Image) -> bool:
    """Whether it is of a NIfTI file that states none."""
    codes = [image.GetMetaData(key) for key in ("qform_code", "sform_code") if image.HasMetaDataKey(key)]
    return codes == ["0", "0"]


def _reason(error: Exception) -> str:
    """The last line of what ITK says, which tells the cause, without its C++ prefixes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
