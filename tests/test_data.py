"""Reading files and folders, and cutting a set into parts."""
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brain_vit._base import InputError
from brain_vit.data import (ImageSet, LazyImages, LazyMasks, download_kaggle, grouped_folds, grouped_split,
                            load_folder, read_image, read_mask)

REAL = os.environ.get("BRAIN_VIT_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="BRAIN_VIT_DATA does not name the folder of real images")


def picture(seed=0, shape=(40, 30)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype="uint8")


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        save(tmp_path / "set" / "yes" / f"Y {i}.png", picture(i))
        save(tmp_path / "set" / "no" / f"n{i}.png", picture(10 + i))
    return tmp_path / "set"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_gives_gray_of_the_same_shape(tmp_path, mode):
    gray = np.tile(np.linspace(0, 255, 30).astype("uint8"), (40, 1))
    image = Image.fromarray(gray.astype("uint16") * 257) if mode == "I;16" else Image.fromarray(gray).convert(mode)
    image.save(tmp_path / "image.tif")
    read = read_image(tmp_path / "image.tif")
    assert read.shape == (40, 30) and read.dtype == np.uint8
    if mode != "1":
        assert abs(read.astype(int) - gray).max() <= 6


def test_transparent_pixels_are_black(tmp_path):
    Image.new("RGBA", (5, 4), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").max() == 0


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(picture(), -1))


def test_sixteen_bits_are_not_cut_off(tmp_path):
    Image.fromarray((picture() * 16).astype("uint16") + 1000).save(tmp_path / "deep.png")
    assert len(np.unique(read_image(tmp_path / "deep.png"))) > 10


def broken_files(folder):
    save(folder / "good.jpg", picture(shape=(200, 200)))
    data = (folder / "good.jpg").read_bytes()
    files = {"empty.jpg": b"", "text.jpg": b"not an image", "half.jpg": data[: len(data) // 2], "head.jpg": data[:300]}
    save(folder / "good.png", picture(shape=(200, 200)))
    files["half.png"] = (folder / "good.png").read_bytes()[:2000]
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return list(files)


def test_broken_files_raise_one_sentence_with_their_name(tmp_path):
    for name in broken_files(tmp_path) + ["missing.jpg"]:
        with pytest.raises(InputError) as error:
            read_image(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="folder"):
        read_image(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(InputError, match="pixels"):
        read_image(tmp_path / "bomb.png")


def test_labels_come_from_folder_names_in_any_case(tmp_path):
    save(tmp_path / "YES" / "a.JPG", picture(0), format="JPEG")
    save(tmp_path / "No" / "sub" / "b.jpeg", picture(1))
    loaded = load_folder(tmp_path)
    assert dict(zip(loaded.paths, loaded.labels.tolist())) == {"YES/a.JPG": 1, "No/sub/b.jpeg": 0}
    assert loaded.skipped == [] and loaded.name == tmp_path.name


def test_a_set_has_the_name_of_its_folder_however_it_is_given(tmp_path, monkeypatch):
    for word in ("yes", "no"):
        save(tmp_path / "slices" / word / "a.png", picture(0))
    monkeypatch.chdir(tmp_path / "slices")
    assert load_folder(".").name == load_folder("yes/..").name == load_folder(tmp_path / "slices").name == "slices"


def test_the_kaggle_set_is_called_kaggle(tmp_path, monkeypatch):
    import brain_vit.preprocess
    for number, word in enumerate(("yes", "no")):
        save(tmp_path / "versions" / "1" / word / "a.png", picture(number))
    monkeypatch.setattr(brain_vit.preprocess, "download_kaggle", lambda: tmp_path / "versions" / "1")
    assert brain_vit.preprocess.load_dataset("kaggle").name == "kaggle"


def test_content_decides_about_the_format(folder):
    save(folder / "yes" / "png.jpg", picture(5), format="PNG")
    save(folder / "yes" / "noSuffix", picture(6), format="BMP")
    assert {"yes/png.jpg", "yes/noSuffix"} <= set(load_folder(folder).paths)


def test_every_unreadable_file_is_reported_and_hidden_ones_are_not(folder):
    names = broken_files(folder / "yes")
    (folder / "no" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "no" / ".DS_Store").write_bytes(b"x")
    (folder / "no" / "._n0.png").write_bytes(b"x")
    loaded = load_folder(folder)
    assert {path for path, _ in loaded.skipped} == {f"yes/{name}" for name in names} | {"no/gone.png"}
    assert len(loaded) == 8 and all(reason for _, reason in loaded.skipped)


def test_linked_files_are_read_and_share_a_group(folder):
    (folder / "no" / "link.png").symlink_to(folder / "no" / "n0.png")
    loaded = load_folder(folder)
    assert len(loaded) == 7 and len(set(loaded.groups)) == 6


def test_a_nested_copy_is_not_counted_twice(folder):
    for file in [*folder.glob("yes/*"), *folder.glob("no/*")]:
        copy = folder / "brain_tumor_dataset" / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    loaded = load_folder(folder)
    assert len(loaded) == 6 and [path for path, _ in loaded.skipped] == ["brain_tumor_dataset"]
    assert "copy" in loaded.skipped[0][1]
    save(folder / "brain_tumor_dataset" / "yes" / "new.png", picture(77))
    assert "1 of its 7 files" in load_folder(folder).skipped[0][1]


def test_a_set_one_level_down_is_found_and_two_are_not_guessed(folder):
    assert len(load_folder(folder.parent)) == 6
    save(folder.parent / "other" / "yes" / "a.png", picture(1))
    save(folder.parent / "other" / "no" / "a.png", picture(2))
    with pytest.raises(InputError, match="several"):
        load_folder(folder.parent)


@pytest.mark.parametrize("make, message", [
    (lambda path: None, "does not exist"),
    (lambda path: path.mkdir(), "yes"),
    (lambda path: save(path / "yes" / "a.png", picture()), "'no'"),
    (lambda path: [(path / name).mkdir(parents=True) for name in ("yes", "no")], "no readable image"),
    (lambda path: path.write_text("x"), "is a file"),
])
def test_unusable_folders_give_one_sentence(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(InputError, match=message) as error:
        load_folder(tmp_path / "data")
    assert "\n" not in str(error.value)


def test_a_class_with_broken_files_only_names_one(folder):
    for file in (folder / "no").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match="n0.png"):
        load_folder(folder)


def test_masks_are_read_when_complete(folder):
    for i in range(3):
        save(folder / "masks" / f"Y {i}.png", np.uint8(255 * (picture(i) > 128)))
    loaded = load_folder(folder)
    for i, (label, mask) in enumerate(zip(loaded.labels, loaded.masks)):
        assert mask.dtype == bool and mask.shape == (40, 30) and mask.any() == bool(label)
    assert loaded.subset(loaded.labels == 1).masks[0].any()
    (folder / "masks" / "Y 1.png").unlink()
    loaded = load_folder(folder)
    assert loaded.masks is None and loaded.skipped[0][0] == "masks"


def test_a_mask_of_another_size_is_refused(tmp_path):
    save(tmp_path / "mask.png", picture(shape=(10, 10)))
    with pytest.raises(InputError, match="own pixels"):
        LazyMasks([picture()], [tmp_path / "mask.png"])[0]


@pytest.mark.parametrize("kind", ["white", "gray", "dark red", "one bit", "labels", "deep labels", "deep white", "lossy"])
def test_masks_of_all_kinds_are_read(tmp_path, kind):
    "White on black, gray on black, dark red of a palette, one bit, labels from 1 up with 8 and 16 bits, JPEG."
    rows, columns = np.mgrid[:40, :30]
    expected, labels = np.hypot(rows - 20, columns - 15) < 9, np.where(columns < 15, 1, 4)
    levels = {"white": 250 * expected + 3, "gray": 100 * expected, "lossy": 100 * expected, "deep white": 65535 * expected}.get(kind, expected * (labels if "labels" in kind else 1))
    image = Image.fromarray(levels.astype("uint16" if "deep" in kind else "uint8"))
    if kind == "dark red":
        image.putpalette([0, 0, 0, 128, 0, 0])
    if kind == "one bit":
        image = Image.fromarray(expected)
    file = tmp_path / ("mask.jpg" if kind == "lossy" else "mask.png")
    image.save(file)
    assert (read_mask(file, expected.shape) != expected).sum() <= (10 if kind == "lossy" else 0)


@pytest.mark.parametrize("level", [0, 3])
def test_a_mask_of_one_dark_level_holds_no_lesion(tmp_path, level):
    save(tmp_path / "mask.png", np.full((40, 30), level, "uint8"))
    assert not read_mask(tmp_path / "mask.png", (40, 30)).any()


def test_linked_folders_are_no_masks(tmp_path):
    for name in ("yes/p1.png", "yes/p2.png", "no/3.png", "masks/p2.png", "elsewhere/x.png"):
        save(tmp_path / "set" / name, picture())
    (tmp_path / "set" / "masks" / "p1").symlink_to(tmp_path / "set" / "elsewhere")
    loaded = load_folder(tmp_path / "set")
    assert loaded.masks is None and "have no mask" in loaded.skipped[0][1]


def test_one_picture_in_two_formats_has_one_mask(tmp_path):
    for name in ("yes/1.png", "yes/1.jpg", "yes/2.png", "no/3.png", "masks/yes/1.png", "masks/yes/2.png"):
        save(tmp_path / name, picture())
    assert load_folder(tmp_path).masks is not None


def test_a_mask_that_fits_two_images_is_nobodys(tmp_path):
    for name in ("yes/p1/001.png", "yes/p2/001.png", "no/2.png", "masks/p1/001.png"):
        save(tmp_path / name, picture())
    loaded = load_folder(tmp_path)
    assert loaded.masks is None and loaded.skipped[0][0] == "masks" and "several" in loaded.skipped[0][1]
    save(tmp_path / "masks" / "p2" / "001.png", picture())
    assert load_folder(tmp_path).masks is not None


def test_linked_files_go_by_their_own_names_and_linked_folders_are_named(tmp_path):
    save(tmp_path / "store" / "ab12.png", picture())
    for name in ("set/no/1.png", "set/masks/a.png", "elsewhere/b.png"):
        save(tmp_path / name, picture(3))
    (tmp_path / "set" / "yes").mkdir()
    (tmp_path / "set" / "yes" / "a.png").symlink_to(tmp_path / "store" / "ab12.png")
    (tmp_path / "set" / "yes" / "p1").symlink_to(tmp_path / "elsewhere")
    loaded = load_folder(tmp_path / "set")
    assert loaded.paths == ["no/1.png", "yes/a.png"] and loaded.masks is not None
    assert [path for path, _ in loaded.skipped] == ["yes/p1"] and "link to a folder" in loaded.skipped[0][1]


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, close_folders):
    for name in ("yes/1.png", "yes/deep/2.png", "no/3.png"):
        save(tmp_path / name, picture())
    close_folders("deep")
    assert [path for path, _ in load_folder(tmp_path).skipped] == ["yes/deep"]


def test_a_file_with_many_pictures_is_refused(tmp_path):
    pages = [Image.fromarray(picture(i)) for i in range(3)]
    for name in ("stack.tif", "moving.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(InputError, match=f"{name}' holds 3 pictures"):
            read_image(tmp_path / name)


def test_previews_and_photographs_of_phones_are_no_second_picture(tmp_path):
    whole, small = (Image.fromarray(picture(shape=shape)) for shape in ((40, 30), (10, 8)))
    whole.save(tmp_path / "preview.tif", save_all=True, append_images=[small])
    whole.save(tmp_path / "phone.mpo", save_all=True, append_images=[whole])
    for name in ("preview.tif", "phone.mpo"):
        assert read_image(tmp_path / name).shape == (40, 30)


def test_a_tiff_with_a_torn_end_still_holds_its_picture(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "whole.tif")
    content = bytearray((tmp_path / "whole.tif").read_bytes())
    start = int.from_bytes(content[4:8], "little")
    end = start + 2 + 12 * int.from_bytes(content[start:start + 2], "little")
    content[end:end + 4] = (10**6).to_bytes(4, "little")  # where the next picture would begin
    (tmp_path / "torn.tif").write_bytes(content)
    np.testing.assert_array_equal(read_image(tmp_path / "torn.tif"), picture())


def test_what_is_no_slice_is_skipped_by_name(folder):
    before = len(load_folder(folder))
    save(folder / "no" / "pixel.png", picture(shape=(1, 50)))
    save(folder / "no" / "strip.png", picture(shape=(20, 400)))
    skipped = dict(load_folder(folder).skipped)
    assert "at least 8 by 8" in skipped["no/pixel.png"] and "too narrow" in skipped["no/strip.png"] and before == len(load_folder(folder))


def test_a_name_that_is_no_text_is_skipped(folder, tmp_path):
    from brain_vit._base import write_json, write_text
    save(folder / "yes" / os.fsdecode(b"caf\xe9.png"), picture())
    path, reason = load_folder(folder).skipped[-1]
    assert path.startswith("yes/caf") and "rename" in reason
    place = tmp_path / os.fsdecode(b"th\xe8se")
    folder.rename(place)  # above the set any name will do
    assert len(load_folder(place)) == 6
    write_text(tmp_path / "report.md", reason)
    write_json(tmp_path / "report.json", [reason])
    assert "caf" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_reading_leaves_the_callers_warnings_alone(folder):
    import warnings
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: read_image(next((folder / "yes").iterdir())), range(200)))
    assert warnings.filters == before


def test_subset_keeps_everything_together_and_lazy(folder):
    loaded = load_folder(folder)
    chosen = loaded.subset([4, 0])
    assert isinstance(chosen.images, LazyImages) and chosen.paths == [loaded.paths[4], loaded.paths[0]]
    assert chosen.labels.tolist() == [1, 0] and chosen.groups.tolist() == loaded.groups[[4, 0]].tolist()
    np.testing.assert_array_equal(chosen.images[0], loaded.images[4])
    memory = ImageSet(np.zeros((3, 4, 4), "uint8"), [0, 1, 0], list("abc"))
    assert memory.subset(memory.labels == 0).images.shape == (2, 4, 4)


def test_kaggle_errors_become_one_sentence(monkeypatch):
    def fail(name):
        raise ConnectionError("no network")
    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=fail))
    with pytest.raises(InputError, match="Kaggle"):
        download_kaggle()
    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=lambda name: "/cache"))
    assert download_kaggle() == Path("/cache")


