import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from brain_vit.phantom import LEVELS, Phantom, phantom_dataset, phantom_stream
from brain_vit.lesion import LESIONS
from brain_vit.realism import border_statistics, probe

DIGEST = """
import hashlib
from brain_vit.phantom import Phantom
for index in range(24):
    item = Phantom.full(image_size=64).render(17, index)
    print(hashlib.sha1(item.image.tobytes() + item.mask.tobytes()).hexdigest(), item.label)
"""


def same(a, b):
    return (a.image == b.image).all() and (a.mask == b.mask).all() and a.label == b.label and a.info == b.info


def digest(**environment):
    done = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, env=os.environ | environment, check=True)
    return done.stdout


@pytest.mark.parametrize("recipe", [Phantom.full(), Phantom.easy(), Phantom.full(image_size=65), Phantom.full(image_size=32)])
def test_label_mask_and_info_agree(recipe):
    for index in range(60):
        item = recipe.render(1, index)
        assert item.image.shape == item.mask.shape == (recipe.image_size,) * 2
        assert item.image.dtype == np.uint8 and item.mask.dtype == bool
        assert item.label == item.mask.any() == (item.info["kind"] != "none") == (item.info["center"] is not None)
        assert not item.label or item.mask.sum() >= recipe.least_pixels
        assert item.image.std() > 3


def test_slices_do_not_depend_on_each_other():
    recipe = Phantom.full(image_size=64)
    forward = [recipe.render(3, index) for index in range(12)]
    backward = [recipe.render(3, index) for index in reversed(range(12))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward))
    assert len({item.image.tobytes() for item in forward}) == 12
    assert not same(recipe.render(4, 0), forward[0])
    assert same(Phantom.full(image_size=64).render(3, 10**9), recipe.render(3, 10**9))


def test_same_slices_in_another_process_and_with_other_instruction_sets():
    here = digest()
    assert digest(PYTHONHASHSEED="1", OMP_NUM_THREADS="1") == here
    assert digest(OPENCV_CPU_DISABLE="AVX2,AVX512-SKX,FP16,FMA3") == here or sys.platform != "linux"


@pytest.mark.skipif(not cv2.ipp.useIPP(), reason="this OpenCV has no IPP")
def test_slices_do_not_depend_on_ipp_and_leave_it_as_it_was():
    recipe, threads = Phantom.full(), cv2.getNumThreads()
    with_ipp = [recipe.render(2, index) for index in range(40)]
    assert cv2.ipp.useIPP()
    try:
        cv2.ipp.setUseIPP(False)
        cv2.setNumThreads(1)
        assert all(same(recipe.render(2, index), item) for index, item in enumerate(with_ipp))
        assert not cv2.ipp.useIPP()
    finally:
        cv2.ipp.setUseIPP(True)
        cv2.setNumThreads(threads)


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_every_level_renders_with_and_without(level):
    recipe = Phantom.full(image_size=64, levels=((level, 1.0),), ghost=0.0, letters=0.0)
    for index in range(8):
        ill, well = recipe.render(5, index, lesion=True), recipe.render(5, index, lesion=False)
        assert ill.label == 1 and well.label == 0 and not well.mask.any()
        keys = ("plane", "level", "sequence")
        assert [ill.info[key] for key in keys] == [well.info[key] for key in keys]
        assert same(recipe.render(5, index), ill if recipe.render(5, index).label else well)


@pytest.mark.parametrize("kind", sorted(LESIONS))
def test_every_kind_changes_the_picture_where_the_mask_is(kind):
    recipe = Phantom.full(kinds=((kind, 1.0), ("solid", 1e-9)), levels=(("midline", 1.0), ("fossa", 1.0), ("ganglia", 1.0)), small=0.0, coarse=0.0)
    changes = []
    for index in range(10):
        ill, well = recipe.render(6, index, lesion=True), recipe.render(6, index, lesion=False)
        difference = np.abs(ill.image.astype(float) - well.image)
        if ill.info["kind"] == kind:
            changes.append(difference[ill.mask].mean() - difference[~ill.mask].mean())
    assert changes and np.median(changes) > 8


