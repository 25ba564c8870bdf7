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
from brain_vit.training import (PHANTOM_SEEDS, LayerAdamW, MixedBatches, SliceBatches, TrainConfig, compile_vit, fit, is_right, layer_scales, lesion_fraction,
                                lesion_loss, plot_curves, train_recipe)
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
    return SliceBatches(images[rows], labels[rows], masks[rows], CONFIG.square_size, batch_size=8, **options)


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


def mixed(seed=0, epoch=0, masks=None, share=0.25, **options):
    images, labels, _ = data(20)
    train = MixedBatches(share, images, labels, masks, CONFIG.square_size, batch_size=12, seed=seed, **options)
    train.shuffle, train.epoch = True, epoch
    return [train[index] for index in range(len(train))]


def test_phantoms_stand_beside_every_real_image_and_bring_the_only_lesion_targets():
    plain_set = SliceBatches(*data(20)[:2], None, CONFIG.square_size, batch_size=12)
    plain_set.shuffle = True
    for real, (images, targets, weights), count in zip([plain_set[0], plain_set[1]], mixed(), (4, 3)):
        n = len(real[0])
        assert len(images) == n + count == len(targets["tumor"]) == len(targets["lesion"])
        np.testing.assert_array_equal(images[:n], real[0])
        np.testing.assert_array_equal(targets["tumor"][:n], real[1]["tumor"])
        assert not weights["lesion"][:n].any() and (weights["lesion"][n:] == 1).all() and (weights["tumor"] == 1).all()
    phantoms = np.concatenate([batch[1]["lesion"][-count:].sum(axis=1) > 0 for batch, count in zip(mixed(), (4, 3))])
    np.testing.assert_array_equal(phantoms, np.concatenate([batch[1]["tumor"][-count:, 0] for batch, count in zip(mixed(), (4, 3))]) == 1)
    assert phantoms.any() and not phantoms.all()


def test_phantoms_follow_from_seed_and_epoch_and_are_never_met_elsewhere():
    from brain_vit.phantom import Phantom
    from brain_vit.pretrain import HELD_OUT_SEED, render_pool
    beside = lambda **options: mixed(**options)[0][0][12:]
    np.testing.assert_array_equal(beside(seed=1, epoch=3), beside(seed=1, epoch=3))
    assert not any(np.array_equal(beside(), beside(**other)) for other in (dict(seed=1), dict(epoch=1)))
    assert len({image.tobytes() for epoch in range(3) for batch in mixed(epoch=epoch) for image in batch[0][-3:]}) == 18
    pool = render_pool(Phantom.full(), PHANTOM_SEEDS, 0, 4, 16)[0]
    np.testing.assert_array_equal(beside(), pool)
    assert PHANTOM_SEEDS > HELD_OUT_SEED


def test_phantoms_are_augmented_like_the_others():
    shift = lambda images, indices, seed, epoch, masks: images + 1 if masks is None else (images + 1, masks)
    np.testing.assert_allclose(mixed(augment=shift)[0][0], mixed()[0][0] + 1, rtol=1e-6)


def test_a_method_mixes_phantoms_into_training_only():
    from brain_vit.baselines import Part, network_batches
    images, labels, _ = data()
    train, validation = network_batches(Part(images, labels), Part(images, labels), TrainConfig(phantoms=0.5, augment=False, batch_size=8), 8)
    assert isinstance(train, MixedBatches) and type(validation) is SliceBatches and len(train[0][0]) == 16 and len(validation[0][0]) == 8
    assert type(network_batches(Part(images, labels), Part(images, labels), TrainConfig(), 8)[0]) is SliceBatches


# the loop

def test_smoothed_labels_teach_but_do_not_judge(tmp_path):
    keras.utils.set_random_seed(0)
    train, validation, model = plain(), plain(), linear()
    history = fit(model, train, validation, TrainConfig(epochs=20, learning_rate=0.02, label_smoothing=0.2), tmp_path, progress=False)
    for rows, expected in ((train, [0.1, 0.9]), (validation, [0, 1])):
        np.testing.assert_allclose(np.unique(rows[0][1]["tumor"]), expected, rtol=1e-6)
    assert history[-1]["accuracy"] == history[-1]["val_accuracy"] == 1
    logits, labels = model.predict(data()[0], verbose=0)["tumor"][:, 0], data()[1]
    np.testing.assert_allclose(min(row["val_loss"] for row in history), np.mean(np.logaddexp(0, logits) - labels * logits), rtol=1e-4)
    np.testing.assert_array_equal(ops.convert_to_numpy(is_right(np.float32([[0.9], [0.1], [1]]), np.float32([[2], [0.1], [-1]]))), [1, 0, 0])


@pytest.mark.parametrize("change", [dict(layer_decay=0.0), dict(layer_decay=1.5), dict(label_smoothing=1.0), dict(phantoms=1.0), dict(phantoms=-0.1)])
def test_impossible_recipes_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainConfig(**change)


