"Runs: complete or absent, resumable to the same result, refused when they leak."
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from brain_vit._base import InputError

PROGRAM = """
import sys
from brain_vit.phantom import Phantom, phantom_dataset
from brain_vit.run import train_run
from brain_vit.training import TrainConfig
from brain_vit.vit import ViTConfig
config = ViTConfig(image_size=32, patch_size=8, d_model=16, num_blocks=1, num_heads=2, stem="hierarchical", pool="lesion", dropout=0.2)
phantoms = phantom_dataset(80, seed=0, recipe=Phantom.easy(image_size=48))
train_run(phantoms, sys.argv[1], config, TrainConfig(epochs=int(sys.argv[3])), resume=sys.argv[2] == "resume", progress=False)
"""


def start(out, mode, epochs=8):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(out), mode, str(epochs)], stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = start(out, "new")
    assert process.wait() == 0, process.stderr.read()
    return out


def test_a_finished_run_explains_itself(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.json", "split.csv", "history.csv", "curves.png", "metrics.json", "model.keras", "heatmaps", "README.md"}
    metrics = json.loads((finished / "metrics.json").read_text())
    test = metrics["parts"]["test"]
    rows = (finished / "split.csv").read_text().splitlines()
    assert test["n"] == sum(",test," in row for row in rows) > 0 and metrics["protocol"]
    assert metrics["pointing"]["n"] == test["confusion_matrix"]["true_positives"] + test["confusion_matrix"]["false_negatives"]
    low, high = test["accuracy"]["interval"]
    assert 0 <= low <= test["accuracy"]["value"] <= high <= 1
    assert str(test["n"]) in (finished / "README.md").read_text()
    assert not list(finished.parent.glob(".*"))


def test_a_killed_run_resumes_to_the_same_result(finished):
    out = finished.with_name("killed")
    process = start(out, "new")
    state = out.with_name(".killed.partial") / "state" / "state.json"
    deadline = time.time() + 240
    while not (state.exists() and json.loads(state.read_text())["epoch"] >= 2):
        assert process.poll() is None and time.time() < deadline, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = json.loads(state.read_text())["epoch"]
    assert done < 8, "the run was too quick to be killed"
    process = start(out, "resume")
    assert process.wait() == 0, process.stderr.read()
    assert (out / "history.csv").read_text() == (finished / "history.csv").read_text()
    assert json.loads((out / "metrics.json").read_text()) == json.loads((finished / "metrics.json").read_text())


def test_an_existing_run_is_never_overwritten(finished):
    from brain_vit.run import prepare_folder
    with pytest.raises(InputError, match="exists already"):
        prepare_folder(finished, resume=False)
    with pytest.raises(InputError, match="no unfinished run"):
        prepare_folder(finished.with_name("nothing"), resume=True)


def test_resuming_with_other_settings_is_refused(finished):
    from brain_vit.run import _same_settings
    config = json.loads((finished / "config.json").read_text())
    _same_settings(finished / "config.json", config)
    with pytest.raises(InputError, match="learning_rate"):
        _same_settings(finished / "config.json", config | {"training": config["training"] | {"learning_rate": 1.0}})


def test_a_run_whose_split_leaks_is_refused(finished, tmp_path):
    import shutil
    from brain_vit.predict import Predictor
    assert Predictor.load(finished).name == "whole"
    leaking = shutil.copytree(finished, tmp_path / "leaking")
    rows = (leaking / "split.csv").read_text().splitlines()
    train = next(row.split(",")[2] for row in rows if ",train," in row)
    index, row = next((i, row.split(",")) for i, row in enumerate(rows) if ",test," in row)
    rows[index] = ",".join([*row[:2], train, *row[3:]])
    (leaking / "split.csv").write_text("\n".join(rows) + "\n")
    for path in (leaking, leaking / "model.keras"):
        with pytest.raises(InputError, match="leaks"):
            Predictor.load(path)


def test_equal_images_in_two_parts_are_a_leak_whatever_their_groups(finished, tmp_path):
    import shutil
    from brain_vit._base import read_csv, write_csv
    from brain_vit.phantom import phantom_dataset
    from brain_vit.predict import Predictor
    from brain_vit.run import write_split
    leaking = shutil.copytree(finished, tmp_path / "leaking")
    rows = read_csv(leaking / "split.csv")
    train = next(row for row in rows if row["part"] == "train")
    next(row for row in rows if row["part"] == "test")["digest"] = train["digest"]
    write_csv(leaking / "split.csv", rows)
    with pytest.raises(InputError, match=f"leaks.*digest.*{train['path']}"):
        Predictor.load(leaking)
    pair = phantom_dataset(2, seed=0)
    pair.images[1] = pair.images[0]
    with pytest.raises(InputError, match="leaks"):
        write_split(tmp_path / "split.csv", pair, np.array(["train", "test"]))
    assert not (tmp_path / "split.csv").exists()


def test_figures_are_the_same_whether_images_wait_in_files_or_in_memory(finished, tmp_path, monkeypatch):
    import brain_vit.run
    from brain_vit.phantom import Phantom, phantom_dataset
    from brain_vit.preprocess import preprocess_all
    asked = []

    def in_memory(image_set, image_size, folder=None):
        asked.append(folder)
        return preprocess_all(image_set, image_size)

    monkeypatch.setattr(brain_vit.run, "preprocess_all", in_memory)
    settings = json.loads((finished / "config.json").read_text())
    phantoms = phantom_dataset(80, seed=0, recipe=Phantom.easy(image_size=48))
    run = brain_vit.run.train_run(phantoms, tmp_path / "memory", brain_vit.run.ViTConfig(**settings["model"]),
                                  brain_vit.run.TrainConfig(**settings["training"]), progress=False)
    assert len(asked) == 3 and None not in asked
    assert (run / "history.csv").read_text() == (finished / "history.csv").read_text()
    assert json.loads((run / "metrics.json").read_text()) == json.loads((finished / "metrics.json").read_text())


def test_preprocessed_images_are_kept_for_a_resumption(tmp_path, monkeypatch):
    import brain_vit.run
    from brain_vit.phantom import phantom_dataset
    phantoms, part = phantom_dataset(6, seed=0), np.array(["train", "train", "validation", "validation", "test", "test"])
    first = brain_vit.run._parts(phantoms, part, 32, tmp_path)
    monkeypatch.setattr(brain_vit.run, "preprocess_all", None)
    again = brain_vit.run._parts(phantoms, part, 32, tmp_path)
    for name, chosen in again.items():
        assert isinstance(chosen.images, np.memmap) and isinstance(chosen.masks, np.memmap)
        np.testing.assert_array_equal(chosen.images, first[name].images)


def test_long_parts_are_asked_in_slices():
    from brain_vit.run import in_slices
    lengths = []
    result = in_slices(lambda one, two: lengths.append(len(one)) or one + two, np.arange(1300), np.ones(1300, int))
    assert lengths == [512, 512, 276]
    np.testing.assert_array_equal(result, np.arange(1, 1301))


def test_no_model_sees_more_than_a_slice(monkeypatch, tmp_path):
    import brain_vit.run
    largest = []

    def heat(model, images, method):
        largest.append(len(images))
        return np.ones(images.shape[:3], "float32") * np.arange(images.shape[2])

    monkeypatch.setattr(brain_vit.run, "heatmap", heat)
    masks = np.zeros((1100, 8, 8), bool)
    masks[:, :, 7] = True
    assert brain_vit.run.point(None, np.zeros((1100, 8, 8, 1), "float32"), masks, "attention")["hits"] == 1100
    assert max(largest) <= 512 and sum(largest) == 1100


def test_pointing_respects_groups(monkeypatch):
    import brain_vit.run
    monkeypatch.setattr(brain_vit.run, "heatmap", lambda model, images, method: images[..., 0])
    images, masks = np.zeros((24, 4, 4, 1), "float32"), np.zeros((24, 4, 4), bool)
    images[:, 0, 0], masks[:10, 0, 0], masks[10:20, 3, 3] = 1, True, True  # ten hits, ten misses, four without a lesion
    alone = brain_vit.run.point(None, images, masks, "attention")
    paired = brain_vit.run.point(None, images, masks, "attention", np.arange(24) // 5)
    assert (alone["n"], alone["num_groups"], alone["hits"], alone["share"]["method"]) == (20, 20, 10, "Wilson")
    assert (paired["n"], paired["num_groups"], paired["hits"], paired["share"]["method"]) == (20, 4, 10, "cluster bootstrap")
    width = lambda pointing: np.ptp(pointing["share"]["interval"])
    assert alone["share"]["value"] == paired["share"]["value"] == 0.5 and width(paired) > 1.5 * width(alone)
    nothing = brain_vit.run.point(None, images, np.zeros_like(masks), "attention")
    assert nothing["n"] == 0 and brain_vit.run._pointing_in_words(nothing) == ""
    one_group = brain_vit.run.point(None, images, masks, "attention", np.zeros(24, int))
    assert one_group["share"]["interval"] is None and "10 of 20" in brain_vit.run._pointing_in_words(one_group)


def test_starting_weights_must_fit(finished):
    from brain_vit.run import start_model
    from brain_vit.vit import ViTConfig
    config = ViTConfig(**json.loads((finished / "config.json").read_text())["model"])
    assert start_model(config, 0, finished).count_params() > 0
    with pytest.raises(InputError, match="another model"):
        start_model(replace(config, d_model=32), 0, finished)


def test_weights_that_have_seen_the_test_images_are_refused(finished):
    from brain_vit.phantom import Phantom, phantom_dataset
    from brain_vit.run import refuse_seen
    recipe = Phantom.easy(image_size=48)
    with pytest.raises(InputError, match="were trained on"):
        refuse_seen(finished, phantom_dataset(80, seed=0, recipe=recipe).images)
    refuse_seen(finished, phantom_dataset(10, seed=1, recipe=recipe).images)


def descend(finished, tmp_path):
    "Three generations of runs, made from one finished run: parent, child, grandchild; each trained on a tenth image of its own."
    import shutil
    from brain_vit._base import read_csv, write_csv
    from brain_vit.run import _write_seen
    rows, start, runs = read_csv(finished / "split.csv"), None, []
    for number, name in enumerate(("parent", "child", "grandchild")):
        run = shutil.copytree(finished, tmp_path / name)
        for index, row in enumerate(rows):
            row["part"] = "train" if index == number else "test"
        write_csv(run / "split.csv", [{**row, "group": index} for index, row in enumerate(rows)])
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"start": str(start or "scratch")}))
        _write_seen(run, start)
        start = run
        runs.append(run)
    return runs, [row["digest"] for row in rows]


