"""Choose in which media type a mask is answered: by the header Accept, and by what was sent."""

from inference.exported_model import Prepared
from serving.errors import Problem

PNG, JSON, GEOJSON = "image/png", "application/json", "application/geo+json"
TIFF, DICOM, NIFTI = "image/tiff", "application/dicom", "application/x-nifti"
NRRD, METAIMAGE = "application/x-nrrd", "application/x-metaimage"
DICOM_ZIP = "application/zip"  # the segmentation, a report and pictures
VIEW = "multipart/form-data"  # what the web page shows, see serving/view.py
WITH_IMAGE = (DICOM_ZIP, VIEW)  # for these the image is read once more
SUFFIXES = {
    PNG: ".png",
    TIFF: ".tif",
    DICOM: ".dcm",
    NIFTI: ".nii.gz",
    NRRD: ".nrrd",
    METAIMAGE: ".mha",
}
# Formats of volumes, by `Format.name`. Most have no registered type; NIfTI is gzipped.
FORMATS = {
    "TIFF": TIFF,
    "DICOM": DICOM,
    "zipped DICOM series": DICOM,
    "NIfTI": NIFTI,
    "NRRD": NRRD,
    "MetaImage": METAIMAGE,
}
ALL = tuple(dict.fromkeys((PNG, JSON, GEOJSON, *FORMATS.values(), DICOM_ZIP, VIEW)))
ALIASES = {"application/gzip": NIFTI, "application/x-gzip": NIFTI, "application/nifti": NIFTI}


def read_accept(header: str) -> list[str]:
    """Read which types a client accepts, wildcards among them, in its order. Raises Problem 406."""
    accepted = []
    for part in header.split(","):
        media_type = part.partition(";")[0].strip().lower() or "*/*"
        media_type = ALIASES.get(media_type, media_type)
        if media_type in ALL or media_type in ("*/*", "image/*", "application/*"):
            accepted.append(media_type)
    if not accepted:
        raise Problem(406, f"expected Accept to be one of {', '.join(ALL)}")
    return accepted


def offers(prepared: Prepared) -> list[str]:
    """List the types that fit an image, the usual one first.

    A picture's mask is a PNG. A volume's is of the volume's kind, else NIfTI if the volume has a
    place in space, else a TIFF of many pages.
    """
    in_kind = [FORMATS[prepared.format]] if prepared.format in FORMATS else []
    in_kind += [DICOM_ZIP] if DICOM in in_kind else []
    others = (
        [NIFTI, TIFF, NRRD, METAIMAGE] if prepared.has_place else [TIFF, NIFTI, NRRD, METAIMAGE]
    )
    if prepared.num_slices == 1:
        return list(dict.fromkeys([PNG, JSON, GEOJSON, *in_kind, *others, VIEW]))
    return list(dict.fromkeys([*in_kind, *others, JSON, VIEW]))


def file_types(prepared: Prepared) -> list[str]:
    """List the types of a mask's file, that of the image's own kind first."""
    types = [one for one in offers(prepared) if one not in (JSON, GEOJSON, DICOM_ZIP, VIEW)]
    own = FORMATS.get(prepared.format)
    return [own, *types] if own in types else types


def choose(accepted: list[str], prepared: Prepared) -> list[str]:
    """List the offered types that a client accepts, the best first. Raises Problem 406."""
    offered, num_slices = offers(prepared), prepared.num_slices
    chosen = []
    for media_type in accepted:
        kind, _, name = media_type.partition("/")
        for offer in offered:
            is_of_kind = media_type == "*/*" or (name == "*" and offer.startswith(kind))
            if offer == media_type or (is_of_kind and offer not in WITH_IMAGE):
                chosen.append(offer)
    if not chosen:
        what = "this image" if num_slices == 1 else f"a volume of {num_slices} slices"
        raise Problem(406, f"expected Accept to be one of {', '.join(offered)} for {what}")
    return list(dict.fromkeys(chosen))
