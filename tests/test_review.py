"""The audit finds what was planted."""
import json
import os
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from brain_vit._base import InputError
from brain_vit.data import ImageSet
from brain_vit.phantom import Phantom, phantom_dataset
from brain_vit.review import (StoredFacts, audit, audit_figures, audit_table, count_letters, has_frame, head_depth, shortcut_probe, tissue_grays,
                              write_audit)

REAL = os.environ.get("BRAIN_VIT_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="BRAIN_VIT_DATA does not name the folder of real images")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "16 phantoms; planted: a PNG named .jpg, an RGBA image, EXIF in two of yes, a byte copy across labels, a mirrored twin, a broken file."
    folder = tmp_path_factory.mktemp("audit") / "planted"
    recipe = Phantom.full(image_size=128)
    for index in range(16):
        place = folder / ("yes" if index % 2 else "no") / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(recipe.render(33, index).image).save(place)
    exif = Image.Exif()
    exif[0x010F] = "camera"
    Image.open(folder / "yes" / "1.png").save(folder / "yes" / "1.png", exif=exif)
    Image.open(folder / "yes" / "3.png").save(folder / "yes" / "3.jpg", format="JPEG", exif=exif)
    (folder / "yes" / "3.png").unlink()
    (folder / "yes" / "5.png").rename(folder / "yes" / "5.jpg")
    Image.open(folder / "yes" / "7.png").convert("RGBA").save(folder / "yes" / "7.png")
    (folder / "no" / "copy.png").write_bytes((folder / "yes" / "9.png").read_bytes())
    Image.open(folder / "no" / "0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "no" / "mirror.png")
    (folder / "no" / "broken.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return audit(folder)


def test_the_audit_finds_what_was_planted(report):
    assert report["images"] == 18 and report["classes"] == {"yes": 8, "no": 10}
    assert [path for path, _ in report["skipped"]] == ["no/broken.jpg"]
    assert report["wrong_suffix"] == ["yes/5.jpg"] and report["modes"]["RGBA"] == 1
    assert report["exif"] == {"images": 2, "yes": 2, "no": 0}
    assert report["distinct_contents"] == 17 and report["distinct_pictures"]["all"] == 16
    assert sorted(map(sorted, report["duplicate_groups"])) == [["no/0.png", "no/mirror.png"], ["no/copy.png", "yes/9.png"]]
    assert [sorted(paths) for paths in report["label_conflicts"]] == [["no/copy.png", "yes/9.png"]]
    assert all(sum(counts.values()) == 18 for counts in report["grays"].values())


def test_the_report_is_json_and_readable(report):
    assert json.loads(json.dumps(report, default=lambda value: value.tolist())) is not None
    table = audit_table(report)
    for word in ("18 (8 yes, 10 no)", "no/broken.jpg", "yes/5.jpg", "no/copy.png = yes/9.png"):
        assert word in table


def test_the_folder_of_an_audit(folder, report, tmp_path):
    out = write_audit(report, folder, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"audit.json", "audit.txt", "twins_1.png", "examples.png", "grays.png"}
    assert json.loads((out / "audit.json").read_text())["images"] == 18
    with pytest.raises(InputError, match="exists"):
        write_audit(report, folder, tmp_path / "out")


def test_no_class_hides_the_other_in_the_plot_of_sizes(report):
    image_set = ImageSet([np.zeros((128, 128), "uint8")] * 6, [0, 1] * 3, [str(i) for i in range(6)])
    axis = audit_figures(report | {"duplicate_groups": []}, image_set)["grays"].axes[1]
    yes, no = axis.collections
    assert not len(yes.get_facecolor()) and not len(no.get_facecolor()) and yes.get_sizes()[0] != no.get_sizes()[0]
    assert (yes.get_offsets() == no.get_offsets()).all()
    for ticks in (axis.get_xticks(), axis.get_yticks()):
        assert len(ticks) <= 6 and all(tick == round(tick) for tick in ticks)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["yes", "no"]


def test_too_few_images_are_audited_without_a_probe(folder, tmp_path):
    for name in ("yes", "no"):
        (tmp_path / name).mkdir()
        for file in sorted((folder / name).glob("*.png"))[:2]:
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    report = audit(tmp_path)
    assert isinstance(report["shortcuts"], str) and "not measured" in audit_table(report)


def test_the_probe_sees_a_planted_shortcut_and_nothing_in_noise():
    generator = np.random.default_rng(0)
    labels, groups = generator.integers(0, 2, 200), np.arange(200) // 2
    labels = labels[groups]
    noise = shortcut_probe({"noise": generator.random(200)}, labels, groups)
    planted = shortcut_probe({"noise": generator.random(200), "format": np.where(labels, "JPEG", "PNG")}, labels, groups)
    assert planted["accuracy"] > 0.95 and planted["low"] > planted["most_frequent_class"]
    assert noise["low"] < 0.5 < noise["high"] and noise["n"] == 200 and noise["groups"] == 100


def test_the_probe_does_not_profit_from_twins():
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 4)
    labels, fingerprint = generator.integers(0, 2, 60)[groups], generator.random(60)[groups]
    careless = shortcut_probe({"size": fingerprint}, labels, np.arange(240))
    grouped = shortcut_probe({"size": fingerprint}, labels, groups)
    assert careless["accuracy"] > 0.9 and grouped["accuracy"] < 0.7
    assert grouped["high"] - grouped["low"] > careless["high"] - careless["low"]


def test_the_same_seed_gives_the_same_report(folder, report):
    assert audit(folder) == report


def test_frames_and_letters():
    plain = np.pad(Phantom.easy(image_size=160).render(0, 0).image, 30)
    framed = cv2.rectangle(plain.copy(), (2, 2), (217, 217), 200, 1)
    lettered = cv2.putText(plain.copy(), "SE 2 IM 14", (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 230)
    assert [has_frame(image) for image in (plain, framed, lettered)] == [False, True, False]
    assert count_letters(lettered) >= 4 > count_letters(plain)


def test_grays_follow_what_was_drawn():
    def disc(casing, skull, lobes, center):
        rows, columns = np.mgrid[:128, :128]
        radius = np.hypot(rows - 64, columns - 64)
        return np.select([radius > 58, radius > 48, radius > 20], [casing, skull, lobes], center).astype("uint8")
    assert tissue_grays(disc(0, 255, 128, 0)) == pytest.approx({"casing": 0, "skull": 1, "lobes": 0.5, "central lobes": 0}, abs=0.02)
    assert tissue_grays(disc(255, 0, 128, 128))["casing"] == 1
    assert tissue_grays(disc(0, 255, 128, 128))["central lobes"] is None
    assert head_depth(np.zeros((20, 30), "uint8")).max() == 0


def test_blank_and_tiny_images_are_measured():
    image_set = ImageSet([np.zeros((9, 9), "uint8"), np.full((300, 10), 9, "uint8")] * 6, [0, 1] * 6, [str(i) for i in range(12)])
    assert audit(image_set)["images"] == 12


@needs_real
def test_the_real_images():
    start = time.perf_counter()
    report = audit(REAL)
    assert time.perf_counter() - start < 120
    assert (report["images"], report["distinct_contents"], report["distinct_pictures"]["all"]) == (253, 228, 199)
    assert len(report["duplicate_groups"]) == 38 and report["images_with_twins"] == 92 and report["label_conflicts"] == []
    assert len(report["wrong_suffix"]) == 6 and report["modes"]["RGBA"] == 5 and report["modes"]["P"] == 1
    probe = report["shortcuts"]["all metadata"]
    assert probe["low"] > probe["most_frequent_class"] and 0.70 < probe["accuracy"] < 0.80


def test_facts_wait_in_a_file():
    import tracemalloc

    facts = ({"width": number, "format": "PNG", "gray": {"skull": 0.5, "lobes": None}} for number in range(20_000))
    tracemalloc.start()
    stored = StoredFacts(facts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    assert len(stored) == 20_000 and stored[7] == {"width": 7, "format": "PNG", "gray": {"skull": 0.5, "lobes": None}}
    assert all(one["width"] + 1 == other["width"] for one, other in zip(stored, list(stored)[1:]))  # two readers at once
    with pytest.raises(IndexError):
        stored[20_000]
