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
