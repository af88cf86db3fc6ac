"""Decode DICOM, NIfTI and TIFF stacks, and write masks back in kind. `images.py` comes here for such files.

A NIfTI volume is turned so that its slices are those of the acquisition (across its coarsest axis, else axial) and
stand as radiologists look at them; its mask is turned back. A DICOM series is a folder of files, a slice each.
"""

import gzip
import hashlib
import io
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import imagecodecs
import numpy as np

from images import Scan, UserError, atomic, brief, check_size, is_dicom, promised_pixels

T = TypeVar("T")
PLAIN = ("NONE", "LZW", "DEFLATE", "ADOBE_DEFLATE", "PACKBITS", "CCITTRLE", "CCITT_T4", "CCITT_T6")  # TIFF's
LARGEST_HEADER = 2**24  # bytes before the voxels of a NIfTI file
GZIP = b"\x1f\x8b"
VERSION = "1"  # of this software, in the files that it writes
SLICES = {0: (0, 2, 1), 1: (1, 2, 0), 2: (2, 1, 0)}  # which of x, y, z slices, rows and columns are
JPEG_COLOURS = {"RGB": "RGB", "YBR_FULL": "YCBCR", "YBR_FULL_422": "YCBCR"}


def decode(content: bytes) -> Scan:
    """Decode a DICOM, NIfTI or TIFF file. Raises UserError."""
    if content[128:132] == b"DICM":
        return decode_dicom(content)
    return decode_tiff(content) if content[:2] in (b"II", b"MM") else decode_nifti(content)


# -------------------------------------------------------------------------------------------------------------- TIFF


def decode_tiff(content: bytes) -> Scan:
    """Decode the pages of a TIFF, once its headers are known to promise no more than the memory holds."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its own complaints name no file; ours do
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            pages = [page for page in file.pages if not page.is_reduced]  # a pyramid's smaller copies
            check_size(sum(page.size * max(8, 2 * page.dtype.itemsize) for page in pages))  # 8: a palette's colours
            return Scan(np.stack([_tiff_page(page, content) for page in pages]), _tiff_spacing(file))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"unreadable as TIFF ({brief(error)})") from None


def _check_segments(page: Any, content: bytes) -> None:
    """Raise ValueError for a page whose parts have sizes of their own, not the page's: a bomb could hide there."""
    if page.compression.name not in PLAIN and page.compression.name != "JPEG":
        raise ValueError(f"compressed by {page.compression.name}; save it with deflate, LZW or JPEG")
    largest = (page.tilewidth or page.imagewidth) * (page.tilelength or page.rowsperstrip or page.imagelength)
    parts = zip(page.dataoffsets, page.databytecounts, strict=True) if page.compression.name == "JPEG" else ()
    for start, count in parts:
        if promised_pixels(content[start : start + count]) > 2 * max(largest, 64):
            raise ValueError("a JPEG in it is larger than its page")


def _tiff_page(page: Any, content: bytes) -> np.ndarray:
    """Decode a page as stored: (H, W, C), more is brighter. Its orientation tag is ignored."""
    _check_segments(page, content)
    pixels = page.asarray()
    pixels = {"YX": lambda: pixels[..., None], "YXS": lambda: pixels, "SYX": lambda: np.moveaxis(pixels, 0, -1)}[
        page.axes
    ]()
    kind = getattr(page.photometric, "name", "")
    if kind not in ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "YCBCR"):
        raise ValueError(f"{kind or page.photometric} colours")
    if kind == "PALETTE":
        return np.moveaxis(page.colormap[:, pixels[..., 0]], 0, -1)
    if pixels.dtype == bool:
        pixels = np.uint8(255) * pixels
    return np.iinfo(pixels.dtype).max - pixels if kind == "MINISWHITE" else pixels


def _tiff_spacing(file: Any) -> tuple[float, float, float] | None:
    """Give the millimetres between pages, rows and columns, where ImageJ says so: a bare resolution is for printers."""
    page, notes = file.pages[0], file.imagej_metadata or {}
    units = {"mm": 1.0, "cm": 10.0, "um": 1e-3, "micron": 1e-3, "\\u00B5m": 1e-3, "µm": 1e-3}
    millimetres = units.get(notes.get("unit"))
    resolution = [page.tags.valueof(name) for name in ("YResolution", "XResolution")]
    if millimetres is None or not all(resolution) or not all(pixels and count for pixels, count in resolution):
        return None
    plane = [millimetres * count / pixels for pixels, count in resolution]
    return (millimetres * float(notes.get("spacing", 1.0 / millimetres)), *plane)


