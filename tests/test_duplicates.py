"""Twins made on purpose are found, look-alikes are not."""
import os

import cv2
import numpy as np
import pytest

from brain_vit.data import ImageSet, load_folder
from brain_vit.duplicates import (StoredKeypoints, candidate_pairs, duplicate_groups, find_keypoints, group_sheet, images_with,
                                  in_turns, index_words, linked, stored_table, twin_pairs, weigh, with_groups)
from brain_vit.phantom import Phantom

REAL = os.environ.get("BRAIN_VIT_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="BRAIN_VIT_DATA does not name the folder of real images")
COUNT = 40


@pytest.fixture(scope="module")
def heads():
    recipe = Phantom.full(image_size=160)
    return [recipe.render(21, index).image for index in range(COUNT)]


def jpeg(image, quality):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_GRAYSCALE)


def shift_contrast(image):
    return (255 * (image / 255) ** 0.6 * 0.8 + 20).astype("uint8")


TWINS = {
    "larger": lambda image: cv2.resize(image, None, fx=1.7, fy=1.7),
    "smaller": lambda image: cv2.resize(image, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA),
    "stretched": lambda image: cv2.resize(image, (200, 160)),
    "cropped": lambda image: image[14:-6, 8:-18],
    "padded": lambda image: np.pad(image, [(10, 40), (30, 5)]),
    "contrast": shift_contrast,
    "compressed": lambda image: jpeg(image, 30),
    "quarter turn": lambda image: np.rot90(image).copy(),
    "upside down": lambda image: np.rot90(image, 2).copy(),
    "mirrored": lambda image: image[:, ::-1].copy(),
    "mirrored and turned": lambda image: np.rot90(image[:, ::-1]).copy(),
    "all at once": lambda image: jpeg(shift_contrast(np.rot90(image[8:-4, 6:-8][:, ::-1], 3).copy()), 40),
}


def check(images, origin, least):
    "No image is joined with a stranger, and at least this share of the twins is found."
    groups = duplicate_groups(images)
    for group in np.unique(groups):
        assert len(set(origin[groups == group])) == 1
    assert np.mean([groups[i] == groups[origin[i]] for i in range(COUNT, len(images))]) >= least


@pytest.mark.parametrize("kind", TWINS)
def test_twins_are_found_and_strangers_are_not_joined(heads, kind):
    chosen = np.arange(0, COUNT, 4)
    check(heads + [TWINS[kind](heads[i]) for i in chosen], np.concatenate([np.arange(COUNT), chosen]), 0.9)


