"Training: targets, losses, batches that repeat, the best epoch, and a killed run that ends as if nothing had happened."
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import brain_vit
from brain_vit.augment import augment_batch
from brain_vit.patches import Patches
from brain_vit.training import SliceBatches, TrainConfig, compile_vit, fit, lesion_fraction, lesion_loss, plot_curves, train_recipe
from brain_vit.vit import ViTConfig, attention_maps, attention_readout, build_vit

CONFIG = ViTConfig(image_size=16, patch_size=8, d_model=16, num_blocks=1, num_heads=2, dropout=0.3, pool="lesion")


def data(count=24, seed=0):
    "Noise with a bright corner where the label is 1."
    generator = np.random.default_rng(seed)
    images, labels = generator.random((count, 16, 16, 1), dtype="float32") / 2, np.arange(count) % 2
    masks = np.zeros((count, 16, 16), bool)
    masks[labels == 1, 2:7, 9:14] = True
    return images + 0.5 * masks[..., None], labels, masks


def batches(rows=slice(None), **options):
    images, labels, masks = data()
    return SliceBatches(images[rows], labels[rows], masks[rows], CONFIG.patch_size, batch_size=8, **options)


def linear(dropout=0.0):
    "A model that compiles fast; `fit` needs no more than an output named tumor."
    image = keras.Input((16, 16, 1))
    x = keras.layers.Dropout(dropout)(keras.layers.Flatten()(image))
    return keras.Model(image, {"tumor": keras.layers.Dense(1, name="tumor")(x)})


def plain(rows=slice(None), **options):
    images, labels, _ = data()
    return SliceBatches(images[rows], labels[rows], batch_size=8, **options)


# targets and losses

def test_lesion_fraction_follows_the_order_of_patches():
    masks = np.random.default_rng(0).random((3, 24, 16)) < 0.3
    expected = ops.convert_to_numpy(Patches(8)(masks[..., None].astype("float32"))).mean(axis=-1)
    np.testing.assert_allclose(lesion_fraction(masks, 8), expected, atol=1e-6)


def test_lesion_loss_is_weighted_cross_entropy_and_never_overflows():
    generator = np.random.default_rng(0)
    fraction, logits = generator.random((4, 9)).astype("float32"), generator.normal(0, 3, (4, 9)).astype("float32")
    probability = 1 / (1 + np.exp(-logits.astype("float64")))
    entropy = -fraction * np.log(probability) - (1 - fraction) * np.log(1 - probability)
    np.testing.assert_allclose(ops.convert_to_numpy(lesion_loss(fraction, logits)), ((1 + 8 * fraction) * entropy).mean(axis=1), rtol=1e-4)
    extreme = ops.convert_to_numpy(lesion_loss(np.float32([[0, 1]]), np.float32([[1e4, -1e4]])))
    np.testing.assert_allclose(extreme, (1e4 + 9e4) / 2, rtol=1e-5)


# batches

def seen(batch_set, epoch):
    batch_set.epoch = epoch
    return np.concatenate([batch_set[index][0] for index in range(len(batch_set))])