# ------------------------------------------------------------------------------------------------------------- DICOM
# pydicom reads the file and its uncompressed pixels; imagecodecs, as a plugin of pydicom, the compressed ones.

DECODER_DEPENDENCIES: dict[str, tuple[str, ...]] = {}  # pydicom asks a plugin for this name and the next


def is_available(uid: str) -> bool:
    """Tell pydicom that nothing is lacking."""
    return True


def decode_frame(src: bytes, runner: Any) -> bytearray:
    """Decode one frame that is JPEG, JPEG-LS or JPEG 2000; `runner` knows what the file says of it."""
    from pydicom import uid

    samples = () if runner.samples_per_pixel == 1 else (runner.samples_per_pixel,)
    out = np.empty((runner.rows, runner.columns, *samples), f"u{runner.bits_allocated // 8}")
    colours = JPEG_COLOURS.get(runner.photometric_interpretation) if samples else None
    if runner.transfer_syntax in uid.JPEGLSTransferSyntaxes:
        imagecodecs.jpegls_decode(src, out=out)
    elif runner.transfer_syntax in uid.JPEG2000TransferSyntaxes:
        start = max(0, src.find(b"\xff\x4f\xff\x51"))  # of the codestream and its SIZ marker; some are wrapped in JP2
        size = tuple(int.from_bytes(src[start + i : start + i + 4]) for i in (12, 8))
        if size != out.shape[:2] or int.from_bytes(src[start + 40 : start + 42]) != runner.samples_per_pixel:
            raise ValueError(f"a frame of {size} pixels in a file of {out.shape[:2]}, or other colours")
        out[...] = imagecodecs.jpeg2k_decode(src)
    else:
        imagecodecs.jpeg_decode(src, colorspace=colours, outcolorspace="RGB" if colours else None, out=out)
    if samples:
        runner.set_option("photometric_interpretation", "RGB")
        runner.set_option("planar_configuration", 0)
    return bytearray(out.tobytes())


