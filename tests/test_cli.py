"The command as a process: what users see, with good files and with bad ones."
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def test_help_is_quick_and_loads_nothing_heavy(run_cli):
    import subprocess
    import sys
    run_cli("--help")
    program = ("import sys, brain_vit.cli; print(sorted({'keras', 'tensorflow', 'jax', 'sklearn', 'matplotlib', 'cv2', 'scipy'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["audit", "phantom", "train", "pretrain", "evaluate", "predict", "heatmap"])
def test_every_command_has_help_with_an_example(command):
    from typer.testing import CliRunner
    from brain_vit.cli import app
    text = CliRunner().invoke(app, [command, "--help"]).output
    assert f"Example: brain_vit {command}" in text


def test_predict_does_the_good_files_and_names_the_bad_ones(run_cli, slices):
    bad = [slices / "bad" / name for name in ("text.jpg", "empty.png", "truncated.jpg", "nothing", "missing.jpg")]
    done = run_cli("predict", bad[0], slices / "good", *bad[1:], "--json", code=2)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 5
    assert {tuple(row) for row in rows} == {("path", "probability", "label", "threshold", "model")}
    assert all(0 <= row["probability"] <= 1 and (row["label"] == "tumor") == (row["probability"] >= row["threshold"]) for row in rows)
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 5
    for path in bad:
        assert sum(str(path) in line for line in errors) == 1, path


def test_heatmap_writes_the_original_beside_the_overlay(run_cli, slices, tmp_path):
    out = tmp_path / "overlays"
    done = run_cli("heatmap", slices / "good", slices / "bad" / "text.jpg", "--out", out, "--npy", code=2)
    assert len(done.stdout.splitlines()) == 5
    assert sorted(path.name for path in out.iterdir() if path.suffix == ".png") == sorted(
        f"{name}.overlay.png" for name in ("png named", "with alpha", "palette", "WIDE", "plain"))
    heat = np.load(out / "WIDE.npy")
    assert heat.shape == (45, 64) and heat.dtype == np.float32 and 0 <= heat.min() and heat.max() <= 1
    picture = np.asarray(Image.open(out / "plain.overlay.png"))
    original = np.asarray(Image.open(slices / "good" / "plain.jpeg").convert("L"))
    assert np.array_equal(picture[-200:, :200, 0], original)


def test_two_images_of_one_name_do_not_overwrite_each_other(run_cli, slices, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.png").write_bytes((slices / "good" / "with alpha.png").read_bytes())
    run_cli("heatmap", tmp_path / "a" / "same.png", tmp_path / "b" / "same.png", "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("arguments, words", [
    (["predict", "x.jpg", "--model", "no/run"], "no/run"),
    (["train", "no_such_folder"], "no_such_folder"),
    (["audit", "no_such_folder"], "no_such_folder"),
    (["evaluate", "no_such_folder"], "no_such_folder"),
    (["heatmap", "x.jpg", "--out", "o", "--method", "magic"], "magic"),
    (["phantom", "o", "--recipe", "hard"], "hard"),
    (["evaluate", "phantom", "--jobs", "0"], "--jobs 0"),
    (["train", "phantom", "--out", "."], "'.' exists"),
    (["pretrain", "--out", "/"], "'/' exists"),
    (["evaluate", "phantom", "--out", "."], "'.' exists"),
])
def test_bad_requests_give_one_sentence(arguments, words, monkeypatch, capsys, tmp_path):
    from brain_vit.cli import main
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_full_disk_and_a_name_too_long_are_the_users_to_mend():
    import errno
    from brain_vit.cli import _sentence
    for number, file, words in ((errno.ENOSPC, None, "make room"), (errno.EROFS, "/mnt/out", "'/mnt/out'"), (errno.ENAMETOOLONG, "x" * 300, "xxx")):
        sentence, code = _sentence(OSError(number, os.strerror(number), file))
        assert code == 2 and words in sentence and os.strerror(number) in sentence
    assert _sentence(OSError(errno.EIO, "Input/output error"))[1] == 1


def test_pictures_of_images_with_long_or_like_names_are_all_written():
    from brain_vit.cli import free_name
    from brain_vit.run import _picture_names
    deep = "/".join(f"{part}" * 60 for part in "abcd") + "/1.png"
    names = _picture_names([deep, deep.replace("a", "e"), "yes/a_b.png", "yes/a/b.png", "no/c.png"])
    assert len(set(names)) == 5 and max(len(name.encode()) for name in names) < 200 and names[-1] == "no_c.png"
    taken = set()
    long = [free_name(Path("folder") / f"{'脳' * 83}{number}.png", taken) for number in (1, 2)] + [free_name(Path("other") / f"{'脳' * 83}1.png", taken)]
    assert len(set(long)) == 3 and all(len(name.encode()) < 200 for name in long)


def test_a_folder_that_cannot_be_opened_does_not_stop_the_walk(tmp_path, close_folders):
    from brain_vit.predict import Failure, find_images
    for name in ("a/1.png", "b/2.png", "c/3.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    close_folders("b")
    first, closed, last = find_images([tmp_path])
    assert (first.name, last.name) == ("1.png", "3.png") and isinstance(closed, Failure)
    assert closed.path == str(tmp_path / "b") and "Permission denied" in closed.error


def test_a_link_to_nowhere_is_in_the_way_too(tmp_path):
    from brain_vit._base import InputError, refuse_existing
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists already"):
        refuse_existing(tmp_path / "out")


def test_failures_carry_the_path_that_was_given():
    from brain_vit.predict import find_images
    assert [failure.path for failure in find_images(["/nowhere/1.png"])] == ["/nowhere/1.png"]


def test_phantom_writes_images_masks_and_labels(run_cli, tmp_path):
    out = tmp_path / "phantoms"
    run_cli("phantom", out, "--count", 12, "--seed", 3)
    labels = (out / "labels.csv").read_text().splitlines()
    assert len(labels) == 13
    from brain_vit.data import load_folder
    image_set = load_folder(out)
    assert len(image_set) == 12 and image_set.labels.sum() == len(list((out / "masks").iterdir()))
    for label, mask in zip(image_set.labels, image_set.masks):
        assert mask.any() == bool(label)
    run_cli("phantom", out, "--count", 12, code=2)


def test_real_images_of_every_kind(run_cli, real_folder, tmp_path):
    "PNG named .jpg, RGBA, palette, names with spaces: one line and one overlay each."
    kinds = {}
    for path in sorted(real_folder.rglob("*")):
        if path.is_file():
            with Image.open(path) as image:
                kinds.setdefault((image.format, path.suffix, image.mode), path)
                if " " in path.name:
                    kinds["space"] = path
    chosen = sorted(set(kinds.values()))
    done = run_cli("heatmap", *chosen, "--out", tmp_path / "out", "--npy")
    assert len(done.stdout.splitlines()) == len(chosen) == len(list((tmp_path / "out").glob("*.overlay.png")))
    for path in chosen:
        with Image.open(path) as image:
            name = next(p for p in (tmp_path / "out").glob("*.npy") if p.stem.endswith(path.stem))
            assert np.load(name).shape == (image.height, image.width)


@pytest.fixture
def phantoms(run_cli, tmp_path):
    "A folder with `yes`, `no` and `masks`, and one broken file in `yes`."
    run_cli("phantom", tmp_path / "phantoms", "--count", 8, "--recipe", "easy")
    (tmp_path / "phantoms" / "yes" / "broken.png").write_text("I am a text")
    return tmp_path / "phantoms"


def test_masks_are_not_taken_for_images(run_cli, phantoms, tmp_path):
    (phantoms / "yes" / "broken.png").unlink()
    rows = [json.loads(line) for line in run_cli("predict", phantoms, "--json").stdout.splitlines()]
    assert len(rows) == 8 and not any("/masks/" in row["path"] for row in rows)
    run_cli("heatmap", phantoms, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 8
    named = len(list((phantoms / "masks").iterdir()))
    assert named == len(run_cli("predict", phantoms / "masks").stdout.splitlines())  # who names the folder means it
    (tmp_path / "other" / "masks").mkdir(parents=True)
    (phantoms / "masks").rename(tmp_path / "other" / "masks" / "deep")
    assert len(run_cli("predict", tmp_path / "other").stdout.splitlines()) == named  # no `yes` beside it: an ordinary folder


def test_heatmaps_are_scored_and_what_fails_is_named(run_cli, phantoms, tmp_path):
    lesions = len(list((phantoms / "masks").iterdir()))
    done = run_cli("heatmap", phantoms, "--masks", phantoms / "masks", "--json", code=2)
    scores = json.loads(done.stdout)
    assert scores["n"] == lesions and len(scores["skipped"]) == 8 - lesions and [row["path"] for row in scores["failed"]] == [str(phantoms / "yes" / "broken.png")]
    assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == [f"Error: {scores['failed'][0]['error']}"]
    for group, n in (("all", lesions), ("detected", scores["n_detected"])):
        assert list(scores[group]) == ["lesion_shifted", "attention", "random"]
        for method, row in scores[group].items():
            assert {name: cell["n"] for name, cell in row.items()} == dict.fromkeys(("pointing", "energy", "precision", "deletion", "insertion"), n)
            assert sum(cell["n"] for cell in scores["hit_rates"][group][method]["size"]) == n
    assert scores["all"]["lesion_shifted"]["pointing"]["value"] > scores["all"]["random"]["pointing"]["value"]
    drawn = run_cli("heatmap", phantoms, "--masks", phantoms / "masks", "--out", tmp_path / "out", code=2)
    text = drawn.stdout
    assert drawn.stderr.count("Error: ") == 1  # scoring told it, drawing need not
    for words in (f"{lesions} images with masks", f"{8 - lesions} without a mask skipped", "1 could not be used", "all images with masks", "detected images with masks", "by contrast"):
        assert words in text
    assert len(list((tmp_path / "out").iterdir())) == 8  # the pictures are drawn all the same
