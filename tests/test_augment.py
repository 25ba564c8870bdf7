"Augmentation: exact geometry, labels kept, repeatable draws, and no way to touch the test images."
import json
from dataclasses import FrozenInstanceError, asdict, fields

import cv2
import numpy as np
import pytest

from brain_vit._base import InputError
from brain_vit.augment import Augmentation, augment, augment_batch, enlarge
from brain_vit.data import grouped_split
from brain_vit.phantom import phantom_dataset
from brain_vit.preprocess import preprocess_all

GEOMETRY = dict(scale=(0.8, 1.2), stretch=(0.8, 1.2), rotate=(-30, 30), flip=0.5, shift=(-0.1, 0.1), crop=(0.8, 1.0))


def blobs(size=96, seed=0):
    "A smooth gray picture, 0 outside a disc, with a bright square, and the square's mask."
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    image = 0.2 + 0.3 * cv2.GaussianBlur(generator.random((size, size)).astype(np.float32), (0, 0), 3)
    mask = (np.abs(rows + 0.1 * size) < 0.08 * size) & (np.abs(columns - 0.15 * size) < 0.1 * size)
    image[mask] = 1.0
    return (image * (np.hypot(rows, columns) < 0.45 * size)).astype(np.float32)[..., None], mask


def once(image, mask=None, seed=0, **changes):
    return augment(image, np.random.default_rng(seed), Augmentation.none(**changes), mask)


@pytest.mark.parametrize("size", [8, 33, 64, 128, 600])
def test_any_image_stays_an_image(size):
    generator = np.random.default_rng(size)
    for image in (np.zeros((size, size, 1), np.float32), np.ones((size, size, 1), np.float32), generator.random((size, size, 1)), generator.random((size, size, 1)) * 1e-6):
        new, mask = augment(image, generator, mask=image[..., 0] > 0.5)
        assert new.shape == image.shape and new.dtype == np.float32 and mask.shape == image.shape[:2] and mask.dtype == bool
        assert np.isfinite(new).all() and new.min() >= 0 and new.max() <= 1


def test_no_change_is_no_change():
    image, mask = blobs()
    new, moved = once(image, mask)
    assert np.abs(new - image).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_array_equal(moved, mask)


def test_input_is_left_alone():
    image, mask = blobs()
    copies = image.copy(), mask.copy()
    augment(image, np.random.default_rng(0), mask=mask)
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(mask, copies[1])


@pytest.mark.parametrize("changes, expected", [
    (dict(flip=1.0), lambda image: image[:, ::-1]),
    (dict(rotate=(90, 90)), lambda image: np.rot90(image, -1)),
    (dict(rotate=(180, 180)), lambda image: image[::-1, ::-1]),
])
def test_exact_geometry(changes, expected):
    image, mask = blobs()
    new, moved = once(image, mask, **changes)
    assert np.abs(new[..., 0] - expected(image[..., 0])).max() < 0.01
    np.testing.assert_array_equal(moved, expected(mask))


def center(mask):
    return np.argwhere(mask).mean(0)


def test_shift_moves_right_and_down():
    image, mask = blobs(100)
    _, moved = once(image, mask, shift=(0.05, 0.05))
    np.testing.assert_allclose(center(moved) - center(mask), [5, 5], atol=0.01)


@pytest.mark.parametrize("changes, height, width", [
    (dict(scale=(0.5, 0.5)), 0.5, 0.5), (dict(scale=(1.25, 1.25)), 1.25, 1.25), (dict(crop=(0.8, 0.8)), 1.25, 1.25),
    (dict(stretch=(1.44, 1.44)), 1 / 1.2, 1.2), (dict(stretch=(0.64, 0.64)), 1.25, 0.8),
])
def test_sizes_change_by_the_factor(changes, height, width):
    mask = np.zeros((200, 200), bool)
    mask[80:120, 80:120] = True
    _, moved = once(mask[..., None].astype(np.float32), mask, **changes)
    extent = np.ptp(np.argwhere(moved), axis=0) + 1
    np.testing.assert_allclose(extent, [40 * height, 40 * width], atol=1.5)