def test_lesion_sizes_span_from_small_to_a_third_of_the_brain():
    recipe = Phantom.full(lesion_probability=1.0)
    areas = np.array([recipe.render(7, index).info["area"] for index in range(250)])
    assert np.quantile(areas, 0.05) < 0.004 and np.quantile(areas, 0.98) > 0.08 and areas.max() < 0.5
    assert 0.008 < np.median(areas) < 0.06


def test_easy_lesions_are_clear():
    items = [Phantom.easy(lesion_probability=1.0).render(8, index) for index in range(60)]
    assert np.median([item.info["area"] for item in items]) > 0.015
    assert np.mean([abs(item.info["contrast"]) > 0.1 for item in items]) > 0.7


def test_borders_do_not_tell_the_class():
    recipe, count = Phantom.full(image_size=32), 600
    items = [recipe.render(9, index) for index in range(count)]
    labels = np.array([item.label for item in items])
    scores = probe(np.array([border_statistics(item.image) for item in items]), labels)
    chance = max(labels.mean(), 1 - labels.mean())
    assert all(abs(score - 0.5) < 3.5 * 0.5 / count**0.5 or score <= chance for score in scores.values()), scores


def test_probe_finds_a_planted_leak():
    recipe = Phantom.full(image_size=48)
    items = [recipe.render(10, index) for index in range(200)]
    labels = np.array([item.label for item in items])
    features = np.array([border_statistics(item.image) for item in items])
    features[:, 0] += 20 * labels
    assert probe(features, labels)["forest"] > 0.65


def test_stream_is_the_same_with_any_number_of_workers_and_resumes():
    recipe = Phantom.full(image_size=48)
    batches = []
    for workers in (0, 1, 2):
        stream = phantom_stream(recipe, seed=2, batch_size=6, workers=workers, ahead=3)
        batches.append([next(stream) for _ in range(4)])
        stream.close()
    for other in batches[1:]:
        assert all((a == b).all() for one, two in zip(batches[0], other) for a, b in zip(one, two))
    stream = phantom_stream(recipe, seed=2, batch_size=6, start=12, workers=0)
    assert all((a == b).all() for a, b in zip(next(stream), batches[0][2]))
    images, labels, masks = batches[0][0]
    assert images.shape == masks.shape == (6, 48, 48) and images.dtype == np.uint8 and (masks.any((1, 2)) == labels).all()


def test_dataset_matches_the_stream():
    recipe = Phantom.easy(image_size=48)
    data = phantom_dataset(6, seed=2, recipe=recipe, start=3)
    images, labels, masks = next(phantom_stream(recipe, seed=2, batch_size=6, start=3, workers=0))
    assert (np.stack(data.images) == images).all() and (data.labels == labels).all() and (np.stack(data.masks) == masks).all()
    assert len(set(data.groups)) == 6 and len(set(data.paths)) == 6
    assert all(path.split("/")[1] == ("no", "yes")[label] for path, label in zip(data.paths, data.labels))


def test_memory_stays_flat():
    resource = pytest.importorskip("resource")
    stream = phantom_stream(Phantom.full(image_size=32), batch_size=30, workers=0)
    peak = []
    for _ in range(2):
        for _ in range(8):
            next(stream)
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peak[1] - peak[0] < 8 * 1024


@pytest.mark.parametrize("change", [dict(image_size=8), dict(levels=(("neck", 1.0),)), dict(sequences=(("T3", 1.0),)), dict(kinds=(("mole", 1.0),)),
    dict(lesion_probability=1.5)])
def test_bad_recipes_are_refused(change):
    with pytest.raises(ValueError, match="Received"):
        Phantom.full(**change)
