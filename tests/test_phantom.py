import csv
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from brain_vit.phantom import LEVELS, Phantom, draw_view, phantom_dataset, phantom_stream, write_phantoms
from brain_vit.lesion import LESIONS
from brain_vit.realism import border_statistics, probe
from brain_vit.review import describe_border, describe_file, metadata_columns, shortcut_probe

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


def test_slices_stay_what_they_are():
    "Pretrained weights and published figures refer to slices by seed and index, so no draw may move or be added."
    known = [("midline", "PD", "dural"), ("horns", "T1", "none"), ("ganglia", "FLAIR", "infiltrative"), ("bodies", "FLAIR", "none"), ("bodies", "T2", "none"),
             ("lateral", "random", "infiltrative"), ("crus", "T1", "none"), ("fossa", "FLAIR", "none"), ("semiovale", "T1c", "solid"), ("ganglia", "T2", "none")]
    items = [Phantom.full().render(5, index) for index in range(10)]
    assert [(item.info["level"], item.info["sequence"], item.info["kind"]) for item in items] == known
    np.testing.assert_allclose([item.image.mean() for item in items], [80.2, 83.2, 45.6, 153.8, 47.3, 76.1, 49.6, 54.1, 56.4, 90.1], atol=0.5)
    np.testing.assert_allclose([item.info["area"] for item in items], [75, 0, 206, 0, 0, 134, 0, 0, 1874, 0], atol=5)


CHANGES = dict(atrophy_power=0.1, asymmetry=0.5, blend_share=(0.9, 0.9), fat_left=(0.9, 0.95), bottom=(68.0, 69.0), mirror=0.0, variation=(0.3, 0.4),
               least_radius=9.0, coarseness=(4.0, 5.0), ghost_shift=(0.4, 0.5), ghost_strength=(0.4, 0.5), casing_gray=(0.1, 0.2), print_gray=(10.0, 20.0))
CHANCES = dict(blend_share="blend", fat_left="fat_saturation", coarseness="coarse", ghost_shift="ghost", ghost_strength="ghost", casing_gray="casing",
               print_gray="letters")


@pytest.mark.parametrize("field", CHANGES)
def test_every_range_is_a_field_that_matters(field):
    always = dict(blend=1.0, fat_saturation=1.0, coarse=1.0, ghost=1.0, casing=1.0, letters=1.0, frame=0.0, arrow=0.0, small=1.0, lesion_probability=1.0)
    change = {field: CHANGES[field]}
    differ = [not same(Phantom.full(**options).render(21, index), Phantom.full(**options, **change).render(21, index))
              for options in (always, always | {CHANCES.get(field, "frame"): 0.0}) for index in range(8)]
    assert any(differ[:8]) and any(differ[8:]) == (field not in CHANCES)


def test_mirrored_views_look_at_the_other_side():
    labels = np.ones((128, 128), np.uint8)
    (left, _), (right, _) = (draw_view(Phantom(mirror=chance), np.random.default_rng(0), labels) for chance in (0.0, 1.0))
    assert (left == -right).all() and left.any()


def test_the_kind_is_the_one_that_was_painted():
    recipe = dict(kinds=(("ring", 1.0),), small=1.0, lesion_probability=1.0)
    planned = [Phantom.full(**recipe, least_pixels=1).render(22, index) for index in range(20)]
    too_small = [Phantom.full(**recipe, least_pixels=400).render(22, index) for index in range(20)]
    assert {item.info["kind"] for item in planned} == {"ring"} and max(item.mask.sum() for item in planned) < 400
    assert {item.info["kind"] for item in too_small} == {"solid"} and min(item.mask.sum() for item in too_small) >= 400


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
    dispatched = " ".join(np._core._multiarray_umath.__cpu_dispatch__)
    assert digest(NPY_DISABLE_CPU_FEATURES=dispatched, OPENBLAS_CORETYPE="Nehalem") == here or platform.machine() != "x86_64"


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
    areas = np.array([recipe.render(7, index).info["share"] for index in range(250)])
    assert np.quantile(areas, 0.05) < 0.004 and np.quantile(areas, 0.98) > 0.08 and areas.max() < 0.5
    assert 0.008 < np.median(areas) < 0.06


def test_easy_lesions_are_clear():
    items = [Phantom.easy(lesion_probability=1.0).render(8, index) for index in range(60)]
    assert np.median([item.info["share"] for item in items]) > 0.015
    assert np.mean([abs(item.info["contrast"]) > 0.1 for item in items]) > 0.7