def random_set(generator):
    "Labels and groups of a random set; one set in three has groups of both labels."
    sizes = generator.choice([1, 1, 1, 2, 3, 5], size=generator.integers(40, 120))
    groups = np.repeat(generator.permutation(1000)[: len(sizes)], sizes)
    labels = np.repeat(generator.random(len(sizes)) < generator.uniform(0.3, 0.7), sizes).astype(int)
    mixed = generator.random() < 1 / 3
    if mixed:
        labels = labels ^ (generator.random(len(labels)) < 0.05)
    return labels, groups, sizes.max(), mixed


@pytest.mark.parametrize("seed", range(30))
def test_no_group_is_ever_split_and_strata_stay_within_one_group(seed):
    generator = np.random.default_rng(seed)
    labels, groups, largest, mixed = random_set(generator)
    num_folds = int(generator.integers(2, 6))
    folds = grouped_folds(labels, groups, num_folds, seed)
    part = grouped_split(labels, groups, seed=seed)
    for group in np.unique(groups):
        assert len(set(folds[groups == group])) == 1 and len(set(part[groups == group])) == 1
    assert set(folds) == set(range(num_folds)) and set(part) == {"train", "validation", "test"}
    for label in (0, 1):
        of_label = labels == label
        per_fold = np.bincount(folds[of_label], minlength=num_folds)
        slack = largest + (2 if mixed else 0)
        assert abs(per_fold - of_label.sum() / num_folds).max() <= slack
        for name, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
            count = (part[of_label] == name).sum()
            assert count >= 1 and abs(count - share * of_label.sum()) <= slack