def test_a_crop_shows_nothing_from_outside():
    image = np.ones((64, 64, 1), np.float32)
    for seed in range(50):
        assert once(image, seed=seed, crop=(0.6, 0.9)).min() > 0.99


def test_the_mask_stays_on_the_lesion():
    image, mask = blobs()
    for seed in range(100):
        new, moved = once(image, mask, seed, **GEOMETRY)
        seen = new[..., 0] > 0.75
        assert (seen & moved).sum() / (seen | moved).sum() > 0.8


def test_a_lesion_of_one_pixel_is_not_rounded_away():
    mask = np.zeros((64, 64), bool)
    mask[30, 33] = True
    assert all(once(np.zeros((64, 64, 1), np.float32), mask, seed, scale=(0.6, 1.2), rotate=(-30, 30))[1].any() for seed in range(200))


@pytest.mark.parametrize("name, values", [("brightness", (0.3, 0.3)), ("contrast", (0.5, 0.5)), ("gamma", (0.4, 0.4)), ("noise", (0.2, 0.2)), ("shading", (0.5, 0.5))])
def test_black_stays_black(name, values):
    image, _ = blobs()
    new = once(image, **{name: values})
    assert new[image == 0].max() == 0
    assert np.abs(new - image).mean() > 0.005


def test_grays_keep_their_order():
    ramp = np.tile(np.linspace(0, 1, 128, dtype=np.float32), (128, 1))[..., None]
    for seed in range(100):
        new = augment(ramp, np.random.default_rng(seed), Augmentation.none(normalize=True, gamma=(0.4, 2.5), contrast=(0.4, 2), brightness=(-0.4, 0.4)))
        assert (np.diff(new[0, :, 0]) >= -1e-6).all()


def test_normalize_brightens_a_dim_image():
    image, _ = blobs()
    assert once(0.3 * image, normalize=True).max() > 0.99
    assert once(0.3 * image).max() < 0.31


def test_every_range_does_something():
    image, _ = blobs()
    for item in fields(Augmentation):
        if item.name != "normalize":
            new = once(image, **{item.name: 1.0 if item.name == "flip" else getattr(Augmentation(), item.name)})
            assert np.abs(new - image).mean() > 0.001, item.name


def test_draws_depend_on_seed_epoch_and_index_only():
    images = np.stack([blobs(seed=number)[0] for number in range(7)])
    masks = np.stack([blobs(seed=number)[1] for number in range(7)])
    indices = np.array([10, 11, 12, 13, 14, 15, 16])
    whole, moved = augment_batch(images, indices, seed=3, epoch=2, masks=masks)
    order = np.array([4, 0, 6])
    part, part_moved = augment_batch(images[order], indices[order], seed=3, epoch=2, masks=masks[order])
    np.testing.assert_array_equal(part, whole[order])
    np.testing.assert_array_equal(part_moved, moved[order])
    np.testing.assert_array_equal(augment_batch(images, indices, seed=3, epoch=2), whole)
    for other in (dict(seed=4, epoch=2), dict(seed=3, epoch=1)):
        changed = augment_batch(images, indices, **other)
        assert all(np.abs(changed[row] - whole[row]).max() > 0.01 for row in range(7))
    same = augment_batch(np.repeat(images[:1], 2, 0), [1, 2])
    assert np.abs(same[0] - same[1]).max() > 0.01


@pytest.mark.parametrize("changes", [
    dict(rotate=(5, -5)), dict(flip=2.0), dict(flip=-0.1), dict(crop=(0.5, 1.5)), dict(crop=(0.0, 1.0)), dict(scale=(0.0, 1.0)), dict(gamma=(-1, 1)),
    dict(stretch=0.9), dict(noise=(0, 1, 2)), dict(scale=(float("nan"), 1.0)),
])
def test_impossible_ranges_are_refused(changes):
    with pytest.raises(ValueError, match="Received"):
        Augmentation(**changes)


