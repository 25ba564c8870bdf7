"""Pretraining runs go on from each other, and never see a phantom again."""
import json
import shutil

import keras
import numpy as np
import pytest
from brain_vit._base import InputError
from brain_vit.phantom import Phantom
from brain_vit.pretrain import HELD_OUT_SEED, render_pool
from brain_vit.run import pretrain_run, start_model
from brain_vit.training import TrainConfig
from brain_vit.vit import ViTConfig, predict_outputs

TINY = ViTConfig(image_size=64, patch_size=16, d_model=32, num_heads=2, num_blocks=1, stem="hierarchical", pool="lesion")


def run(out, seed, start=None, **changes):
    config = TrainConfig(epochs=2, learning_rate=1e-3, average=0.9, seed=seed)
    return pretrain_run(out, TINY, config, start, Phantom.easy(), pool_size=64, held_out=40, progress=False, **changes)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return run(tmp_path_factory.mktemp("pretrain") / "first", seed=0)


def test_a_second_stage_adds_to_what_was_seen(first, tmp_path):
    second = run(tmp_path / "second", seed=1, start=first)
    config = json.loads((second / "config.json").read_text())
    assert (config["images_seen"], config["seeds"], config["easy_pools"], config["start"]) == (256, [0, 1], 0, str(first))
    assert json.loads((first / "config.json").read_text())["images_seen"] == 128
    assert "256 views" in (second / "README.md").read_text()


def test_a_second_stage_starts_where_the_first_ended(first, tmp_path):
    images = render_pool(Phantom.easy(), HELD_OUT_SEED, 0, 8, 64)[0]
    ended = keras.saving.load_model(first / "model.keras", compile=False)
    np.testing.assert_array_equal(predict_outputs(start_model(TINY, 5, first), images)["logit"], predict_outputs(ended, images)["logit"])


def test_the_phantoms_of_an_earlier_stage_are_refused(first, tmp_path):
    with pytest.raises(InputError, match="seed 0 already: choose another --seed"):
        run(tmp_path / "again", seed=0, start=first)
    assert not list(tmp_path.iterdir())


def test_a_model_that_saw_other_images_is_no_start(first, tmp_path):
    bare = shutil.copy(first / "model.keras", tmp_path / "bare.keras")
    with pytest.raises(InputError, match="no pretraining run"):
        run(tmp_path / "again", seed=1, start=bare)