def read_dicom_header(content: bytes) -> Any:
    """Read a DICOM file's elements, its pixels not yet decoded. Raises UserError if it is none or has no image."""
    import pydicom

    try:
        header = pydicom.dcmread(io.BytesIO(content))
        size = promised(header)
    except Exception as error:
        raise UserError(f"unreadable as DICOM ({brief(error)})") from None
    if not any(name in header for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise UserError("a DICOM file without an image, a report or a plan perhaps; expected one with pixels")
    check_size(size)
    return header


def promised(header: Any) -> int:
    """Count the bytes that a file's pixels will take: grey levels become float32."""
    sizes = [int(header.get(name) or 1) for name in ("NumberOfFrames", "Rows", "Columns")]
    samples, bits = (int(header.get(name) or 1) for name in ("SamplesPerPixel", "BitsAllocated"))
    return int(np.prod(sizes, dtype=object)) * max(6, -(-bits // 8) * samples)  # 6: a palette's colours


def decode_dicom(content: bytes) -> Scan:
    """Decode a DICOM file of one frame or several: pixels rescaled (CT in HU). Raises UserError."""
    from pydicom import uid
    from pydicom.pixels import apply_color_lut, get_decoder, pixel_array

    header = read_dicom_header(content)
    ours = (*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes, uid.JPEG2000Lossless, uid.JPEG2000)
    for syntax in ours:
        if "imagecodecs" not in get_decoder(syntax).available_plugins:
            get_decoder(syntax).add_plugin("imagecodecs", (__name__, "decode_frame"))
    try:
        plugin = "imagecodecs" if header.file_meta.TransferSyntaxUID in ours else ""  # whatever else is installed
        stored, colours, window = (
            pixel_array(header, decoding_plugin=plugin),
            int(header.get("SamplesPerPixel") or 1),
            None,
        )
        if header.get("PhotometricInterpretation") == "PALETTE COLOR":
            stored = apply_color_lut(stored, header)
            colours = stored.shape[-1]
        pixels = stored.reshape(-1, header.Rows, header.Columns, colours)
        if colours == 1:
            pixels = rescale(pixels, header)
            centre, width = (_look_up(header, name)[:1] for name in ("WindowCenter", "WindowWidth"))
            window = (*centre, *width) if centre and width and width[0] > 0 else None
        if header.get("PhotometricInterpretation") == "MONOCHROME1":  # low is white, as on film
            lowest = -int(header.PixelRepresentation) << int(header.BitsStored) - 1
            ends = np.array([lowest, lowest + (1 << int(header.BitsStored)) - 1]).reshape(1, 1, 2, 1)
            total = float(rescale(ends, header).sum())
            np.subtract(total, pixels, out=pixels)
            window = window and (total - window[0], window[1])
        patient = hashlib.sha256(str(header.get("PatientID") or "").encode()).hexdigest()[:16]
        return Scan(pixels, _dicom_spacing(header), window, patient if header.get("PatientID") else "")
    except Exception as error:
        raise UserError(f"its pixels cannot be decoded ({brief(error)})") from None


def rescale(stored: np.ndarray, header: Any) -> np.ndarray:
    """Turn stored grey levels (F, H, W, 1) into those of the modality, float32: of CT into HU."""
    from pydicom.pixels import apply_modality_lut

    if header.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, header), np.float32)
    slope, intercept = (
        np.float32([(_look_up(header, name, frame) or (usual,))[0] for frame in range(len(stored))])
        for name, usual in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )
    levels = stored.astype(np.float32)
    levels *= slope[:, None, None, None]  # in place, as volumes are large
    levels += intercept[:, None, None, None]
    return levels


def _numbers(header: Any, name: str) -> tuple[float, ...]:
    """Read an element's finite numbers; none if it is missing or holds anything else."""
    try:
        values = np.atleast_1d(np.float64(header.get(name) if header.get(name) is not None else ()))
    except (ValueError, TypeError):
        return ()
    return tuple(values.tolist()) if np.isfinite(values).all() else ()


def _look_up(header: Any, name: str, frame: int = 0) -> tuple[float, ...]:
    """Read an element's numbers where a frame's may stand: its own groups, those of all frames, the header itself."""
    places = [header]
    for sequence, i in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        groups = header.get(sequence) or []
        if i < len(groups):
            places += [item for element in groups[i] if element.VR == "SQ" for item in element.value]
    return next((numbers for place in reversed(places) if (numbers := _numbers(place, name))), ())


def _dicom_spacing(header: Any) -> tuple[float, float, float] | None:
    """Give the millimetres between slices, rows and columns, where the file says so."""
    plane = _look_up(header, "PixelSpacing") or _look_up(header, "ImagerPixelSpacing")
    names = ("SpacingBetweenSlices", "SliceThickness")
    between = next((found[0] for name in names if (found := _look_up(header, name)) and found[0] > 0), 1.0)
    spacing = (between, *plane)
    return spacing if len(spacing) == 3 and min(spacing) > 0 else None


def dicom_place(headers: Sequence[Any]) -> np.ndarray | None:
    """Give the affine of the slices, rows and columns of a file, or a sorted series, to RAS in mm, if it is there."""
    first, last, frames = headers[0], headers[-1], int(headers[-1].get("NumberOfFrames") or 1)
    count = len(headers) if len(headers) > 1 else frames
    start = _look_up(first, "ImagePositionPatient")
    end = _look_up(last, "ImagePositionPatient", frames - 1)
    turned, spacing = _look_up(first, "ImageOrientationPatient"), _dicom_spacing(first)
    if len(start) != 3 or len(end) != 3 or len(turned) != 6 or spacing is None:
        return None
    along, down = np.array(turned[:3]), np.array(turned[3:])
    step = np.subtract(end, start) / (count - 1) if count > 1 else np.cross(along, down) * spacing[0]
    affine = np.eye(4)
    affine[:3] = np.stack([step, down * spacing[1], along * spacing[2], start], axis=1)
    return np.diag((-1, -1, 1, 1)) @ affine  # DICOM's axes run to the left and back


def sort_series(headers: Sequence[Any]) -> tuple[list[int], float | None]:
    """Order a series' files along its axis, from the feet up where it is axial; give their distance in mm.

    Raises UserError unless they are slices of one series, each place once.
    """
    series = {header.get("SeriesInstanceUID") for header in headers}
    shapes = {(header.Rows, header.Columns) for header in headers}
    if len(series) > 1 or len(shapes) > 1:
        raise UserError(f"{len(series)} series of {len(shapes)} sizes in one folder; expected one of each")
    positions = [_numbers(header, "ImagePositionPatient") for header in headers]
    directions = _numbers(headers[0], "ImageOrientationPatient")
    if len(directions) != 6 or any(len(position) != 3 for position in positions):
        return sorted(range(len(headers)), key=lambda i: _numbers(headers[i], "InstanceNumber")), None
    axis = np.cross(directions[:3], directions[3:])
    places = [float(axis @ np.array(position)) for position in positions]
    order = sorted(range(len(headers)), key=places.__getitem__)
    steps = np.diff(np.sort(places))
    if len(steps) and steps.min() < 1e-3:
        raise UserError("two files of the series show the same place; expected each once")
    if len(steps) and steps.max() > 1.5 * steps.min():
        before = headers[order[int(np.argmax(steps))]].get("InstanceNumber")
        apart = f"slices are {steps.min():.3g} to {steps.max():.3g} mm apart, the widest gap after number {before}"
        raise UserError(f"{apart}; expected even steps: is a file missing?")
    return order, float(np.median(steps)) if len(steps) else None


def series_files(folder: str | Path) -> list[Path]:
    """List the DICOM files of a folder, by their first bytes: many have no ending. Raises UserError."""
    files = sorted(path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith("."))
    return [path for path in files if path.name.upper() != "DICOMDIR" and is_dicom(path)]


def is_one_volume(files: Sequence[Path]) -> bool:
    """Tell whether DICOM files are the slices of one series, not images of their own.

    Raises UserError for slices of several series.
    """
    import pydicom

    slices: Counter[str] = Counter()
    for file in files:
        header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
        if len(_numbers(header, "ImagePositionPatient")) != 3:
            return False
        slices[str(header.get("SeriesInstanceUID"))] += 1
    if len(slices) > 1 and max(slices.values()) > 1:
        counts = ", ".join(map(str, slices.values()))
        raise UserError(f"{len(slices)} series, of {counts} files; expected one: put each in a folder of its own")
    return len(files) > 1 and len(slices) == 1


def decode_series(contents: Sequence[bytes], names: Sequence[str] = ()) -> Scan:
    """Decode the files of a DICOM series, a slice each: one volume. Raises UserError, naming the file by `names`."""
    if not contents:
        raise UserError("a folder without DICOM files; expected those of one series")

    def named(read: Callable[[bytes], T], i: int) -> T:
        try:
            return read(contents[i])
        except UserError as error:
            raise UserError(f"{names[i] if names else f'file {i + 1}'}: {error}") from None

    headers = [named(read_dicom_header, i) for i in range(len(contents))]
    order, step = sort_series(headers)
    check_size(sum(map(promised, headers)))
    scans = [named(decode_dicom, i) for i in order]
    if any(scan.pixels.shape != scans[0].pixels.shape for scan in scans):
        raise UserError("the files of the series have different numbers of frames or colours")
    spacing = scans[0].spacing_mm
    spacing = (step, *spacing[1:]) if spacing and step else spacing
    return replace(scans[0], pixels=np.concatenate([scan.pixels for scan in scans]), spacing_mm=spacing)


# ------------------------------------------------------------------------------------------------------------- NIfTI


def open_nifti(content: bytes) -> Any:
    """Open a NIfTI file, plain or gzipped, its voxels not yet read. Raises UserError."""
    import nibabel

    stream = io.BytesIO(content)
    stream = gzip.GzipFile(fileobj=stream) if content[:2] == GZIP else stream
    try:
        head = stream.read(352)
        header = nibabel.Nifti1Header(head[:348], check=False)
        start = max(352, int(header["vox_offset"]))
        check_size(*header.get_data_shape(), max(4, header.get_data_dtype().itemsize))
        if start > LARGEST_HEADER:
            raise UserError(f"its voxels start {start} bytes in; expected at most {LARGEST_HEADER}")
        size = start + int(np.prod(header.get_data_shape(), dtype=object)) * header.get_data_dtype().itemsize
        # Without its extensions, which nibabel would read whatever size they claim.
        image = nibabel.Nifti1Image.from_bytes(head[:348] + bytes(4) + stream.read(size - 352))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"unreadable as NIfTI ({brief(error)})") from None
    try:
        shape = image.shape[:3] + tuple(side for side in image.shape[3:] if side > 1)
        placed = np.isfinite(nibabel.orientations.io_orientation(image.affine)).all()
    except Exception as error:
        raise UserError(f"unreadable as NIfTI ({brief(error)})") from None
    if len(shape) not in (2, 3):
        raise UserError(f"{len(shape)} dimensions, {shape}; expected a volume of three")
    if not placed:
        raise UserError("its affine cannot be inverted; expected one that places voxels in the patient")
    check_size(*shape, max(4, image.header.get_data_dtype().itemsize))
    return image