def test_borders_do_not_tell_the_class():
    recipe, count = Phantom.full(image_size=32), 600
    items = [recipe.render(9, index) for index in range(count)]
    labels = np.array([item.label for item in items])
    scores = probe(np.array([border_statistics(item.image) for item in items]), labels)
    chance = max(labels.mean(), 1 - labels.mean())
    assert all(abs(score - 0.5) < 3.5 * 0.5 / count**0.5 or score <= chance for score in scores.values()), scores


def test_metadata_of_files_do_not_tell_the_class(tmp_path):
    count = 4000
    write_phantoms(tmp_path / "set", count, seed=2024)
    files = sorted((tmp_path / "set").glob("[yn]*/*.png"), key=lambda path: path.name)
    labels = np.array([path.parent.name == "yes" for path in files], int)
    columns = metadata_columns([describe_file(path) | describe_border(np.array(Image.open(path))) for path in files])
    assert set(columns) == {"width", "height", "bytes", "format", "mode", "exif", "border mean", "border spread"} and len(files) == count
    assert 0.47 < shortcut_probe(columns, labels, np.arange(count))["accuracy"] < 0.53
    leak = {"border mean": columns["border mean"] + 20 * labels}
    assert shortcut_probe(leak, labels, np.arange(count))["accuracy"] > 0.53


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


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_of_lesion_fractions(workers):
    recipe = Phantom.full(image_size=48, lesion_probability=0.8)
    masks = next(phantom_stream(recipe, seed=2, batch_size=6, workers=0))[2]
    stream = phantom_stream(recipe, seed=2, batch_size=6, workers=workers, ahead=1, patch_size=8)
    images, labels, fractions = next(stream)
    stream.close()
    by_hand = [[mask[row:row + 8, column:column + 8].mean() for row in range(0, 48, 8) for column in range(0, 48, 8)] for mask in masks]
    assert fractions.shape == (6, 36) and fractions.dtype == np.float32 and (fractions.any(1) == labels).all() and labels.any()
    np.testing.assert_allclose(fractions, by_hand, atol=1e-6)


def test_patches_must_fill_the_picture():
    with pytest.raises(ValueError, match="48.*Received: patch_size=7"):
        next(phantom_stream(Phantom.full(image_size=48), workers=0, patch_size=7))


def test_the_table_agrees_with_masks_and_images(tmp_path):
    recipe = Phantom.full(image_size=64)
    folder = write_phantoms(tmp_path / "set", 40, seed=23, recipe=recipe)
    rows = list(csv.DictReader((folder / "labels.csv").open()))
    assert len(rows) == 40 and {row["label"] for row in rows} == {"0", "1"}
    for index, row in enumerate(rows):
        item, image = recipe.render(23, index), np.array(Image.open(folder / row["path"]))
        assert (image == item.image).all() and row["path"].startswith(("no", "yes")[int(row["label"])])
        assert [row[key] for key in ("plane", "level", "sequence", "kind")] == [item.info[key] for key in ("plane", "level", "sequence", "kind")]
        mask_file = folder / "masks" / Path(row["path"]).name
        if row["label"] == "0":
            assert (row["center_row"], row["center_column"], row["area"], row["contrast"]) == ("", "", "0", "") and not mask_file.exists()
            continue
        mask = np.array(Image.open(mask_file)) > 0
        places = np.argwhere(mask)
        center = np.array([float(row["center_row"]), float(row["center_column"])])
        assert int(row["area"]) == mask.sum() and 0 < float(row["share"]) < 1
        assert (places.min(0) <= center).all() and (center <= places.max(0)).all()
        np.testing.assert_allclose(center, places.mean(0), atol=0.051)
        around = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool) & ~mask
        assert -1 <= float(row["contrast"]) <= 1 and abs(float(row["contrast"]) - (image[mask].mean() - image[around].mean()) / 255) < 0.3


def test_the_benchmark_keeps_speed_and_memory_in_one_file(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("phantom_benchmark", Path(__file__).parent.parent / "benchmarks" / "phantom.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "PATH", tmp_path / "phantom.json")
    monkeypatch.setattr(benchmark, "rate", lambda size, workers, seconds: {
        "image_size": size, "workers": max(1, workers), "images_per_second": 1.0, "ms_per_image": 1.0, "cpu_ms_per_image": None})
    for options in (["--json"], ["--stream", "200", "--json"], ["--json"], []):
        monkeypatch.setattr(sys, "argv", ["phantom.py", *options])
        benchmark.main()
    found = json.loads((tmp_path / "phantom.json").read_text())
    assert set(found) == {"cpus", "load_before", "rows", "stream"} and len(found["rows"]) == 4
    assert [row["images"] for row in found["stream"]] == list(range(20, 201, 20)) and all(row["megabytes"] > 1 for row in found["stream"])


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