def test_a_run_remembers_what_its_ancestors_saw_when_they_are_gone(finished, tmp_path, monkeypatch):
    import shutil
    from brain_vit.phantom import Phantom, phantom_dataset
    from brain_vit.run import refuse_seen, seen_images
    (parent, child, grandchild), digests = descend(finished, tmp_path)
    assert not (parent / "seen.csv").exists() and seen_images(grandchild) == set(digests[:3])
    shutil.rmtree(parent)
    shutil.rmtree(child)
    monkeypatch.chdir(tmp_path)
    images = phantom_dataset(80, seed=0, recipe=Phantom.easy(image_size=48)).images
    assert seen_images("grandchild") == set(digests[:3])
    for image in images[:3]:
        with pytest.raises(InputError, match="1 of the test images"):
            refuse_seen("grandchild", [image])
    refuse_seen("grandchild", images[3:])


def test_runs_without_a_memory_are_asked_for_their_parents(finished, tmp_path):
    import shutil
    from brain_vit.run import seen_images
    (parent, child, grandchild), digests = descend(finished, tmp_path)
    (grandchild / "seen.csv").unlink()
    (child / "seen.csv").unlink()
    assert seen_images(grandchild) == set(digests[:3])
    shutil.rmtree(parent)
    with pytest.raises(InputError, match="cannot be read"):
        seen_images(grandchild)
    config = json.loads((child / "config.json").read_text())
    (child / "config.json").write_text(json.dumps(config | {"images_seen": 10}))  # pretraining sees phantoms only
    assert seen_images(child) == set(digests[1:2])


