"""Choose in which media type a mask is answered: by the header Accept, and by what was sent."""

from serving.errors import Problem

PNG, TIFF, NIFTI, DICOM = "image/png", "image/tiff", "application/x-nifti", "application/dicom"
JSON, GEOJSON = "application/json", "application/geo+json"
ALL = (PNG, JSON, GEOJSON, DICOM, NIFTI, TIFF)
# NIfTI has no registered type; ours is gzipped.
ALIASES = {"application/gzip": NIFTI, "application/x-gzip": NIFTI, "application/nifti": NIFTI}
# The same kind as the image, by `Format.name`.
IN_KIND = {"DICOM": DICOM, "NIfTI": NIFTI}


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


def offers(image_format: str, num_slices: int) -> list[str]:
    """List the types that fit an image, the usual one first.

    A picture's mask is a PNG. A volume's mask is of the volume's kind, else a TIFF of many pages.
    """
    in_kind = [IN_KIND[image_format]] if image_format in IN_KIND else []
    if num_slices == 1:
        return [PNG, JSON, GEOJSON, TIFF, *in_kind]
    return [*in_kind, TIFF, JSON]


def choose(accepted: list[str], image_format: str, num_slices: int) -> list[str]:
    """List the offered types that a client accepts, the best first. Raises Problem 406."""
    offered = offers(image_format, num_slices)
    chosen = []
    for media_type in accepted:
        kind, _, name = media_type.partition("/")
        for offer in offered:
            if (
                offer == media_type
                or media_type == "*/*"
                or (name == "*" and offer.startswith(kind))
            ):
                chosen.append(offer)
    if not chosen:
        what = "this image" if num_slices == 1 else f"a volume of {num_slices} slices"
        raise Problem(406, f"expected Accept to be one of {', '.join(offered)} for {what}")
    return list(dict.fromkeys(chosen))