def test_parts_are_the_same_for_the_same_seed_only():
    labels, groups, *_ = random_set(np.random.default_rng(1))
    np.testing.assert_array_equal(grouped_split(labels, groups, seed=3), grouped_split(labels, groups, seed=3))
    np.testing.assert_array_equal(grouped_folds(labels, groups, seed=3), grouped_folds(labels, groups, seed=3))
    assert (grouped_split(labels, groups, seed=3) != grouped_split(labels, groups, seed=4)).any()
    assert (grouped_folds(labels, groups, seed=3) != grouped_folds(labels, groups, seed=4)).any()


def test_large_groups_reach_the_test_part_as_often_as_its_share():
    groups = np.repeat(np.arange(60), [5] * 20 + [1] * 40)
    labels = np.tile([0, 1], 70)[np.argsort(np.argsort(groups, kind="stable"))] * 0 + (groups % 2)
    share = np.mean([(grouped_split(labels, groups, seed=seed)[:100] == "test").mean() for seed in range(200)])
    assert 0.06 < share < 0.14


def test_smallest_sets_still_have_every_class_in_every_part():
    for seed in range(50):
        part = grouped_split([0] * 4 + [1] * 4, np.arange(8), seed=seed)
        for name in ("train", "validation", "test"):
            assert (part[:4] == name).any() and (part[4:] == name).any()