def test_each_image_once_an_epoch_in_an_order_of_its_own():
    images = np.arange(21, dtype="float32")[:, None, None, None]
    one, two = (SliceBatches(images, np.arange(21), batch_size=8, seed=seed) for seed in (0, 1))
    assert len(one) == 3
    np.testing.assert_array_equal(seen(one, 0), images)  # not shuffled unless `fit` says so
    one.shuffle = two.shuffle = True
    orders = [seen(*which).ravel() for which in ((one, 0), (one, 1), (two, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(21))
    assert len({tuple(order) for order in orders}) == 3
    np.random.seed(5), random.seed(5)
    np.testing.assert_array_equal(seen(one, 0).ravel(), orders[0])


def test_labels_masks_and_augmentation_stay_with_their_image():
    calls = []

    def shift(images, indices, seed, epoch, masks):
        calls.append((indices.tolist(), seed, epoch))
        return images + 1, ~masks

    images, labels, masks = data()
    train = SliceBatches(images, labels, masks, 8, batch_size=8, augment=shift, seed=3)
    train.shuffle, train.epoch = True, 4
    inputs, targets, weights = train[1]
    (indices, seed, epoch), = calls
    assert (seed, epoch) == (3, 4)
    np.testing.assert_array_equal(inputs, images[indices] + 1)
    np.testing.assert_array_equal(targets["tumor"][:, 0], labels[indices])
    np.testing.assert_array_equal(targets["lesion"], lesion_fraction(~masks[indices], 8))
    assert weights["lesion"].all()


def test_unknown_masks_weigh_nothing():
    images, labels, _ = data()
    inputs, targets, weights = SliceBatches(images, labels, None, 8, batch_size=8)[0]
    assert targets["lesion"].shape == (8, 4) and not weights["lesion"].any() and weights["tumor"].all()
    assert "lesion" not in SliceBatches(images, labels)[0][1]


# the loop

def test_learning_rate_rises_and_falls_and_norms_do_not_decay():
    model = compile_vit(build_vit(CONFIG), TrainConfig(learning_rate=0.01, warmup=0.1), total_steps=100)
    schedule = model.optimizer._learning_rate
    rates = np.array([float(schedule(step)) for step in range(101)])
    assert rates.argmax() == 10 and abs(rates[10] - 0.01) < 1e-6 and rates[0] == 0 and rates[100] < 1e-6
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()
    decaying = {weight.path for weight in model.trainable_variables if model.optimizer._use_weight_decay(weight)}
    assert decaying == {weight.path for weight in model.trainable_variables if weight.path.endswith("kernel")}


def test_a_recipe_looks_at_the_number_of_images_and_at_the_start():
    from brain_vit._base import InputError
    from brain_vit.vit import SMALL
    config, training = train_recipe("small", 253)
    assert config == SMALL and training.epochs == 99 and train_recipe("small", 10**6)[1].epochs == 10 and train_recipe("small", 1)[1].epochs == 100
    pretrained = train_recipe("small", 253, pretrained=True)[1]
    assert pretrained.epochs == 25 and pretrained.learning_rate < training.learning_rate
    assert train_recipe("lecture", 253, epochs=3, augment=False, seed=7)[1] == TrainConfig(epochs=3, learning_rate=3e-4, augment=False, seed=7)
    with pytest.raises(InputError, match="lecture"):
        train_recipe("large", 253)


def test_one_attention_readout_per_model_that_dies_with_it():
    import gc
    import weakref
    config = ViTConfig(image_size=16, patch_size=8, d_model=8, num_blocks=1, num_heads=2)
    model, other = build_vit(config), build_vit(config)
    assert attention_readout(model) is attention_readout(model) is not attention_readout(other)
    images = np.random.default_rng(0).random((2, 16, 16, 1), "float32")
    before = attention_maps(model, images)
    model.set_weights([2 * weight + 0.1 for weight in model.get_weights()])
    assert not np.allclose(attention_maps(model, images), before), "the read-out sees new weights"
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_it_learns(tmp_path):
    keras.utils.set_random_seed(0)
    history = fit(linear(), plain(), plain(), TrainConfig(epochs=25, learning_rate=0.02, augment=False), tmp_path, progress=False)
    assert history[-1]["val_accuracy"] == 1 and [row["epoch"] for row in history] == list(range(1, 26))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert len(plot_curves(history).axes) == 2


def test_best_epoch_is_chosen_by_validation_and_last_is_last(tmp_path):
    images, labels, _ = data()
    wrong = SliceBatches(images, 1 - labels, batch_size=8)  # the better the training, the worse the validation
    config = TrainConfig(epochs=4, learning_rate=0.05, warmup=0.01)
    kept, history = {}, {}
    for keep in ("best", "last"):
        keras.utils.set_random_seed(0)
        model = linear()
        history[keep] = fit(model, plain(), wrong, config, tmp_path / keep, progress=False, keep=keep)
        kept[keep] = model.evaluate(wrong, verbose=0, return_dict=True)["loss"]
    assert history["best"] == history["last"]
    losses = [row["val_loss"] for row in history["best"]]
    assert losses[-1] > min(losses)
    np.testing.assert_allclose([kept["best"], kept["last"]], [min(losses), losses[-1]], rtol=1e-5)
    assert len(list((tmp_path / "best").glob("*.weights.h5"))) <= 2
    with pytest.raises(ValueError, match="keep"):
        fit(linear(), plain(), plain(), config, tmp_path / "other", progress=False, keep="first")


def test_the_global_random_generator_does_not_matter(tmp_path):
    "Keras shuffles whole batches with Python's `random` unless told not to: a resumed run would see another order."
    orders = []
    for seed in (1, 2):
        order = []

        def note(images, indices, seed, epoch, masks):
            order.append(indices.tolist())
            return images

        random.seed(seed)
        fit(linear(), plain(augment=note), plain(), TrainConfig(epochs=3), tmp_path / str(seed), progress=False)
        orders.append(order)
    assert orders[0][-9:] == orders[1][-9:] and orders[0][-3:] != orders[0][-6:-3]


# killed and resumed

class Kill(keras.callbacks.Callback):
    "End the process without a warning in the middle of an epoch."
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 2 and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder, seed=0, callbacks=()):
    "Dropout, augmentation, averaged weights; a whole transformer with lesion target or, on the backend that compiles slowly, one layer."
    keras.utils.set_random_seed(seed)
    model, make = (linear(0.5), plain) if keras.backend.backend() == "jax" else (build_vit(CONFIG), batches)
    history = fit(model, make(augment=augment_batch), make(slice(8)), TrainConfig(epochs=4, learning_rate=1e-2, average=0.5), folder,
                  progress=False, callbacks=callbacks, keep="last")
    return model, history


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_killed_and_resumed_ends_with_the_same_weights(tmp_path, backend):
    pytest.importorskip(backend)
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(Path(brain_vit.__file__).parents[1])}
    here = [sys.executable, __file__, str(tmp_path)]
    killed = subprocess.run([*here, "kill"], env=environment, capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    state = json.loads((tmp_path / "killed" / "state.json").read_text())
    assert state["epoch"] == 2 and len(state["dropout"]) == {"tensorflow": 3, "jax": 1}[backend]
    done = subprocess.run([*here, "resume"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["epochs"] == 4 and result["moved"] > 1e-3
    assert result["weights"] == result["optimizer"] == result["averaged"] == 0 and result["history"]


def compare(folder):
    "In a new process with other random numbers: resume, and do the whole run again without interruption."
    resumed, history = run(f"{folder}/killed", seed=99)
    whole, expected = run(f"{folder}/whole")
    difference = lambda one, two: max(float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max()) for a, b in zip(one, two, strict=True))
    numbers = lambda variables: [ops.convert_to_numpy(variable) for variable in variables]
    again, _ = run(f"{folder}/whole", seed=98)  # a finished run: nothing is trained, the averaged weights come back
    print(json.dumps({"epochs": len(history), "history": history == expected, "moved": abs(history[0]["loss"] - history[-1]["loss"]),
                      "weights": difference(resumed.get_weights(), whole.get_weights()),
                      "optimizer": difference(numbers(resumed.optimizer.variables), numbers(whole.optimizer.variables)),
                      "averaged": difference(again.get_weights(), whole.get_weights())}))


if __name__ == "__main__":
    if sys.argv[2] == "kill":
        run(f"{sys.argv[1]}/killed", callbacks=(Kill(),))
    else:
        compare(sys.argv[1])