def test_a_run_that_starts_from_a_run_writes_what_was_seen(finished, tmp_path):
    from brain_vit._base import read_csv
    from brain_vit.phantom import Phantom, phantom_dataset
    from brain_vit.run import TrainConfig, ViTConfig, seen_images, train_run
    config = ViTConfig(**json.loads((finished / "config.json").read_text())["model"])
    others = phantom_dataset(40, seed=1, recipe=Phantom.easy(image_size=48))
    run = train_run(others, tmp_path / "second", config, TrainConfig(epochs=1), start=finished, progress=False)
    assert {row["digest"] for row in read_csv(run / "seen.csv")} == seen_images(finished)
    assert len(seen_images(run)) > len(seen_images(finished)) and "seen.csv" in (run / "README.md").read_text()


@pytest.fixture
def speed():
    "benchmarks/speed.py as a module."
    import importlib.util
    from pathlib import Path
    path = Path(__file__).parent.parent / "benchmarks" / "speed.py"
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("speed", path))
    spec.loader.exec_module(module)
    return module


def test_growth_goes_on_where_it_was_and_leaves_other_parts_alone(speed, tmp_path, monkeypatch):
    file, calls = tmp_path / "speed.json", []
    file.write_text(json.dumps({"machine": {"cores": 99}, "rounds": 7, "cold": {"kept": True}, "growth": [{"images": 9, "audit": {"seconds": 1}}]}))

    def grown(size, name):
        calls.append((size, name))
        if calls == [(10, "predict"), (10, "audit"), (10, "train"), (20, "predict"), (20, "audit")]:
            raise KeyboardInterrupt
        return {"seconds": 1.0, "megabytes": size, "own_megabytes": size, "code": speed.code_digest()}

    monkeypatch.setattr(speed, "grown", grown)
    arguments = ["--only", "growth", "--sizes", "10,20", "--json", str(file)]
    with pytest.raises(KeyboardInterrupt):
        speed.main(arguments)
    assert [sorted(row) for row in json.loads(file.read_text())["growth"]] == [["audit", "images"], ["audit", "images", "predict", "train"], ["images", "predict"]]
    speed.main(arguments)
    assert calls[5:] == [(20, "audit"), (20, "train")]
    result = json.loads(file.read_text())
    assert (result["machine"], result["rounds"], result["cold"]) == ({"cores": 99}, 7, {"kept": True}) and result["measured"]["growth"]["machine"]["processor"]
    assert [row["images"] for row in result["growth"]] == [9, 10, 20]
    speed.main([*arguments, "--again"])
    assert len(calls) == 7 + 6


