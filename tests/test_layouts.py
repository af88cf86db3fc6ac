"""Every layout that is recognised by itself: the pairs, classes, patients, subsets, notes."""

import json
import random
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
from conftest import images_of
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

import data
from dataset import layouts, loading
from dataset.loading import Preprocessing
from dataset.reading import read_pair, read_truth
from imaging.labels import Classes
from inference.sampler import Sampler
from utils import UserError


def touch(root: Path, *names: str) -> Path:
    """Make empty files: layouts are recognised by names alone."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def paired(layout: layouts.Layout, root: Path) -> dict[str, tuple[str, ...]]:
    """The masks of each image, as paths below the root."""
    found = {}
    for pair in layout.pairs:
        masks = tuple(path.relative_to(root).as_posix() for path in pair.masks)
        found[pair.image.relative_to(root).as_posix()] = masks
    return found


def find(root: Path) -> layouts.Layout:
    layout = data.find_data(root)
    assert layout.problems == []
    return layout


# --------------------------------------------------------------------------------- two folders


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images", "masks"),
        ("Images", "Masks"),
        ("imgs", "labels"),
        ("image", "label"),
        ("Bilder", "Masken"),
        ("original", "groundtruth"),
        ("Original", "Ground truth"),
        ("img", "gt"),
        ("JPEGImages", "SegmentationClass"),
        ("inputs", "targets"),
        ("scans", "segmentations"),
        ("CXR_png", "masks_png"),
        ("img_dir", "ann_dir"),
        ("images", "1st_manual"),
        ("train", "train_masks"),
        ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
        ("stare-images", "labels-ah"),
        ("slides", "annotations"),
    ],
)
def test_folders_of_usual_names(tmp_path, images, masks):
    touch(tmp_path, *(f"{images}/scan{i}.png" for i in range(3)))
    touch(tmp_path, *(f"{masks}/scan{i}.png" for i in range(3)), "README.md", "thumbs/scan0.png")
    layout = find(tmp_path)
    expected = {f"{images}/scan{i}.png": (f"{masks}/scan{i}.png",) for i in range(3)}
    assert paired(layout, tmp_path) == expected
    assert layout.name.startswith(f"{images}/ + {masks}/")
    assert layout.notes[-1] == "2 files are passed over: README.md, thumbs/scan0.png"


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}.png", "{}_mask.png"),
        ("{}.png", "{}_Mask.PNG"),
        ("{}.png", "{}_masks.png"),
        ("{}.png", "{}_seg.png"),
        ("{}.png", "{}_segmentation.png"),
        ("{}.png", "{}_gt.png"),
        ("{}.png", "{}_GT.png"),
        ("{}.png", "{}_label.png"),
        ("{}.png", "{}_labels.png"),
        ("{}.png", "{}-mask.png"),
        ("{}.png", "{}.mask.png"),
        ("{}.png", "{}_seg_mask.png"),
        ("{}.png", "mask_{}.png"),
        ("{}.png", "Mask_{}.png"),
        ("{}.jpg", "{}.jpg.png"),
        ("{}.jpg", "{}_mask.jpg.png"),
        ("{}.JPG", "{}.bmp"),
        ("{}_training.tif", "{}_manual1.png"),
        ("{}_image.png", "{}_mask.png"),
        ("image_{}.png", "mask_{}.png"),
        ("img{}.png", "mask{}.png"),
        ("volume-{}.nii", "segmentation-{}.nii"),
        ("{}.png", "{}_1stHO.png"),
        ("{}.tif", "{}.ah.tif"),
        ("{}.png", "{}_vessels.png"),
        ("{}.png", "drawn-{}.png"),
        ("{}_0000.png", "{}_mask.png"),
        ("SCAN{}.png", "scan{}_mask.png"),
    ],
)
def test_names_of_masks(tmp_path, image, mask):
    for i in (1, 2, 10, 11):
        touch(tmp_path, f"images/{image.format(i)}", f"masks/{mask.format(i)}")
    expected = {
        f"images/{image.format(i)}": (f"masks/{mask.format(i)}",) for i in sorted((1, 2, 10, 11))
    }
    assert paired(find(tmp_path), tmp_path) == expected


def test_folders_in_folders_pair_with_those_of_their_name(tmp_path):
    for folder in ("a", "b"):
        touch(tmp_path, f"images/{folder}/1.png", f"masks/{folder}/1_mask.png")
    assert paired(find(tmp_path), tmp_path) == {
        "images/a/1.png": ("masks/a/1_mask.png",),
        "images/b/1.png": ("masks/b/1_mask.png",),
    }


def test_litter_is_no_file_of_the_data_set(tmp_path):
    touch(tmp_path, "images/a.png", "masks/a.png")
    for place in ("", "images/", "masks/"):
        touch(tmp_path, f"{place}@eaDir/a.png/x.png", f"{place}__MACOSX/._a.png")
        touch(tmp_path, f"{place}.DS_Store", f"{place}Thumbs.db", f"{place}desktop.ini")
        touch(tmp_path, f"{place}._a.png", f"{place}.ipynb_checkpoints/a.png")
    layout = find(tmp_path)
    assert paired(layout, tmp_path) == {"images/a.png": ("masks/a.png",)}
    assert layout.notes == [] and layout.classes == ""


def test_of_two_folders_of_masks_the_one_that_fits_is_taken_and_the_other_named(tmp_path):
    touch(tmp_path, *(f"images/{i}.png" for i in range(4)), *(f"masks/{i}.png" for i in range(4)))
    touch(tmp_path, "labels/0.png", "labels/1.txt")
    layout = find(tmp_path)
    assert {pair.masks[0].parent.name for pair in layout.pairs} == {"masks"}
    assert "labels/ not used: the masks are those of images/ + masks/" in layout.notes


def test_masks_of_a_second_observer_are_not_used(tmp_path):
    for i in range(3):
        touch(tmp_path, f"images/{i}.png", f"masks/{i}_1stHO.png", f"masks/{i}_2ndHO.png")
    layout = find(tmp_path)
    assert paired(layout, tmp_path)["images/1.png"] == ("masks/1_1stHO.png",)
    assert "3 masks of a second observer are not used (0_2ndHO.png)" in layout.notes[0]


def test_two_masks_of_one_image_are_a_problem(tmp_path):
    touch(tmp_path, "images/a.png", "images/b.png")
    touch(tmp_path, "masks/a.png", "masks/a_mask.png", "masks/b.png")
    (problem,) = data.find_data(tmp_path).problems
    assert "a_mask.png: a second mask of a.png, beside a.png; keep one of them" in problem


# -------------------------------------------------------------------------------- class folders


def test_a_folder_a_class_and_what_is_absent(tmp_path):
    touch(tmp_path, *(f"images/{i}.png" for i in range(4)))
    touch(tmp_path, *(f"masks/liver/{i}.png" for i in range(4)), "masks/tumour/2_mask.png")
    layout = find(tmp_path)
    assert layout.classes == "liver,tumour" and layout.name == "images/ + masks/CLASS/"
    assert paired(layout, tmp_path)["images/1.png"] == ("masks/liver/1.png",)
    both = ("masks/liver/2.png", "masks/tumour/2_mask.png")
    assert paired(layout, tmp_path)["images/2.png"] == both
    note = "masks/tumour has no file for 3 of 4 images: the class is absent there"
    assert note in layout.notes


def test_an_image_without_any_class_is_empty(tmp_path):
    for i in range(3):
        write(tmp_path / f"images/{i}.png", np.full((20, 20), 40 * i))
    write(tmp_path / "masks/liver/0.png", 255 * np.eye(20))
    write(tmp_path / "masks/tumour/1.png", 255 * np.eye(20))
    pairs = find(tmp_path).pairs
    found = [read_truth(pair, Classes("liver,tumour")).mask for pair in pairs]
    assert [set(np.unique(ids)) for ids in found] == [{0, 1}, {0, 2}, {0}]


def test_an_ending_a_class(tmp_path):
    for i in range(3):
        write(tmp_path / f"images/s{i}.png", np.full((20, 20), 40 * i))
        write(tmp_path / f"masks/s{i}_Liver.png", np.eye(20))
    write(tmp_path / "masks/s1_tumour_mask.png", np.fliplr(np.eye(20)))
    layout = find(tmp_path)
    assert layout.classes == "Liver,tumour" and layout.name == "images/ + masks/x_CLASS"
    assert "class tumour has no file for 2 of 3 images: the class is absent there" in layout.notes
    masks = [read_truth(pair, Classes(layout.classes)).mask[0] for pair in layout.pairs]
    assert [np.bincount(mask.ravel()).tolist() for mask in masks] == [
        [380, 20],
        [360, 20, 20],
        [380, 20],
    ]
    with pytest.raises(UserError, match="masks for liver, tumour; --classes names a, b"):
        read_truth(layout.pairs[1], Classes("a,b"))


def test_a_folder_of_objects_an_image(tmp_path):
    for i in range(3):
        touch(tmp_path, f"images/{i}.png", f"masks/{i}/x.png", f"masks/{i}/y.png")
    layout = find(tmp_path)
    assert paired(layout, tmp_path)["images/1.png"] == ("masks/1/x.png", "masks/1/y.png")
    assert layout.classes == ""


# ------------------------------------------------------------------------ one folder, patients


@pytest.mark.parametrize("word", ["", "lesion", "Nodule_"])
def test_numbered_objects_of_an_image(tmp_path, word):
    names = [f"{i}_{word}{k}" for i in range(3) for k in (1, 2)]
    touch(tmp_path, *(f"images/{i}.png" for i in range(3)), *(f"masks/{one}.png" for one in names))
    layout = find(tmp_path)
    assert paired(layout, tmp_path)["images/1.png"] == (
        f"masks/1_{word}1.png",
        f"masks/1_{word}2.png",
    )
    assert layout.notes[0].startswith("several numbered masks of an image are taken for objects")


def test_numbered_masks_in_folders_of_patients_are_told(tmp_path):
    names = [f"p{i}/p{i}_{end}.nii.gz" for i in range(3) for end in ("flair", "mask1", "mask2")]
    layout = find(touch(tmp_path, *names))
    assert all(len(pair.masks) == 2 for pair in layout.pairs)
    assert layout.notes[0].startswith("several numbered masks of an image are taken for objects")


@pytest.mark.parametrize("word", ["class", "label"])
def test_numbered_classes_are_classes(tmp_path, word):
    names = [f"{i}_{word}{k}" for i in range(3) for k in (1, 2)]
    touch(tmp_path, *(f"images/{i}.png" for i in range(3)), *(f"masks/{one}.png" for one in names))
    layout = find(tmp_path)
    assert len(layout.pairs) == 3 and layout.classes == f"{word}1,{word}2"


@pytest.mark.parametrize("word", ["reader", "rater", "Annotator_"])
def test_numbered_readers_are_not_joined(tmp_path, word):
    names = [f"{i}_{word}{k}" for i in range(3) for k in (1, 2, 3)]
    touch(tmp_path, *(f"images/{i}.png" for i in range(3)), *(f"masks/{one}.png" for one in names))
    layout = find(tmp_path)
    assert paired(layout, tmp_path)["images/1.png"] == (f"masks/1_{word}1.png",)
    assert "6 masks of a second observer are not used" in layout.notes[0]


def test_two_unknown_endings_are_not_renamed_to_the_same_name(tmp_path):
    names = [f"masks/{i}_{word}.png" for i in range(3) for word in ("a1", "b1")]
    touch(tmp_path, *(f"images/{i}.png" for i in range(3)), *names)
    first, second = data.find_data(tmp_path).problems
    assert "rename them, such as 0_a1.png to 0.png" in first
    assert "put each class into a folder, such as b1/0.png" in second


def test_numbered_images_have_no_label(tmp_path):
    touch(tmp_path, *(f"{place}/x_{i}.png" for place in ("images", "masks") for i in range(3)))
    assert {pair.label for pair in find(tmp_path).pairs} == {""}


def test_images_and_masks_in_one_folder(tmp_path):
    touch(tmp_path, *(f"{i}.png" for i in range(3)), *(f"{i}_mask.png" for i in range(3)))
    layout = find(tmp_path)
    assert paired(layout, tmp_path)["1.png"] == ("1_mask.png",)
    assert layout.name == "x + x_mask in one folder"
    assert not any(pair.patient for pair in layout.pairs)


def test_brain_mri_in_folders_of_patients(tmp_path):
    """The layout of the LGG segmentation data set."""
    for patient in ("TCGA_CS_4941_19960909", "TCGA_DU_5849_19950405", "TCGA_HT_7602_19951103"):
        for i in (1, 2):
            touch(tmp_path, f"kaggle_3m/{patient}/{patient}_{i}.tif")
            touch(tmp_path, f"kaggle_3m/{patient}/{patient}_{i}_mask.tif")
    touch(tmp_path, "kaggle_3m/data.csv", "kaggle_3m/README.md")
    layout = find(tmp_path)
    assert len(layout.pairs) == 6
    assert all(pair.patient == pair.image.parent.name for pair in layout.pairs)
    assert all(pair.masks[0].stem == f"{pair.stem}_mask" for pair in layout.pairs)


def test_folders_without_numbers_are_labels(tmp_path):
    """The layout of the BUSI data set: an image may have several masks."""
    for kind in ("benign", "malignant", "normal"):
        touch(tmp_path, *(f"{kind}/{kind} ({i}).png" for i in (1, 2)))
        touch(tmp_path, *(f"{kind}/{kind} ({i})_mask.png" for i in (1, 2)))
    touch(tmp_path, "benign/benign (1)_mask_1.png")
    layout = find(tmp_path)
    assert {pair.label for pair in layout.pairs} == {"benign", "malignant", "normal"}
    assert not any(pair.patient for pair in layout.pairs)
    masks = paired(layout, tmp_path)["benign/benign (1).png"]
    assert masks == ("benign/benign (1)_mask.png", "benign/benign (1)_mask_1.png")


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/{}.png", "masks/{}.png"),
        ("images/{}.png", "masks/{}_mask.png"),
        ("study1/images/{}.png", "study1/masks/{}.png"),
        ("study1/images/{}.png", "study1/labels/{}.png"),
    ],
)
def test_a_folder_a_patient(tmp_path, image, mask):
    for patient in range(3):
        for i in range(2):
            touch(tmp_path, f"p{patient}/{image.format(i)}", f"p{patient}/{mask.format(i)}")
    layout = find(tmp_path)
    assert layout.name.startswith("a folder a patient") and len(layout.pairs) == 6
    for pair in layout.pairs:
        patient = pair.image.relative_to(tmp_path).parts[0]
        assert pair.patient == patient and pair.masks[0].relative_to(tmp_path).parts[0] == patient
        assert pair.stem == pair.masks[0].stem.removesuffix("_mask")


def test_a_folder_a_case_with_files_named_after_their_role(tmp_path):
    """The layout of KiTS."""
    for i in range(3):
        touch(tmp_path, f"case_0000{i}/imaging.nii.gz", f"case_0000{i}/segmentation.nii.gz")
    layout = find(tmp_path)
    expected = {
        f"case_0000{i}/imaging.nii.gz": (f"case_0000{i}/segmentation.nii.gz",) for i in range(3)
    }
    assert paired(layout, tmp_path) == expected
    assert layout.pairs[2].patient == "case_00002"


def test_a_folder_a_case_with_several_channels(tmp_path):
    """The layout of BraTS."""
    for i in range(3):
        case = f"BraTS20_{i:03}"
        touch(tmp_path, *(f"{case}/{case}_{kind}.nii.gz" for kind in ("flair", "t1", "t2", "seg")))
    layout = find(tmp_path)
    pair = layout.pairs[1]
    assert len(layout.pairs) == 3 and "3 channels" in layout.name
    assert pair.image.name == "BraTS20_001_flair.nii.gz" and pair.patient == "BraTS20_001"
    assert [path.name for path in pair.more_channels] == [
        "BraTS20_001_t1.nii.gz",
        "BraTS20_001_t2.nii.gz",
    ]
    assert [path.name for path in pair.masks] == ["BraTS20_001_seg.nii.gz"]


def test_data_science_bowl(tmp_path):
    for i in range(3):
        touch(tmp_path, f"id{i}f/images/id{i}f.png", *(f"id{i}f/masks/{k}{i}.png" for k in "abc"))
    layout = find(tmp_path)
    assert paired(layout, tmp_path)["id1f/images/id1f.png"] == tuple(
        f"id1f/masks/{k}1.png" for k in "abc"
    )
    assert "Data Science Bowl" in layout.name and not layout.pairs[0].patient


# ------------------------------------------------------------------------------- ready subsets


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}/images/{}.png", "{}/masks/{}.png"),
        ("images/{}/{}.png", "masks/{}/{}.png"),
        ("{}_images/{}.png", "{}_masks/{}.png"),
        ("{}/{}.png", "{}_annot/{}.png"),
        ("{}/{}.png", "{}annot/{}_L.png"),
        ("{}/{}.png", "{}/{}_mask.png"),
        ("data/{}/images/{}.png", "data/{}/masks/{}.png"),
    ],
)
def test_ready_subsets_with_equal_names(tmp_path, image, mask):
    for folder in ("training", "validation", "test"):
        for i in range(2):
            touch(tmp_path, image.format(folder, i), mask.format(folder, i))
    layout = find(tmp_path)
    assert len(layout.pairs) == 6
    for pair in layout.pairs:
        subset = {"training": "train", "validation": "val", "test": "test"}
        (folder,) = [name for name in subset if f"/{name}" in str(pair.image)[len(str(tmp_path)) :]]
        assert pair.subset == subset[folder] and f"/{folder}" in str(pair.masks[0])
    assert len({pair.group for pair in layout.pairs}) == 6


def test_a_test_folder_without_masks_is_passed_over_and_named(tmp_path):
    touch(tmp_path, "train/images/a.png", "train/masks/a.png", "test/images/b.png")
    layout = find(tmp_path)
    assert paired(layout, tmp_path) == {"train/images/a.png": ("train/masks/a.png",)}
    assert "test/ has no masks and is passed over" in layout.notes


def test_a_test_folder_beside_images_and_masks(tmp_path):
    for place in ("", "test/"):
        touch(tmp_path, f"{place}images/a.png", f"{place}masks/a.png")
    layout = find(tmp_path)
    assert {pair.image.parent.parent.name: pair.subset for pair in layout.pairs} == {
        "test": "test",
        tmp_path.name: "",
    }


def test_patients_of_equal_names_in_two_subsets_are_told(tmp_path):
    for subset, patients in (("train", "123"), ("test", "345")):
        for patient in patients:
            touch(tmp_path, f"{subset}/p{patient}/images/a.png", f"{subset}/p{patient}/masks/a.png")
    layout = find(tmp_path)
    assert len(layout.pairs) == 6 and len({pair.patient for pair in layout.pairs}) == 6
    assert "1 patients have the same name in several subsets (p3)" in " ".join(layout.notes)
    subsets = data.split(layout.pairs, 0, 0.2)
    assert subsets.count("test") == 3


def test_drive(tmp_path):
    for i in (21, 22):
        touch(tmp_path, f"training/images/{i}_training.tif", f"training/1st_manual/{i}_manual1.tif")
        touch(tmp_path, f"training/mask/{i}_training_mask.tif")
    touch(tmp_path, "test/images/01_test.tif", "test/mask/01_test_mask.tif")
    layout = find(tmp_path)
    assert paired(layout, tmp_path) == {
        f"training/images/{i}_training.tif": (f"training/1st_manual/{i}_manual1.tif",)
        for i in (21, 22)
    }
    assert "mask/ is the field of view and is not used" in layout.notes
    assert "test/ has no 1st_manual/ (the truth) and is passed over" in " ".join(layout.notes)


# -------------------------------------------------------------------------------- known layouts


def test_nnunet_with_channels_and_classes(tmp_path):
    for i in range(3):
        touch(tmp_path, f"imagesTr/c{i}_0000.png", f"imagesTr/c{i}_0001.png", f"labelsTr/c{i}.png")
    touch(tmp_path, "imagesTs/c9_0000.png", "imagesTs/c9_0001.png")
    table = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "left kidney": 1, "cyst, large": 2, "ignore": 3},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    layout = find(tmp_path)
    assert layout.name == "nnU-Net, 2 channels, classes from dataset.json"
    assert layout.classes == "left kidney=1,cyst large=2" and layout.ignore == "3"
    assert paired(layout, tmp_path) == {
        f"imagesTr/c{i}_0000.png": (f"labelsTr/c{i}.png",) for i in range(3)
    }
    assert [path.name for path in layout.pairs[1].more_channels] == ["c1_0001.png"]
    (tmp_path / "imagesTr/c1_0001.png").unlink()
    (problem,) = data.find_data(tmp_path).problems
    assert "c1_0000.png: channel _0001 is missing" in problem


def test_nnunet_with_regions(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.png", "labelsTr/a.png")
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    layout = find(tmp_path)
    assert layout.classes == "whole=1,core=2,enhancing=3"
    assert any("smallest" in note for note in layout.notes)


def test_nnunet_with_regions_that_cross(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.png", "labelsTr/a.png")
    labels = {"background": 0, "whole": [1, 3], "core": [2, 3], "rest": 4}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    layout = find(tmp_path)
    assert layout.classes == "whole=1,core=2|3,rest=4"
    assert layout.notes == [
        "regions whole and core of dataset.json share label 3, and none lies within the other: "
        "these pixels are of core alone"
    ]


def test_nnunet_with_subsets(tmp_path):
    for ending in ("Tr", "Va", "Ts"):
        touch(tmp_path, f"images{ending}/{ending}.nii.gz", f"labels{ending}/{ending}.nii.gz")
    layout = find(tmp_path)
    assert {pair.stem: pair.subset for pair in layout.pairs} == {
        "Tr": "train",
        "Va": "val",
        "Ts": "test",
    }


def test_decathlon(tmp_path):
    touch(
        tmp_path,
        *(f"{name}/la_{i:03}.nii.gz" for i in range(3) for name in ("imagesTr", "labelsTr")),
    )
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    layout = find(tmp_path)
    assert layout.classes == "Anterior=1,Posterior=2" and len(layout.pairs) == 3
    assert layout.pairs[0].more_channels == ()


def test_channel_files_are_stacked(tmp_path):
    for k in range(2):
        write(tmp_path / f"imagesTr/a_000{k}.png", np.full((20, 24), 10 + k))
    write(tmp_path / "labelsTr/a.png", np.eye(20, 24))
    (pair,) = find(tmp_path).pairs
    scan, truth = read_pair(pair, Classes("x"))
    assert scan.pixels.shape == (1, 20, 24, 2) and scan.pixels[0, 3, 4].tolist() == [10, 11]
    assert truth.mask.sum() == 20
    write(tmp_path / "imagesTr/a_0001.png", np.full((20, 20), 9))
    with pytest.raises(
        UserError, match=r"a_0001.png: .*20x20 pixels; a_0000.png is .*20x24 pixels"
    ):
        read_pair(pair, Classes("x"))


def test_a_changed_channel_file_is_noticed_by_the_cache(tmp_path):
    for k in range(2):
        noise = np.random.default_rng(k).integers(0, 255, (32, 32))
        write(tmp_path / f"set/imagesTr/a_000{k}.png", noise)
    write(tmp_path / "set/labelsTr/a.png", np.eye(32))
    preprocessing = Preprocessing(Classes("x"), Sampler((32, 32)), channels=2)
    found = []
    for _ in range(2):
        pairs = find(tmp_path / "set").pairs
        dataset, problems = loading.load_pairs(pairs, preprocessing, tmp_path / "cache")
        assert problems == []
        found.append(images_of(dataset))
        write(tmp_path / "set/imagesTr/a_0001.png", 255 - np.arange(1024).reshape(32, 32) // 5)
    assert np.array_equal(found[0][..., 0], found[1][..., 0])
    assert not np.array_equal(found[0][..., 1], found[1][..., 1])


def test_chase(tmp_path):
    for eye in ("01L", "01R", "02L", "02R"):
        touch(tmp_path, f"Image_{eye}.jpg", f"Image_{eye}_1stHO.png", f"Image_{eye}_2ndHO.png")
    layout = find(tmp_path)
    assert paired(layout, tmp_path)["Image_01R.jpg"] == ("Image_01R_1stHO.png",)
    assert [pair.patient for pair in layout.pairs] == ["01", "01", "02", "02"]
    assert "4 masks of the second observer (_2ndHO) are not used" in layout.notes


def test_cvat_with_labelmap(tmp_path):
    for i in range(3):
        touch(tmp_path, f"JPEGImages/{i}.jpg")
        touch(tmp_path, f"SegmentationObject/{i}.png", "ImageSets/Segmentation/default.txt")
    touch(tmp_path, "SegmentationClass/0.png", "SegmentationClass/1.png")
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nliver:255,0,0::\ncyst:0,128,7::\n"
    )
    layout = find(tmp_path)
    assert layout.classes == "liver=#ff0000,cyst=#008007" and len(layout.pairs) == 2
    assert {pair.masks[0].parent.name for pair in layout.pairs} == {"SegmentationClass"}
    assert "1 images have no mask and are passed over" in layout.notes


def test_pascal_voc_with_its_lists_and_void_borders(tmp_path):
    palette = np.zeros((256, 3), np.uint8)
    palette[1:3], palette[255] = [(128, 0, 0), (0, 128, 0)], (224, 224, 192)
    for i in range(3):
        write(tmp_path / f"JPEGImages/{i}.jpg", np.full((20, 20), 40 * i))
        ids = np.zeros((20, 20), np.uint8)
        ids[5:10], ids[10] = 1, 255
        picture = Image.fromarray(ids, mode="P")
        picture.putpalette(palette.ravel().tolist())
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        picture.save(tmp_path / f"SegmentationClass/{i}.png")
    for subset, i in (("train", 0), ("val", 1), ("trainval", 2)):
        touch(tmp_path, f"ImageSets/Segmentation/{subset}.txt", f"Annotations/{i}.xml")
        (tmp_path / f"ImageSets/Segmentation/{subset}.txt").write_text(f"{i}\n")
    (tmp_path / "class_names.txt").write_text("__ignore__\n_background_\nliver\ncyst\n")
    layout = find(tmp_path)
    assert layout.classes == "liver=1,cyst=2" and layout.ignore == "255"
    assert [pair.subset for pair in layout.pairs] == ["train", "val", ""]
    truth = read_pair(layout.pairs[0], Classes(layout.classes, layout.ignore))[1]
    assert (truth.mask == 1).sum() == 100 and truth.ignored.sum() == 20


def test_lists_of_pascal_voc_name_images_with_dots_and_blanks(tmp_path):
    names = ("scan.1", "scan 2", "scan3")
    for name in names:
        write(tmp_path / f"JPEGImages/{name}.png", np.full((20, 20), 40))
        write(tmp_path / f"SegmentationClass/{name}.png", np.eye(20))
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("scan.1\nscan 2.png\n")
    layout = find(tmp_path)
    found = {pair.stem: pair.subset for pair in layout.pairs}
    assert found == {"scan.1": "val", "scan 2": "val", "scan3": ""}
    assert "1 of 3 images are in none of the lists" in layout.notes


def test_names_of_classes_with_signs_of_their_own(tmp_path):
    for name in ("a,b", "c=1"):
        write(tmp_path / f"masks/{name}/x.png", np.eye(20))
    write(tmp_path / "images/x.png", np.full((20, 20), 40))
    layout = find(tmp_path)
    assert layout.classes == "a b,c 1"
    assert set(np.unique(read_pair(layout.pairs[0], Classes(layout.classes))[1].mask)) <= {0, 1, 2}


def test_damaged_tables_are_named_with_the_reason(tmp_path):
    touch(tmp_path / "coco", "images/x.png")
    (tmp_path / "coco/annotations.json").write_text(
        '{"images": [{"id": 1}], "annotations": [], "categories": []}'
    )
    (problem, *_) = data.find_data(tmp_path / "coco").problems
    assert "annotations.json: unreadable as COCO" in problem
    for folder in ("imagesTr", "labelsTr"):
        write(tmp_path / f"nnunet/{folder}/a{'_0000' * (folder == 'imagesTr')}.png", np.eye(20))
    (tmp_path / "nnunet/dataset.json").write_text("{")
    assert any(
        "dataset.json: unreadable" in one for one in data.find_data(tmp_path / "nnunet").problems
    )


# ---------------------------------------------------------------------------------- not known


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["pictures7/a.png", "truht/a.png"], "rename truht to truth"),
        (["images/a.png"], "images/ is there, masks/ lacks"),
        (["masks/a.png"], "masks/ is there, images/ lacks"),
        (["a.png", "b.png"], "there are images and no masks, such as x_mask.png for x.png"),
        (["imagesTr/a.png"], "nearest: nnU-Net; labelsTr/ lacks"),
        (["train/a/a.png", "val/b/b.png"], "nearest: train/ val/ test/"),
    ],
)
def test_an_unknown_layout_is_answered_with_the_nearest(tmp_path, files, said):
    touch(tmp_path / "set", *files)
    with pytest.raises(UserError) as error:
        data.find_data(tmp_path / "set")
    assert said in str(error.value) and "expected images/ + masks/" in str(error.value)
    assert f"\n  set/  {'2 .png' if files[0] == 'a.png' else ''}" in str(error.value)


def test_the_tree_of_an_unknown_layout_is_short(tmp_path):
    touch(tmp_path, *(f"f{i}/g{j}/{k}.dat" for i in range(40) for j in range(9) for k in range(2)))
    with pytest.raises(UserError) as error:
        data.find_data(tmp_path)
    assert len(str(error.value).splitlines()) < 25
    assert "… 36 more folders" in str(error.value) and "2 .dat (0.dat, 1.dat)" in str(error.value)


def test_classes_are_those_of_the_layout_unless_given(tmp_path):
    touch(tmp_path, "images/a.png", "masks/liver/a.png", "masks/cyst/a.png")
    layout = find(tmp_path)
    assert data.choose_classes("", layout) == "cyst,liver"
    assert data.choose_classes("x", layout) == "x"
    assert data.choose_classes("") == "foreground"
    assert Classes(data.choose_classes("", layout)).names == ["cyst", "liver"]


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels.astype(np.uint8))


# --------------------------------------------------------------------------------- radiotherapy


def write_series(folder: Path, uid: str, count: int = 4) -> None:
    """Write slices of CT of 3 mm, 32 x 32 pixels of 2 mm."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        header = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        header.SeriesInstanceUID, header.SOPInstanceUID = uid, f"{uid}.{i + 1}"
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
        header.Rows = header.Columns = 32
        header.PixelSpacing, header.SliceThickness = [2, 2], 3
        header.ImagePositionPatient, header.InstanceNumber = [0, 0, 3 * i], i + 1
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        header.PixelData = np.full((32, 32), 100 + i, np.int16).tobytes()
        header.save_as(folder / f"IM{i}")