def nifti_turns(image: Any) -> tuple[int, np.ndarray, np.ndarray]:
    """Choose the slices' axis (0 sagittal, 1 coronal, 2 axial), turns of the array to (left, posterior, z) and back.

    z is up for axial slices; for the others it is down, as then a picture's rows run from head to foot.
    """
    from nibabel import orientations

    now = orientations.io_orientation(image.affine)
    zooms = np.ones(3)
    zooms[now[:, 0].astype(int)] = np.linalg.norm(image.affine[:3, :3], axis=0)  # in the order x, y, z
    axis = int(np.argmax(zooms)) if zooms.max() > 1.2 * np.median(zooms) else 2
    wanted = orientations.axcodes2ornt(("L", "P", "S" if axis == 2 else "I"))
    return axis, orientations.ornt_transform(now, wanted), orientations.ornt_transform(wanted, now)


def nifti_place(image: Any) -> np.ndarray:
    """Give the affine of slices, rows and columns (see `decode_nifti`) to RAS in mm."""
    from nibabel import orientations

    axis, turns, _ = nifti_turns(image)
    affine = image.affine @ orientations.inv_ornt_aff(turns, (*image.shape, 1)[:3])
    return affine[:, [*SLICES[axis], 3]]


def check_place(image: Sequence[bytes], mask: bytes) -> None:
    """Raise UserError if a NIfTI mask lies elsewhere in the patient than its image, a NIfTI file or DICOM files."""
    opened = open_nifti(mask)
    if image[0][128:132] == b"DICM":
        headers = [read_dicom_header(content) for content in image]
        place = dicom_place([headers[i] for i in sort_series(headers)[0]] if len(headers) > 1 else headers)
    else:
        place = nifti_place(open_nifti(image[0]))
    if place is None:
        return
    axis = nifti_turns(opened)[0]
    shape = np.array((*opened.shape, 1)[:3])[np.argsort(nifti_turns(opened)[1][:, 0])][list(SLICES[axis])]
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, side - 1) for side in shape))]).T
    apart = np.linalg.norm((place @ corners - nifti_place(opened) @ corners)[:3], axis=0).max()
    if apart > 0.5 * np.linalg.norm(place[:3, :3], axis=0).min():
        raise UserError(
            f"its affine puts it elsewhere than its image, up to {apart:.3g} mm off; expected the same place"
        )