def test_a_part_without_share_stays_empty():
    part = grouped_split([0, 1] * 20, np.arange(40), (0.75, 0, 0.25))
    assert set(part) == {"train", "test"} and (part == "test").sum() == 10


@pytest.mark.parametrize("call, message", [
    (lambda: grouped_folds([0, 0, 1, 1], [0, 0, 1, 1], 2), "too few"),
    (lambda: grouped_folds([0, 1] * 9, np.arange(18), 1), "At least 2"),
    (lambda: grouped_split([0, 1] * 9, np.zeros(18)), "too few"),
    (lambda: grouped_split([0, 1], [0, 1], (0.5, 0.5)), "three"),
    (lambda: grouped_split([], []), "at least 1"),
    (lambda: grouped_split([0, 1], [0]), "one length"),
])
def test_impossible_cuts_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@needs_real
def test_real_images_are_all_read():
    loaded = load_folder(REAL)
    assert len(loaded) == 253 and loaded.labels.sum() == 155 and loaded.skipped == []
    assert len(set(loaded.groups)) == 228


def test_images_of_one_stem_have_masks_in_their_places(folder):
    for place, value in (("", 255), ("left", 0), ("right", 255)):
        save(folder / "yes" / place / "Y 9.png", picture(30))
        save(folder / "masks" / "yes" / place / "Y 9.png", np.full((40, 30), value, "uint8"))
    for i in range(3):
        save(folder / "masks" / f"Y {i}.png", np.full((40, 30), 255, "uint8"))
    loaded = load_folder(folder)
    assert {path: bool(mask.any()) for path, mask in zip(loaded.paths, loaded.masks) if "9" in path} == {
        "yes/Y 9.png": True, "yes/left/Y 9.png": False, "yes/right/Y 9.png": True}


def test_two_masks_for_one_image_are_refused(folder):
    for i in range(3):
        save(folder / "masks" / f"Y {i}.png", np.full((40, 30), 255, "uint8"))
    save(folder / "masks" / "Y 1_mask.png", np.full((40, 30), 255, "uint8"))
    with pytest.raises(InputError, match="more than one mask"):
        load_folder(folder)
