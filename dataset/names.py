"""Usual names of folders of images, masks and subsets, and what masks add to an image's name."""

import re
from itertools import pairwise

from dataset.folder import Folder

WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
IMAGE_WORDS = (
    "image images img imgs imaging original originals orig input inputs scan scans jpegimages cxr "
    "photo photos picture pictures raw xray xrays slice slices frame frames volume volumes "
    "bild bilder"
)
MASK_WORDS = (
    "mask masks label labels gt gts groundtruth groundtruths truth annotation annotations anns ann "
    "anno annos annot annots seg segs segmentation segmentations segmentationclass "
    "segmentationclasspng segmentationobject manual manuals 1stmanual target targets contour "
    "contours roi rois labelmap labelmaps maske masken"
)
IMAGES, MASKS = frozenset(IMAGE_WORDS.split()), frozenset(MASK_WORDS.split())
# The better first, where there are several. In DRIVE mask/ is the field of view.
BEST_MASKS = ("1stmanual", "manual1", "manual", "segmentationclass", "groundtruth", "gt", "masks")
# Folders with a second opinion, or with masks of something else.
NO_MASKS = {"2ndmanual", "manual2", "segmentationobject", "fov"}
# Words that say nothing of what a folder holds.
OTHER_WORDS = "png jpg jpeg tif tiff bmp nii nifti dcm dicom dir folder files all"
FORMAT_WORDS = frozenset(OTHER_WORDS.split())
SUBSET_WORDS = {
    "train": "train training trn tr traindata trainset trainingset trainingdata stagetrain",
    "val": "val valid validation validate dev valset validationset validationdata",
    "test": "test testing tst ts testset testingset testdata stagetest",
}
SUBSET_OF = {word: name for name, words in SUBSET_WORDS.items() for word in words.split()}

_MASK_ADDS = (
    "masks?|maske|seg|segs|segmentations?|segmented|gts?|ground[-_ ]?truth|labels?|labelled|"
    "manual1?|1stho|1st[-_ ]?manual|annotations?|annotated|anno|ann|truth|target|rois?|contours?|"
    "labelmap|labelids|ah"
)
MASK_ENDING = re.compile(
    rf"(?:[-_ .]+(?:{_MASK_ADDS}))+$|(?<=[a-z0-9])(?:Mask|Seg|Label|GT)$", re.I
)
MASK_BEGINNING = re.compile(rf"^(?:(?:{_MASK_ADDS})[-_ .]+)+|^(?:masks?|seg|label|gt)(?=\d)", re.I)
_IMAGE_ADDS = "images?|imgs?|volumes?|vol|original|orig|raw|scan|input|ct|mri?|training|test|slice"
IMAGE_ENDING = re.compile(
    r"[-_ .]+(?:images?|imgs?|volume|original|orig|raw|input|training|test)$", re.I
)
IMAGE_BEGINNING = re.compile(rf"^(?:{_IMAGE_ADDS})(?:[-_ .]+|(?=\d))", re.I)
# The second of two observers; the first is the truth.
SECOND = re.compile(
    r"[-_ .](?:2ndHO|manual2|2nd[-_ ]?manual|vk|"
    r"(?:observer|reader|rater|annotator|expert)[-_ ]?[2-9])$",
    re.I,
)
# A class at the end of a mask's name: scan7_liver, scan7_tumour, scan7_class2.
CLASS_ENDING = re.compile(r"[-_ .]([A-Za-z][A-Za-z ]*|(?:class|label)[-_]?\d+)$", re.I)
# A number at the end: scan7_1, scan7_lesion2. Not _class2 or _reader2: those are no objects.
_OBJECTS = (
    "lesions?|nodules?|objects?|obj|instances?|inst|cells?|nucle(?:us|i)|polyps?|tumou?rs?|regions?"
)
OBJECT_NUMBER = re.compile(rf"[-_ .](?:(?:{_OBJECTS})[-_ .]?)?(?:\d+|\(\d+\))$", re.I)


def words_of(name: str) -> list[str]:
    """Split a name into words in lower case: leftMask_png → left mask png."""
    return [word.lower() for word in WORDS.findall(name)]


def role_of(name: str) -> tuple[str, str]:
    """Say what a folder holds, "image", "mask" or "", and what else its name says.

    train_images → image, train; CXR_png → image, nothing; labels-ah → mask, ah.
    """
    words = [word for word in words_of(name) if word not in FORMAT_WORDS]
    words = [part for word in words for part in _split_subset(word)]
    if "".join(words) in MASKS | IMAGES:
        return ("mask" if "".join(words) in MASKS else "image"), ""
    for role, known in (("mask", MASKS), ("image", IMAGES)):
        rest = [word for word in words if word not in known]
        joined = [one + other for one, other in pairwise(words)]
        for i, pair in enumerate(joined):
            if pair in known:
                rest = words[:i] + words[i + 2 :]
        if len(rest) < len(words):
            other = IMAGES if role == "mask" else MASKS
            return role, "".join(word for word in rest if word not in other)
    return "", "".join(words)


def _split_subset(word: str) -> list[str]:
    """Split a word such as trainannot or imagestr into two, if both are known."""
    for subset in ("training", "train", "validation", "valid", "val", "test", "tr", "ts"):
        for rest in (word.removeprefix(subset), word.removesuffix(subset)):
            if rest != word and rest in IMAGES | MASKS:
                return [subset, rest]
    return [word]


def subset_of(name: str) -> str:
    """Say which subset a folder's name means: "" if none."""
    return SUBSET_OF.get("".join(word for word in words_of(name) if not word.isdigit()), "")


def plain(name: str) -> str:
    """A folder's name without case, blanks and signs."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def best_masks(folders: list[Folder]) -> list[Folder]:
    """Sort folders of masks, the likeliest first."""

    def rank(folder: Folder) -> tuple[int, str]:
        name = plain(folder.name)
        if name in NO_MASKS:
            return len(BEST_MASKS) + 1, name
        return BEST_MASKS.index(name) if name in BEST_MASKS else len(BEST_MASKS), name

    return sorted(folders, key=rank)


def strip_mask(name: str) -> str:
    """Take from a mask's name what it adds to its image's: scan7_mask, mask_scan7 → scan7."""
    folder, _, own = name.rpartition("/")
    own = MASK_BEGINNING.sub("", MASK_ENDING.sub("", own)) or own
    return f"{folder}/{own}" if folder else own


def strip_image(name: str) -> str:
    """Take from an image's name what its mask may lack: img_7, scan7_image → 7, scan7."""
    folder, _, own = name.rpartition("/")
    own = IMAGE_BEGINNING.sub("", IMAGE_ENDING.sub("", own)) or own
    return f"{folder}/{own}" if folder else own


def is_mask_name(name: str) -> bool:
    """Say whether a file's name without ending says that it is a mask."""
    return strip_mask(name) != name