def test_shared_letters_and_frames_join_nobody(heads):
    printed = []
    for head in heads:
        image = cv2.rectangle(head.copy(), (1, 1), (158, 158), 220, 1)
        for row, text in enumerate(("HOSPITAL 1.5T", "SE 2 IM 14", "TR 500 TE 12")):
            cv2.putText(image, text, (4, 12 + 11 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.35, 230, 1)
        printed.append(image)
    assert len(set(duplicate_groups(printed))) == COUNT


def test_a_large_family_is_one_group(heads):
    generator = np.random.default_rng(0)
    crops = []
    for _ in range(30):
        top, left = generator.integers(0, 16, 2)
        crops.append(jpeg(np.rot90(heads[0][top : top + 144, left : left + 144], generator.integers(4)).copy(), 60))
    groups = duplicate_groups(heads + crops)
    assert set(groups[COUNT:]) == {groups[0]} and len(set(groups)) == COUNT


def test_images_without_detail_are_twins_only_when_equal(heads):
    blank = np.zeros((50, 50), "uint8")
    groups = duplicate_groups([blank, heads[0], blank.copy(), blank + 1, np.zeros((50, 49), "uint8"), heads[1]])
    assert groups.tolist() == [0, 1, 0, 2, 3, 4]
    assert duplicate_groups([blank, blank]).tolist() == [0, 0]
    assert duplicate_groups([heads[0]]).tolist() == [0]


def test_mirrored_keypoints_are_those_of_the_mirrored_image(heads):
    mirrored, computed = find_keypoints(heads[0]).mirrored(), find_keypoints(heads[0][:, ::-1].copy())
    likeness = (mirrored.unit() @ computed.unit().T).max(1)
    assert np.median(likeness) > 0.98


@pytest.mark.parametrize("kind", ["cropped", "larger", "mirrored"])
def test_two_images_are_enough(heads, kind):
    assert duplicate_groups([heads[0], TWINS[kind](heads[0])]).tolist() == [0, 0]
    assert len(set(duplicate_groups([heads[0], heads[1]]).tolist())) == 2


def test_stored_details_are_those_that_were_stored(heads):
    found = [find_keypoints(image) for image in [heads[0], np.zeros((50, 50), "uint8"), *heads[1:4]]]
    stored = StoredKeypoints()
    for details in found[:3]:
        stored.append(details)
    assert len(stored[0].positions)  # reading in between moves the place in the file
    for details in found[3:]:
        stored.append(details)
    assert len(stored) == 5 and len(stored[1].positions) == 0
    for one, other in zip([*stored, *stored.subset([4, 0])], [*found, found[4], found[0]]):
        for name in ("positions", "turns", "descriptors"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def from_a_table(plain, mirrored, neighbors):
    "The candidates as a table of all pairs gives them."
    pairs = set()
    for others, in_mirror in ((plain, 0), (mirrored, 1)):
        table = (plain @ others.T).toarray()
        np.fill_diagonal(table, 0)
        for i, row in enumerate(table):
            pairs.update((min(i, j), max(i, j), in_mirror) for j in np.argsort(-row)[:neighbors].tolist() if row[j] > 0)
    return sorted(pairs)


@pytest.mark.parametrize("block", [7, 16, 1024])
def test_candidates_do_not_depend_on_blocks(heads, block):
    index = index_words([find_keypoints(image) for image in heads])
    pairs = candidate_pairs(*index, block=block)
    assert list(map(tuple, pairs.tolist())) == from_a_table(*index, 6)
    some = np.arange(0, COUNT, 3)
    among = candidate_pairs(*index, among=some, block=block)
    assert list(map(tuple, np.searchsorted(some, among[:, :2]).tolist())) == [pair[:2] for pair in from_a_table(*(words[some] for words in index), 6)]


def test_no_table_of_all_pairs_is_made(heads):
    import tracemalloc
    from scipy.sparse import random_array

    words = random_array((6000, 500), density=0.02, format="csr", dtype="float32", random_state=0)
    tracemalloc.start()
    candidate_pairs(words, words, block=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6 < 4 * 6000**2


def test_words_wait_in_files():
    import tracemalloc

    rows = ((np.arange(row % 5, 1000, 5), np.full(200, 1 + row % 3)) for row in range(20_000))
    tracemalloc.start()
    table = stored_table(rows, width=1000)
    seen = images_with(table)
    weigh(table, np.ones(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6 < 8 * 200 * 20_000
    np.testing.assert_array_equal(seen, 4000)
    np.testing.assert_allclose(table[[0, 1023, 1024, 19_999]].toarray().max(axis=1), 200**-0.5, rtol=1e-6)


def test_images_without_details_share_no_words():
    table = stored_table([(np.array([], int), np.array([], int)), (np.array([2]), np.array([4])), (np.array([], int), np.array([], int))], width=3)
    np.testing.assert_allclose(weigh(table, np.full(3, 0.5)).toarray(), [[0, 0, 0], [0, 0, 1], [0, 0, 0]])
    assert weigh(stored_table([(np.array([], int), np.array([], int))], width=3), np.ones(3)).nnz == 0


def test_memory_does_not_grow_with_the_details(heads):
    import tracemalloc

    peaks = {}
    for count in (COUNT, 10 * COUNT):
        images = [(heads[i % COUNT] * (1 - 0.02 * (i // COUNT))).astype("uint8") for i in range(count)]
        tracemalloc.start()
        duplicate_groups(images)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[10 * COUNT] - peaks[COUNT] < 9 * COUNT * 25_000  # it was 70,000 bytes per image when all details were kept


def test_turns_keep_the_order():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        assert list(in_turns(pool, abs, range(-10, 11), turn=4)) == [abs(i) for i in range(-10, 11)]
        assert twin_pairs([np.zeros((20, 20), "uint8")], [find_keypoints(np.zeros((20, 20), "uint8"))], pool) == []


def test_links_reach_through_others():
    assert linked(6, [(0, 3), (3, 5)]).tolist() == [0, 1, 2, 0, 3, 0]
    assert linked(3, []).tolist() == [0, 1, 2]


def test_known_groups_are_kept_and_joined_with_found_ones(heads):
    images = [heads[0], heads[1], heads[2], heads[0][:, ::-1].copy(), heads[4]]
    image_set = ImageSet(images, [0, 1, 0, 0, 1], list("abcde"), groups=[7, 8, 7, 9, 10])
    groups = with_groups(image_set).groups
    assert groups[0] == groups[2] == groups[3] and len(set(groups)) == 3
    assert image_set.groups.tolist() == [7, 8, 7, 9, 10]


def test_the_contact_sheet_shows_twins_only(heads):
    image_set = ImageSet(heads[:5], [0] * 5, [f"yes/{i}.png" for i in range(5)], groups=[0, 0, 1, 2, 2])
    figure = group_sheet(image_set)
    assert sum(bool(axis.get_title()) for axis in figure.axes) == 4
    assert group_sheet(image_set.subset([0, 2])) is None


@needs_real
def test_groups_of_the_real_images():
    image_set = with_groups(load_folder(REAL))
    sizes = np.bincount(image_set.groups)
    assert (len(sizes), (sizes > 1).sum(), sizes[sizes > 1].sum()) == (199, 38, 92)
    assert all(len(set(image_set.labels[image_set.groups == group])) == 1 for group in range(len(sizes)))
    assert len(set(image_set.groups[image_set.labels == 1])) == 123