def test_settings_survive_json_and_cannot_change():
    settings = Augmentation(rotate=(-3, 3))
    again = Augmentation(**json.loads(json.dumps(asdict(settings))))
    assert again == settings and hash(again) == hash(settings)
    image, _ = blobs()
    np.testing.assert_array_equal(augment(image, np.random.default_rng(0), again), augment(image, np.random.default_rng(0), settings))
    with pytest.raises(FrozenInstanceError):
        settings.flip = 0.0


@pytest.mark.parametrize("shape", [(64, 32, 1), (64, 64, 3), (2, 64, 64, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError):
        augment(np.zeros(shape, np.float32), np.random.default_rng(0))


@pytest.fixture(scope="module")
def data():
    "40 small images in 30 groups, split by groups."
    images = np.stack([blobs(32, seed=number)[0] for number in range(40)])
    masks = np.stack([blobs(32, seed=number)[1] for number in range(40)])
    labels, groups = np.arange(40) % 2, np.r_[np.arange(30), np.arange(10)]
    return images, labels, groups, grouped_split(labels, groups, seed=1), masks


def test_enlarge_makes_the_number_asked_for(data):
    images, labels, groups, parts, masks = data
    rows = np.flatnonzero(parts == "train")
    enlarged = enlarge(images, labels, groups, parts, count=100, masks=masks)
    assert len(enlarged) == len(enlarged.images) == len(enlarged.masks) == len(enlarged.labels) == 100
    np.testing.assert_array_equal(enlarged.images[: len(rows)], images[rows])
    np.testing.assert_array_equal(enlarged.masks[: len(rows)], masks[rows])
    np.testing.assert_array_equal(enlarged.labels, labels[enlarged.parents])
    np.testing.assert_array_equal(enlarged.groups, groups[enlarged.parents])
    assert (parts[enlarged.parents] == "train").all()
    copies = np.bincount(enlarged.parents, minlength=40)[rows]
    assert copies.max() - copies.min() <= 1
    flat = enlarged.images.reshape(100, -1)
    assert len(np.unique(flat, axis=0)) == 100


def test_enlarge_repeats_and_never_looks_at_other_parts(data):
    images, labels, groups, parts, masks = data
    first = enlarge(images, labels, groups, parts, count=70, seed=5)
    spoiled = images.copy()
    spoiled[parts != "train"] = np.nan
    second = enlarge(spoiled, labels, groups, parts, count=70, seed=5)
    np.testing.assert_array_equal(first.images, second.images)
    assert first.masks is None
    assert not np.array_equal(first.images, enlarge(images, labels, groups, parts, count=70, seed=6).images)


def test_enlarge_refuses_leaks_and_nonsense(data):
    images, labels, groups, parts, _ = data
    shuffled = np.random.default_rng(0).permutation(parts)
    with pytest.raises(InputError, match="both sides"):
        enlarge(images, labels, groups, shuffled, count=100)
    with pytest.raises(InputError, match="Parts must be"):
        enlarge(images, labels, groups, np.where(parts == "train", "training", parts), count=100)
    with pytest.raises(InputError, match="Cannot enlarge"):
        enlarge(images, labels, groups, parts, count=5)
    with pytest.raises(InputError, match="Cannot enlarge"):
        enlarge(images, labels, groups, np.full(40, "test"), count=100)
    with pytest.raises(InputError, match="label"):
        enlarge(images, labels[:-1], groups, parts, count=100)
    with pytest.raises(InputError, match="all images"):
        enlarge(images[parts == "train"], labels, groups, parts, count=100)


def test_default_ranges_keep_lesions():
    images, masks = preprocess_all(phantom_dataset(30, seed=8))
    rows = np.flatnonzero(masks.any(axis=(1, 2)))
    gone = 0
    for epoch in range(10):
        gone += (~augment_batch(images[rows], rows, epoch=epoch, masks=masks[rows])[1].any(axis=(1, 2))).sum()
    assert gone <= 0.01 * 10 * len(rows)