def write_contours(path: Path, uid: str, structures: dict[str, float]) -> None:
    """Write an RTSTRUCT with a square of 20 mm in slice 1 for each structure, at its offset."""
    header = Dataset()
    header.SOPClassUID, header.Modality = "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"
    header.SOPInstanceUID, header.SeriesInstanceUID = f"{uid}.900", f"{uid}.901"
    reference, study, series = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = uid
    study.RTReferencedSeriesSequence = [series]
    reference.RTReferencedStudySequence = [study]
    header.ReferencedFrameOfReferenceSequence = [reference]
    header.StructureSetROISequence, header.ROIContourSequence = [], []
    for number, (name, offset) in enumerate(structures.items(), 1):
        roi, contours, contour = Dataset(), Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, contours.ReferencedROINumber = number, name, number
        low, high = offset - 1, offset + 19  # pixels' centres are at 0, 2, 4 mm
        contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
        corners = [(low, low), (high, low), (high, high), (low, high)]
        contour.ContourData = [value for x, y in corners for value in (x, y, 3)]
        contours.ContourSequence = [contour]
        header.StructureSetROISequence.append(roi)
        header.ROIContourSequence.append(contours)
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("place", ["{}/RS.dcm", "{}/CT/RS.dcm", "{}/RTSTRUCT/RS.dcm"])
def test_contours_of_radiotherapy(tmp_path, place):
    for i in range(1, 4):
        uid = f"1.2.3.{i}"
        write_series(tmp_path / f"patient{i}" / "CT", uid)
        structures = {"BODY": -1.0, "Liver": 10.0, "Spleen": 40.0}
        if i == 3:
            del structures["Spleen"]
        write_contours(tmp_path / place.format(f"patient{i}"), uid, structures)
    layout = find(tmp_path)
    assert layout.classes == "Liver,Spleen" and "RTSTRUCT" in layout.name
    assert [pair.patient for pair in layout.pairs] == ["patient1", "patient2", "patient3"]
    assert [pair.image.name for pair in layout.pairs] == ["CT"] * 3
    masks = [read_pair(pair, Classes(layout.classes))[1].mask for pair in layout.pairs]
    expected = np.zeros((4, 32, 32), np.uint8)
    expected[1, 5:15, 5:15] = 1
    np.testing.assert_array_equal(masks[2], expected)
    expected[1, 20:30, 20:30] = 2
    np.testing.assert_array_equal(masks[0], expected)


