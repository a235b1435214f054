"""Images of one case as an array, and a segmentation as an image: nnU-Net's readers, with SimpleITK alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK

from .manifest import Manifest, is_length
from .whole_files import check_file, is_nifti_2, written_beside

UNITS = {1: "metres", 3: "micrometres"}  # of NIfTI's xyzt_units, other than mm
ORIENTED = "RAS"  # to which nnU-Net's readers with "Reorient" in their names bring images
ALIKE = 1e-2  # relative difference of two affines of a header that is one of rounding
PLACE = 0.1  # voxels that their origins may lie apart
SLICES_APART = 999  # by which nnU-Net multiplies the spacing of a 2D image for that of its missing axis


def read_case(files: Sequence[Path]) -> list[SimpleITK.Image]:
    """The images of one case.

    Raises:
        ValueError: A file is missing, damaged, cut short, or none that SimpleITK reads.
    """
    images = []
    for file in files:
        check_file(file)
        png = _png_bits_and_kind(file)
        try:
            image = SimpleITK.ReadImage(str(file))
        except RuntimeError as error:
            if is_nifti_2(file):
                raise ValueError(f"{file} is NIfTI-2, which is not read here; convert it to NIfTI-1.") from error
            raise ValueError(
                f"{file} cannot be read as an image: {_reason(error)}. Mend it or leave it out."
            ) from error
        images.append(_as_pillow(image, *png) if png else image)
    return images


def write_image(image: SimpleITK.Image, file: Path) -> None:
    """Write a file beside its place and then move it there.

    Raises:
        OSError: It could not be written.
    """
    try:
        with written_beside(file) as beside:
            SimpleITK.WriteImage(image, str(beside), True)
    except ValueError as error:
        raise OSError(f"{file} could not be written to its end. Make room, or choose another -o.") from error
    except (RuntimeError, OSError) as error:
        raise OSError(f"{file} could not be written: {_reason(error)}. Make room, or choose another -o.") from error


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
        if manifest.image_reader.startswith("NibabelIO"):
            _check_as_nibabel(image, manifest)
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


def _png_bits_and_kind(file: Path) -> tuple[int, int] | None:
    """Bits of a value and the kind of colour (0 is grey, 2 and 6 are colours) of a PNG; None for another file.

    Raises:
        ValueError: SimpleITK has other values of it than Pillow, by which nnU-Net's reader reads.
    """
    with file.open("rb") as opened:
        if opened.read(8) != b"\x89PNG\r\n\x1a\n":
            return None
        bits = kind = 0
        while len(begins := opened.read(8)) == 8:
            length, chunk = int.from_bytes(begins[:4], "big"), begins[4:]
            if chunk == b"IDAT":
                break
            content = opened.read(length)
            opened.read(4)  # its checksum
            if len(content) < {b"IHDR": 13, b"sBIT": 1}.get(chunk, 0):
                raise ValueError(f"{file} is damaged: its {chunk.decode()} has {len(content)} bytes. Copy it anew.")
            if chunk == b"IHDR":
                bits, kind = content[8:10]
            elif chunk == b"sBIT" and min(content) < (all_of := 8 if kind == 3 else bits):  # of a palette's colours
                raise ValueError(
                    f"{file} says that {min(content)} of the {all_of} bits of its values are significant (sBIT), "
                    f"which readers take differently; save it without that."
                )
            elif chunk == b"tRNS":
                raise ValueError(
                    f"{file} says which of its colours are transparent (tRNS), which readers take differently; save "
                    f"it without transparency."
                )
    return bits, kind


def _as_pillow(image: SimpleITK.Image, bits: int, kind: int) -> SimpleITK.Image:
    """The values of a PNG as nnU-Net's reader has them, which reads by Pillow."""
    if (bits, kind) == (1, 0):
        return image // 255  # white is 1
    if bits == 16 and kind in (2, 6):  # Pillow has colours of 8 bits
        narrow = SimpleITK.GetImageFromArray((SimpleITK.GetArrayViewFromImage(image) >> 8).astype(np.uint8), True)
        narrow.CopyInformation(image)
        return narrow
    return image


def _reorients(manifest: Manifest) -> bool:
    return manifest.image_reader.endswith("Reorient")


def _check_as_nibabel(image: SimpleITK.Image, manifest: Manifest) -> None:
    """Raise ValueError where a NIfTI header tells SimpleITK something else than nibabel, nnU-Net's reader then."""
    told = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    if "sform_code" not in told:
        return  # no NIfTI

    def number(key: str, default: float = 0.0) -> float:
        try:
            return float(told[key])
        except (KeyError, ValueError):
            return default

    if manifest.image_reader == "NibabelIOWithReorient" and number("qform_code") == number("sform_code") == 0:
        raise ValueError(
            "it has neither qform nor sform, and readers differ in which side they take for the front; set one"
        )
    unit = UNITS.get(int(number("xyzt_units")) & 7)
    if unit:
        raise ValueError(
            f"its header tells lengths in {unit}, which the model's reader in nnU-Net takes for mm; set the unit to mm "
            f"(xyzt_units 2), and spacing and affine with it"
        )
    slope, intercept = number("scl_slope", 1.0), number("scl_inter")
    if not np.isfinite(intercept) or ((slope == 0 or not np.isfinite(slope)) and intercept != 0):
        raise ValueError(
            f"its header has the slope {told.get('scl_slope')} and the intercept {told.get('scl_inter')}, which "
            f"readers take differently; set them to 1 and 0, or to what its values mean"
        )
    rows = [[float(one) for one in told.get(f"srow_{axis}", "").split()] for axis in "xyz"]
    if number("sform_code") > 0 and image.GetDimension() == 3 and all(len(row) == 4 for row in rows):
        sform, spacing = np.array(rows), np.array(image.GetSpacing())
        pixdim = [number(f"pixdim[{axis}]") for axis in (1, 2, 3)]
        if not np.allclose(np.linalg.norm(sform[:, :3], axis=0), pixdim, rtol=ALIKE):
            raise ValueError(
                f"its header has voxels of {pixdim} mm (pixdim) and an sform of others, so that readers differ in "
                f"where it lies; set both alike"
            )
        to_ras = np.diag((-1, -1, 1))  # ITK's x runs to the left and its y to the back
        axes = to_ras @ np.reshape(image.GetDirection(), (3, 3)) * spacing
        apart = np.abs(sform[:, 3] - to_ras @ image.GetOrigin()).max()
        if np.abs(sform[:, :3] - axes).max() > ALIKE * spacing.max() or apart > PLACE * spacing.min():
            raise ValueError(
                "its header's qform and sform put it in different places, and the model's reader in nnU-Net takes the "
                "sform, this one the qform; set both alike"
            )


def _reason(error: Exception) -> str:
    """The last line of what ITK says, which tells the cause, without its C++ prefixes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