def test_blocks_far_from_the_output_learn_slower():
    config = ViTConfig(image_size=16, patch_size=8, d_model=16, num_blocks=2, num_heads=2, pool="lesion")
    model = build_vit(config)
    owner = [weight.path.split("/")[0] for weight in model.trainable_variables]
    found = dict(zip(owner, layer_scales(model, 0.5)))
    assert found == {"patch_encoder": 0.25, "block_0": 0.5, "block_1": 1.0, "norm": 1.0, "pool": 1.0, "tumor": 1.0}
    assert set(layer_scales(model, 1.0)) == {1.0} == set(layer_scales(linear(), 0.5))


def step(scales, policy="float32"):
    "How far each weight of a model moves in one step."
    keras.utils.set_random_seed(0)
    previous, model = keras.config.dtype_policy().name, None
    keras.config.set_dtype_policy(policy)
    try:
        image = keras.Input((4,))
        model = keras.Model(image, keras.layers.Dense(1, dtype="float32")(keras.layers.Dense(3)(image)))
        optimizer = LayerAdamW(0.01, scales=scales, weight_decay=0.0)
        model.compile(optimizer, "mse")
        before = model.get_weights()
        model.fit(np.full((8, 4), 0.1, "float32"), np.full((8, 1), 0.3, "float32"), batch_size=8, verbose=0, shuffle=False)
    finally:
        keras.config.set_dtype_policy(previous)
    return [np.abs(new - old).max() for new, old in zip(model.get_weights(), before)]


def layerwise():
    "One step with factors, without and with mixed precision, and the optimizer from its configuration."
    for policy in ("float32", "mixed_float16"):
        whole, scaled = step(None, policy), step([0.25, 0.5, 1.0, 0.0], policy)
        np.testing.assert_allclose(scaled, np.multiply(whole, [0.25, 0.5, 1.0, 0.0]), rtol=1e-3, atol=1e-6)
        assert min(whole) > 1e-3
    again = keras.optimizers.deserialize(keras.optimizers.serialize(LayerAdamW(0.01, scales=[0.5, 1.0])))
    assert isinstance(again, LayerAdamW) and list(again.scales) == [0.5, 1.0]


def test_each_weight_has_a_learning_rate_of_its_own():
    layerwise()


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


def judged():
    "With a running average: the validation loss of what is kept, for both ways to keep, and the history."
    import tempfile
    images, labels, _ = data()
    wrong = SliceBatches(images, 1 - labels, batch_size=8)
    kept = {}
    for keep in ("best", "last"):
        keras.utils.set_random_seed(0)
        model = linear()
        with tempfile.TemporaryDirectory() as folder:
            history = fit(model, plain(), wrong, TrainConfig(epochs=5, learning_rate=0.05, warmup=0.01, average=0.8), folder, progress=False, keep=keep)
        kept[keep] = model.evaluate(wrong, verbose=0, return_dict=True)["loss"]
    losses = [row["val_loss"] for row in history]
    assert losses[-1] > min(losses)
    np.testing.assert_allclose([kept["best"], kept["last"]], [min(losses), losses[-1]], rtol=1e-5)


def test_what_is_chosen_with_a_running_average_is_what_is_kept():
    judged()


def test_validating_an_average_does_not_touch_the_training(tmp_path):
    losses = {}
    for average in (0.0, 0.8):
        keras.utils.set_random_seed(0)
        losses[average] = [row["loss"] for row in fit(linear(), plain(), plain(), TrainConfig(epochs=3, average=average), tmp_path / str(average), progress=False)]
    assert losses[0.0] == losses[0.8]


def test_layer_rates_and_averages_on_the_other_backend():
    other = "jax" if keras.backend.backend() == "tensorflow" else "tensorflow"
    pytest.importorskip(other)
    environment = {**os.environ, "KERAS_BACKEND": other, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(Path(brain_vit.__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__, "", "recipe"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_short_curves_have_dots_and_whole_epochs():
    rows = [{"epoch": n, "loss": 1.0 / n, "val_loss": 2.0 / n, "accuracy": 0.5, "val_accuracy": 0.5} for n in range(1, 31)]
    for history, marker in ((rows[:4], "o"), (rows, "None")):
        loss, accuracy = plot_curves(history).axes
        assert loss.get_ylim() == (0, 2.2) and {line.get_marker() for line in loss.lines + accuracy.lines} == {marker}
        assert all(tick == round(tick) for tick in loss.get_xticks())
    plot_curves([{**rows[0], "val_loss": float("nan"), "loss": float("inf")}])


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
    "Dropout, augmentation, averaged weights, layer-wise rates; a whole transformer with lesion target and phantoms or, on the backend that compiles slowly, one layer."
    keras.utils.set_random_seed(seed)
    model, make = (linear(0.5), plain) if keras.backend.backend() == "jax" else (build_vit(CONFIG), batches)
    train = make(augment=augment_batch)
    if make is batches:
        train = MixedBatches(0.25, train.images, train.labels, train.masks, CONFIG.square_size, batch_size=8, augment=augment_batch)
    config = TrainConfig(epochs=4, learning_rate=1e-2, average=0.5, layer_decay=0.7, label_smoothing=0.1)
    history = fit(model, train, make(slice(8)), config, folder, progress=False, callbacks=callbacks, keep="last")
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
    elif sys.argv[2] == "recipe":
        layerwise()
        judged()
    else:
        compare(sys.argv[1])