def test_models_of_another_kind_of_machine_are_kept_beside(speed, tmp_path, monkeypatch):
    file, made = tmp_path / "speed.json", iter(range(9))
    monkeypatch.setattr(speed, "measure_models", lambda rounds: {"run": next(made)})
    arguments = ["--only", "models", "--json", str(file)]
    speed.main(arguments)
    speed.main(arguments)  # the same machine: the new figures take the place of the old
    assert json.loads(file.read_text())["models"] == {"run": 1} and "elsewhere" not in json.loads(file.read_text())
    here = speed.machine()
    monkeypatch.setattr(speed, "machine", lambda: here | {"vectors": "wider"})
    speed.main(arguments)
    result = json.loads(file.read_text())
    assert result["models"] == {"run": 2} and result["measured"]["models"]["machine"]["vectors"] == "wider"
    assert result["elsewhere"] == {"machine": here, "rounds": 7, "models": {"run": 1}}


def test_own_memory_of_a_process_is_measured(speed):
    seconds, whole, own = speed.process([sys.executable, "-c", "import time; content = bytearray(200_000_000); time.sleep(0.5)"])
    assert seconds > 0.5 and whole > 190 and (own > 190 or not os.path.exists("/proc/self/status"))


def test_waiting_is_the_difference_of_medians(speed):
    waiting = speed.waiting(fixed=[100.0, 50.0, 100.0], fed=[90.0, 95.0, 45.0])
    assert waiting["median"] == 0.1 and (waiting["lowest"], waiting["highest"]) == (-0.9, 0.55)