def to_slices(volume: np.ndarray, axis: int) -> np.ndarray:
    """Put a volume (x, y, z) in the order slices, rows, columns."""
    return volume.transpose(SLICES[axis])


def from_slices(slices: np.ndarray, axis: int) -> np.ndarray:
    """Undo `to_slices`."""
    return slices.transpose(np.argsort(SLICES[axis]))


def decode_nifti(content: bytes) -> Scan:
    """Decode a NIfTI volume. Raises UserError."""
    from nibabel import orientations

    image = open_nifti(content)
    try:
        voxels = np.asarray(image.dataobj, np.float32).reshape((*image.shape, 1)[:3])
    except Exception as error:
        raise UserError(f"its voxels cannot be read ({brief(error)})") from None
    axis, turns, _ = nifti_turns(image)
    slices = to_slices(orientations.apply_orientation(voxels, turns), axis)
    sizes = np.linalg.norm(image.affine[:3, :3], axis=0)
    turned = np.empty(3)
    turned[turns[:, 0].astype(int)] = sizes  # of x, y, z
    spacing = tuple(float(turned[i]) for i in SLICES[axis])
    return Scan(slices[..., None], spacing)


def write_nifti(path: Path, ids: np.ndarray, source: bytes) -> None:
    """Write a mask (S, H, W), uint8 or uint16, of `decode_nifti`'s slices with the affines and shape of its file."""
    import nibabel
    from nibabel import orientations

    image = open_nifti(source)
    axis, _, back = nifti_turns(image)
    voxels = orientations.apply_orientation(from_slices(ids, axis), back).reshape(image.shape)
    header = image.header.copy()  # both of its affines are kept
    header.set_data_dtype(ids.dtype)
    header.set_slope_inter(1, 0)
    mask = nibabel.Nifti1Image(voxels, image.affine, header)
    with atomic(path) as temporary:
        temporary.write_bytes(gzip.compress(mask.to_bytes()) if path.name.endswith(".gz") else mask.to_bytes())