def test_a_link_that_leads_back_is_not_followed(tmp_path):
    touch(tmp_path, "images/a.png", "masks/a.png")
    for place in ("images/again", "masks/again", "loop"):
        (tmp_path / place).symlink_to(tmp_path)
    assert paired(find(tmp_path), tmp_path) == {"images/a.png": ("masks/a.png",)}


# ------------------------------------------------------------------------------------ any folder

FOLDERS = (
    "images masks labels train val test p1 p2 p3 liver tumour imagesTr labelsTr mask 1st_manual "
    "JPEGImages SegmentationClass CXR_png ManualMask leftMask rightMask benign normal [1] ä"
)
STEMS = (
    "a b 1 2 a_mask b_mask 1_seg mask_2 a_1stHO a_2ndHO 01L 01L_1stHO a_0000 a_0001 21_training "
    "image mask imaging segmentation p1_t1 p1_seg ._a a_1 a_2"
)
CONTENTS = {
    ".png": [""],
    ".nii.gz": [""],
    "": [""],
    ".dcm": [""],
    ".mhd": [""],
    ".raw": [""],
    "dataset.json": [
        '{"labels": {"background": 0, "a": [1, 2], "b": "x"}}',
        '{"labels": {"0": "background", "1": "liver"}}',
        "{",
    ],
    "x.json": [
        '{"images": 3, "annotations": [], "categories": []}',
        '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1}], '
        '"categories": [{"id": 1, "name": "x"}]}',
    ],
    ".json": ['{"shapes": [{"label": "x", "points": [[1, 2], [3, 4], [5, 6]]}]}', "[1]"],
    "labelmap.txt": ["liver:1,2,3::", "x"],
    "index.csv": ["stem,patient\na,1\n", "stem;split\n1;test\n2;foo", "", "x"],
}


