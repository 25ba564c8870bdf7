"Preprocessing: any file, any size, any casing; there and back again."
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from brain_vit._base import InputError
from brain_vit.data import ImageSet, LazyImages, LazyMasks
from brain_vit.phantom import Phantom, phantom_dataset
from brain_vit.preprocess import Frame, find_head, load_dataset, open_preprocessed, preprocess, preprocess_all

SHAPES = [(8, 8), (9, 300), (300, 9), (50, 50), (120, 600), (1080, 1920), (2000, 100)]


def head(height=240, width=200, background=0, seed=0):
    "An ellipse with scalp, dark skull, mottled brain, and a bright spot, on a flat background with little noise."
    generator = np.random.default_rng(seed)
    image = np.full((height, width), background, np.float32)
    center, axes = (width // 2, height // 2), np.array([0.4 * width, 0.42 * height])
    for factor, level in [(1.0, 180), (0.93, 15), (0.88, 110)]:
        cv2.ellipse(image, center, tuple(int(axis) for axis in factor * axes), 0, 0, 360, level, -1)
    cv2.circle(image, (width // 2 + width // 8, height // 2), width // 16, 230, -1)
    return (image + generator.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8)


def square(image, size=128):
    return preprocess(image, size)[1]


def overlap(first, second):
    "Intersection over union of two frames' squares."
    top, left = max(first.top, second.top), max(first.left, second.left)
    bottom = min(first.top + first.side, second.top + second.side)
    right = min(first.left + first.side, second.left + second.side)
    shared = max(0, bottom - top) * max(0, right - left)
    return shared / (first.side**2 + second.side**2 - shared)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["noise", "black", "white", "nan", "inf", "gradient", "uint16", "bool", "int64"])
def test_any_image_gives_a_valid_result(shape, kind):
    generator = np.random.default_rng(0)
    image = {
        "noise": generator.integers(0, 255, shape).astype(np.uint8), "black": np.zeros(shape, np.uint8), "white": np.full(shape, 255, np.uint8),
        "nan": np.full(shape, np.nan), "inf": np.where(generator.random(shape) < 0.5, np.inf, 1.0), "gradient": np.add.outer(np.arange(shape[0]), np.arange(shape[1])) * 1.0,
        "uint16": generator.integers(0, 65535, shape).astype(np.uint16), "bool": generator.random(shape) < 0.5, "int64": generator.integers(-900, 900, shape),
    }[kind]
    result, frame = preprocess(image, 64)
    assert result.shape == (64, 64, 1) and result.dtype == np.float32
    assert np.isfinite(result).all() and result.min() >= 0 and result.max() <= 1
    assert (frame.height, frame.width) == shape and frame.side >= 1


@pytest.mark.parametrize("shape", [(7, 50), (50, 7), (0, 0), (64, 64, 3), (64,), (2, 64, 64, 1)])
def test_what_is_no_gray_image_is_refused(shape):
    with pytest.raises(InputError):
        preprocess(np.zeros(shape))


def test_a_trailing_channel_is_accepted():
    image = head()
    np.testing.assert_array_equal(preprocess(image[..., None])[0], preprocess(image)[0])


def test_deterministic_and_input_untouched():
    image = head()
    copy = image.copy()
    np.testing.assert_array_equal(preprocess(image)[0], preprocess(image)[0])
    np.testing.assert_array_equal(image, copy)


@pytest.mark.parametrize("background", [0, 40, 110, 215, 255])
def test_the_casing_does_not_matter(background):
    expected, frame = preprocess(head())
    result, other = preprocess(head(background=background))
    assert overlap(frame, other) > 0.93
    assert result[:2].max() == result[-2:].max() == result[:, :2].max() == result[:, -2:].max() == 0
    assert np.abs(result - expected).mean() < 0.05


@pytest.mark.parametrize("widths", [(5, 5, 5, 5), (0, 0, 80, 80), (40, 40, 0, 0), (3, 0, 0, 9)])
def test_white_frames_and_bars_are_cut_off(widths):
    frame = square(head())
    framed = square(cv2.copyMakeBorder(head(), *widths, cv2.BORDER_CONSTANT, value=255))
    moved = Frame(framed.height, framed.width, framed.top - widths[0], framed.left - widths[2], framed.side, 128)
    assert overlap(frame, moved) > 0.93


def test_letters_beside_the_head_are_removed():
    image = cv2.copyMakeBorder(head(), 60, 60, 60, 60, cv2.BORDER_CONSTANT)
    lettered = cv2.putText(image.copy(), "R 12:30", (5, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.7, 255, 2)
    np.testing.assert_array_equal(find_head(lettered)[:50, :150], False)
    assert np.abs(preprocess(lettered)[0] - preprocess(image)[0]).mean() < 0.02


def test_grays_do_not_depend_on_range_type_or_outliers():
    expected, _ = preprocess(head())
    for image in (head() / 255, head().astype(np.uint16) * 200 + 3000, head() * 0.25 - 7.0):
        assert np.abs(preprocess(image)[0] - expected).mean() < 0.01
    broken = head().astype(np.uint16)
    broken[120, 100] = 1500
    assert np.abs(preprocess(broken)[0] - expected).mean() < 0.02


def test_the_head_is_not_cut():
    for seed in range(40):
        drawn = Phantom(casing=0.0, frame=0.0).render(9, seed)
        if drawn.mask.any():
            assert (find_head(drawn.image) & drawn.mask).sum() > 0.97 * drawn.mask.sum()


def test_an_image_full_of_tissue_is_kept_whole():
    tissue = cv2.GaussianBlur(np.random.default_rng(0).random((100, 100)).astype(np.float32), (0, 0), 3)
    result, frame = preprocess(tissue)
    assert frame.side >= 96 and (result > 0).mean() > 0.7


@pytest.mark.parametrize("size", [64, 128, 224])
def test_twice_is_once(size):
    for seed in range(12):
        once, _ = preprocess(Phantom.easy().render(4, seed).image, size)
        twice, _ = preprocess(once, size)
        assert np.abs(twice - once).mean() < 0.02


@pytest.mark.parametrize("shape", [(240, 200), (100, 400), (400, 100), (20, 24), (1200, 1500)])
@pytest.mark.parametrize("size", [64, 128])
def test_a_dot_comes_back_to_its_place(shape, size):
    frame = square(head(*shape), size)
    generator = np.random.default_rng(1)
    for _ in range(10):
        row = int(generator.integers(max(0, frame.top), min(shape[0], frame.top + frame.side)))
        column = int(generator.integers(max(0, frame.left), min(shape[1], frame.left + frame.side)))
        dot = np.zeros(shape, bool)
        dot[row, column] = True
        small = frame.to_preprocessed(dot)
        assert small.dtype == bool and small.any()
        back = frame.to_original(small.astype(np.float32))
        assert back.shape == shape and back.dtype == np.float32
        weights = back / back.sum()
        found = np.array([(weights.sum(1) * np.arange(shape[0])).sum(), (weights.sum(0) * np.arange(shape[1])).sum()])
        pixel = max(1.0, 1 / frame.scale)
        clipped = row in (0, shape[0] - 1) or column in (0, shape[1] - 1)
        assert np.abs(found - (row, column)).max() <= pixel * (2 if clipped else 1)


def test_points_agree_with_pixels():
    frame = square(head(300, 180))
    heat = np.zeros((128, 128), np.float32)
    heat[90, 40] = 1
    original = frame.to_original(heat)
    expected = frame.points_to_original([90, 40])
    found = (np.argwhere(original > 0) * original[original > 0][:, None]).sum(0) / original.sum()
    np.testing.assert_allclose(found, expected, atol=0.6)
    points = np.random.default_rng(0).random((7, 5, 2)) * 100
    np.testing.assert_allclose(frame.points_to_original(frame.points_to_preprocessed(points)), points)


def test_frames_refuse_maps_of_the_wrong_size():
    frame = square(head())
    with pytest.raises(InputError):
        frame.to_original(np.zeros((64, 64)))
    with pytest.raises(InputError):
        frame.to_preprocessed(np.zeros((10, 10), bool))
    assert frame.to_original(np.ones((128, 128, 1))).shape == (frame.height, frame.width)


def test_sets_and_masks_move_together():
    phantoms = phantom_dataset(8, seed=3)
    images, masks = preprocess_all(phantoms, 96)
    assert images.shape == (8, 96, 96, 1) and images.dtype == np.float32 and masks.shape == (8, 96, 96) and masks.dtype == bool
    np.testing.assert_array_equal(masks.any(axis=(1, 2)), phantoms.labels == 1)
    for index in range(8):
        np.testing.assert_array_equal(images[index], preprocess(phantoms.images[index], 96)[0])
    bare = ImageSet(phantoms.images, phantoms.labels, phantoms.paths)
    assert preprocess_all(bare, 32)[1] is None


def test_results_in_a_folder_equal_those_in_memory(tmp_path):
    phantoms = phantom_dataset(8, seed=3)
    for image_set in (phantoms, ImageSet(phantoms.images, phantoms.labels, phantoms.paths)):
        folder = tmp_path / ("bare" if image_set.masks is None else "masked")
        for kept in (preprocess_all(image_set, 64, folder), open_preprocessed(folder)):
            for found, expected in zip(kept, preprocess_all(image_set, 64)):
                assert (found is None) == (expected is None)
                if expected is not None:
                    assert isinstance(found, np.memmap) and not found.flags.writeable and found.dtype == expected.dtype
                    np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="exists already"):
        preprocess_all(phantoms, 64, folder)


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    broken = ImageSet([head(), np.zeros((3, 3), np.uint8)], [0, 1], ["a", "b"])
    with pytest.raises(InputError):
        preprocess_all(broken, 64, tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    import types

    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="make room"):
        preprocess_all(phantom_dataset(2, seed=3), 64, tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_folder(tmp_path):
    import tracemalloc

    phantoms = phantom_dataset(20, seed=3, recipe=Phantom.easy(image_size=64))
    for number in range(3000):
        cv2.imwrite(str(tmp_path / f"{number}.png"), phantoms.images[number % 20])
    cv2.imwrite(str(tmp_path / "mask.png"), np.full(phantoms.images[0].shape, 255, np.uint8))
    images = LazyImages(tmp_path / f"{number}.png" for number in range(3000))
    files = ImageSet(images, [1] * 3000, [str(path) for path in images.paths], masks=LazyMasks(images, [tmp_path / "mask.png"] * 3000))
    tracemalloc.start()
    kept, masks = preprocess_all(files, 64, tmp_path / "kept")
    for start in range(0, 3000, 32):
        kept[start:start + 32].mean(), masks[np.arange(start, min(start + 32, 3000))].any()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.nbytes > 45e6 and peak < 15e6


def test_load_dataset(tmp_path):
    assert len(load_dataset("phantom", count=5)) == 5
    for label in ("yes", "no"):
        (tmp_path / label).mkdir()
        for number in range(4):
            cv2.imwrite(str(tmp_path / label / f"{number}.png"), head(seed=number + 10 * (label == "yes")))
    assert len(load_dataset(tmp_path)) == 8
    chosen = load_dataset(str(tmp_path), count=3, seed=1)
    assert len(chosen) == 3 and chosen.paths == load_dataset(tmp_path, count=3, seed=1).paths
    with pytest.raises(InputError):
        load_dataset(tmp_path / "missing")


DATA = os.environ.get("BRAIN_VIT_DATA")


@pytest.mark.skipif(not DATA or not Path(DATA).is_dir(), reason="BRAIN_VIT_DATA does not name the folder of the real images")
def test_real_images_survive_other_casings():
    from brain_vit.data import load_folder

    images = load_folder(DATA).images
    for index in range(0, len(images), 3):
        image = images[index]
        result, frame = preprocess(image)
        assert (result > 0).mean() > 0.35 and frame.side > 0.4 * min(image.shape)
        assert np.abs(preprocess(result)[0] - result).mean() < 0.08
        outside = ~find_head(image)
        for level in (40, 110, 255):
            assert overlap(frame, square(np.where(outside, level, image).astype(np.uint8))) > 0.8