# ---------------------------------------------------------------------------------------------- DICOM segmentation


def write_seg(path: Path, ids: np.ndarray, names: Sequence[str], contents: Sequence[bytes]) -> None:
    """Write `encode_seg`'s file."""
    content = encode_seg(ids, names, contents)
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def encode_seg(ids: np.ndarray, names: Sequence[str], contents: Sequence[bytes], version: str = VERSION) -> bytes:
    """Make of class ids (S, H, W) a DICOM segmentation (one segment per class) that refers to its source's files.

    version: of the algorithm, at most 64 characters. Raises UserError if the source lacks what DICOM wants of it.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    headers = [read_dicom_header(content) for content in contents]
    headers = [headers[i] for i in sort_series(headers)[0]] if len(headers) > 1 else headers
    algorithm = hd.AlgorithmIdentificationSequence("U-Net", codes.DCM.ArtificialIntelligence, version)
    segments = [
        hd.seg.SegmentDescription(
            number,
            name,
            codes.SCT.AnatomicalStructure,
            hd.sr.CodedConcept(f"CLASS{number}", "99UNET", name[:64]),  # "99…" marks codes of our own
            hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm,
        )
        for number, name in enumerate(names, 1)
    ]
    try:
        segmentation = hd.seg.Segmentation(
            headers,
            ids.astype(np.uint8),
            hd.seg.SegmentationTypeValues.BINARY,
            segments,
            series_instance_uid=hd.UID(),
            series_number=100,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="none",
            manufacturer_model_name="U-Net",
            software_versions=version,
            device_serial_number="none",
            omit_empty_frames=bool(ids.any()),  # one frame must stay
        )
        segmentation.decode()  # the source's names, before
        segmentation.SpecificCharacterSet = "ISO_IR 192"  # which has the classes' names too
        buffer = io.BytesIO()
        segmentation.save_as(buffer)
        return buffer.getvalue()
    except Exception as error:  # of many kinds, where a header is damaged
        raise UserError(f"no DICOM segmentation can refer to it ({brief(error)})") from error


def is_seg(content: bytes) -> bool:
    """Tell a DICOM segmentation."""
    from pydicom import uid

    return content[128:132] == b"DICM" and read_dicom_header(content).get("SOPClassUID") == uid.SegmentationStorage


def decode_seg(content: bytes, sources: Sequence[bytes], names: Sequence[str]) -> np.ndarray:
    """Decode a segmentation of `sources`, the files of an image: class ids (S, H, W) by the segments' labels.

    Raises UserError if it refers to other files, segments overlap, or their labels are other classes than `names`.
    """
    import highdicom as hd

    headers = [read_dicom_header(source) for source in sources]
    headers = [headers[i] for i in sort_series(headers)[0]] if len(headers) > 1 else headers
    uids, frames = [header.SOPInstanceUID for header in headers], int(headers[0].get("NumberOfFrames") or 1)
    more = {"combine_segments": True, "ignore_spatial_locations": True, "assert_missing_frames_are_empty": True}
    try:
        segmentation = hd.seg.Segmentation.from_dataset(read_dicom_header(content))
        referred = {uid for _, _, uid in segmentation.get_source_image_uids()}
        if not referred or not referred <= set(uids):
            raise ValueError("it refers to other images")
        if frames > 1:
            numbers = segmentation.get_pixels_by_source_frame(uids[0], range(1, frames + 1), **more)
        else:
            numbers = segmentation.get_pixels_by_source_instance(uids, **more)
        labels = {item.SegmentNumber: item.SegmentLabel.strip().lower() for item in segmentation.SegmentSequence}
    except Exception as error:
        raise UserError(f"not a segmentation of its image ({brief(error)})") from None
    known = {name.lower(): i for i, name in enumerate(names, 1)}
    if len(names) > 1 and not set(labels.values()) <= set(known):
        raise UserError(f"segments {', '.join(labels.values())}; expected the classes {', '.join(names)}")
    ids = np.zeros(numbers.shape, np.uint8)
    for number, label in labels.items():
        ids[numbers == number] = known[label] if len(names) > 1 else 1
    return ids