@pytest.mark.parametrize("seed", range(4))
def test_any_folder_is_recognised_or_answered(tmp_path, seed):
    for number in range(60):
        root = tmp_path / str(number)
        draw_folder(root, random.Random(1000 * seed + number))
        try:
            layout = data.find_data(root)
        except UserError:
            continue
        assert layout.pairs or layout.problems
        images = [pair.image for pair in layout.pairs]
        assert len(set(images)) == len(images)
        for pair in layout.pairs:
            assert pair.image.exists() and all(path.exists() for path in pair.masks)
            assert pair.image not in pair.masks and len(set(pair.masks)) == len(pair.masks)


def draw_folder(root: Path, rng: random.Random) -> None:
    """Make a folder of usual names, put together by chance."""
    folders = [root]
    for _ in range(rng.randint(0, 7)):
        folders.append(rng.choice(folders) / rng.choice(FOLDERS.split()))
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for _ in range(rng.randint(0, 25)):
        ending = rng.choice(list(CONTENTS))
        own = ending[0:1] not in ("", ".")
        path = rng.choice(folders) / (ending if own else rng.choice(STEMS.split()) + ending)
        if not path.is_dir():
            path.write_text(rng.choice(CONTENTS[ending]))


@pytest.mark.parametrize("kind", ["RGB", "P"])
def test_masks_of_cvat_are_read_by_their_colours(tmp_path, kind):
    ids = np.zeros((20, 24), np.uint8)
    ids[2:6], ids[10:12] = 2, 1  # the palette has another order than labelmap.txt
    palette = np.zeros((256, 3), np.uint8)
    palette[1:3] = [(0, 128, 7), (255, 0, 0)]
    picture = Image.fromarray(ids, mode="P")
    picture.putpalette(palette.ravel().tolist())
    for i in range(2):
        write(tmp_path / f"JPEGImages/{i}.jpg", np.full((20, 24), 40 * i))
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        picture.convert(kind).save(tmp_path / f"SegmentationClass/{i}.png")
    text = "background:0,0,0::\nliver:255,0,0::\ncyst:0,128,7::\n"
    (tmp_path / "labelmap.txt").write_text(text)
    layout = find(tmp_path)
    mask = read_pair(layout.pairs[0], Classes(layout.classes))[1].mask[0]
    assert layout.classes == "liver=#ff0000,cyst=#008007"
    assert (mask[2:6] == 1).all() and (mask[10:12] == 2).all() and np.count_nonzero(mask) == 144


def test_four_dimensional_volumes_of_the_decathlon_are_channels(tmp_path):
    for name, shape in (("imagesTr", (20, 24, 5, 3)), ("labelsTr", (20, 24, 5))):
        (tmp_path / name).mkdir()
        volume = np.arange(np.prod(shape)).reshape(shape).astype(np.int16) % 3
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / name / "BRATS_001.nii.gz")
    labels = {"0": "background", "1": "edema", "2": "tumour"}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    layout = find(tmp_path)
    scan, truth = read_pair(layout.pairs[0], Classes(layout.classes))
    assert scan.pixels.shape == (5, 24, 20, 3) or scan.pixels.shape == (5, 20, 24, 3)
    assert set(np.unique(truth.mask)) == {0, 1, 2}
