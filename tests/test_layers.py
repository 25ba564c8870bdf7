"""The layers of notebooks 04 to 08: shape, value, configuration, reload, precision, masks; on both backends."""
import inspect
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from brain_vit._base import InputError
from brain_vit.attention import SelfAttention, patch_importance, scaled_dot_product_attention
from brain_vit.encoder import FeedForward, QuickDropout, TransformerBlock, keep_mask
from brain_vit.multihead import MultiHeadSelfAttention
from brain_vit.patches import Patches, unpatch
from brain_vit.position import PatchEncoder, sinusoidal_positions, sinusoidal_positions_2d
from brain_vit.vit import LesionPooling, ViTConfig, build_vit, copy_weights, predict_outputs

IMAGE, TOKENS = (32, 48, 2), (6, 16)
CASES = [
    (Patches, dict(patch_size=8), IMAGE, (24, 128)),
    (PatchEncoder, dict(d_model=16, patch_size=16), IMAGE, (6, 16)),
    (PatchEncoder, dict(d_model=16, patch_size=16, position="sinusoidal_2d", stem="hierarchical"), IMAGE, (6, 16)),
    (PatchEncoder, dict(d_model=16, patch_size=8, position="learned", stem="hierarchical"), IMAGE, (24, 16)),
    (PatchEncoder, dict(d_model=5, patch_size=4, position="none", stem="hierarchical"), IMAGE, (96, 5)),
    (SelfAttention, dict(d_model=8), TOKENS, (6, 8)),
    (MultiHeadSelfAttention, dict(d_model=16, num_heads=4), TOKENS, (6, 16)),
    (FeedForward, dict(d_model=16, mlp_ratio=3.0, dropout=0.1), TOKENS, (6, 16)),
    (TransformerBlock, dict(d_model=16, num_heads=4, mlp_ratio=1.5, dropout=0.1), TOKENS, (6, 16)),
    (QuickDropout, dict(rate=0.1, noise_shape=None, seed=3), TOKENS, (6, 16)),
]
KNOWN_MASK = [False, True, False, False, False, True, False, True, True, False, True, True]
OTHER = "BRAIN_VIT_OTHER_BACKEND" in os.environ  # this process is the run on the other backend, see the last test
if OTHER:  # eager JAX compiles each operation by itself: fewer variants, every layer
    CASES = [CASES[i] for i in (0, 1, 2, 6, 8, 9)]
NAMES = [f"{cls.__name__}-{'-'.join(map(str, args.values()))}" for cls, args, *_ in CASES]
WITH_SCORES = [(SelfAttention, dict(d_model=16), (6, 6)), (MultiHeadSelfAttention, dict(d_model=16, num_heads=4), (4, 6, 6)),
               (TransformerBlock, dict(d_model=16, num_heads=4), (4, 6, 6))]
every_layer = pytest.mark.parametrize("cls, arguments, shape, expected", CASES, ids=NAMES)
every_attention = pytest.mark.parametrize("cls, arguments, scores_shape", WITH_SCORES, ids=[cls.__name__ for cls, *_ in WITH_SCORES])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def values(tensor):
    return ops.convert_to_numpy(tensor)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attend(query, key, value):
    scores = softmax(query @ np.swapaxes(key, -1, -2) / np.sqrt(query.shape[-1]))
    return scores @ value, scores


def randomise(layer):
    for number, weight in enumerate(layer.trainable_variables):
        weight.assign(0.3 * draw(*weight.shape, seed=number + 1))


def layer_norm(x, norm):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + norm.epsilon) * values(norm.gamma) + values(norm.beta)


def gelu(x):
    from math import erf
    return x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2


# --- every layer ------------------------------------------------------------------------------------------------------
@every_layer
def test_shape_eager_and_symbolic(cls, arguments, shape, expected):
    layer = cls(**arguments)
    assert layer(draw(3, *shape)).shape == (3, *expected)
    assert cls(**arguments)(keras.Input(shape)).shape == (None, *expected)
    assert tuple(layer.compute_output_shape((None, *shape))) == (None, *expected)
    assert layer(draw(1, *shape)).shape == (1, *expected)


@every_layer
def test_config_is_the_constructor_and_comes_back(cls, arguments, shape, expected):
    layer = cls(**arguments, name="layer")
    config = layer.get_config()
    names = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
    assert set(config) - set(keras.layers.Layer.get_config(keras.layers.Layer())) == names
    assert {name: config[name] for name in arguments} == arguments
    again = cls.from_config(config)
    assert again.get_config() == config and again.name == "layer"
    layer(draw(1, *shape)), again(draw(1, *shape))
    assert [w.shape for w in again.weights] == [w.shape for w in layer.weights]
    assert [w.path for w in again.weights] == [w.path for w in layer.weights]


@every_layer
def test_saved_model_comes_back_without_custom_objects(cls, arguments, shape, expected, tmp_path):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, cls(**arguments)(inputs))
    randomise(model)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    x = draw(2, *shape)
    np.testing.assert_allclose(values(again(x)), values(model(x)), atol=1e-6)


@every_layer
@pytest.mark.parametrize("policy", ["mixed_float16"] if OTHER else ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(cls, arguments, shape, expected, policy):
    layer, exact = cls(**arguments, dtype=policy), cls(**arguments)
    x = draw(2, *shape)
    output, reference = layer(x), values(exact(x))
    assert keras.backend.standardize_dtype(output.dtype) == policy.removeprefix("mixed_")
    assert all(keras.backend.standardize_dtype(w.dtype) == "float32" for w in layer.weights)
    assert keras.backend.standardize_dtype(cls(**arguments, dtype=policy)(keras.Input(shape)).dtype) == policy.removeprefix("mixed_")
    for mine, theirs in zip(layer.weights, exact.weights):
        mine.assign(theirs)
    tolerance = 0.01 if policy == "mixed_float16" else 0.06
    np.testing.assert_allclose(values(ops.cast(layer(x), "float32")), reference, atol=tolerance * np.abs(reference).max())


@every_layer
def test_compiled_in_a_functional_model(cls, arguments, shape, expected):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, cls(**arguments)(inputs))
    x = draw(3, *shape)
    np.testing.assert_allclose(model.predict(x, verbose=0), values(model(x)), atol=1e-5)


@every_layer
def test_gradients_reach_every_weight(cls, arguments, shape, expected):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(cls(**arguments)(inputs))))
    randomise(model)
    before = [values(w).copy() for w in model.trainable_variables]
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    model.fit(draw(4, *shape), draw(4, 1), epochs=2, batch_size=4, verbose=0)
    for weight, old in zip(model.trainable_variables, before):
        if weight.path.endswith("key/bias"):
            continue  # adding one vector to all keys shifts each row of logits: softmax does not see it
        assert np.isfinite(values(weight)).all() and not np.array_equal(values(weight), old), weight.path


@pytest.mark.parametrize("make", [
    lambda: Patches(0), lambda: Patches(4.0), lambda: Patches(5)(draw(1, 16, 16, 1)), lambda: Patches(4)(draw(1, 16, 16)),
    lambda: Patches(4)(keras.Input((None, 16, 1))), lambda: unpatch(draw(1, 4, 16), 4, 8, 12), lambda: unpatch(draw(1, 4, 16), 4, 9, 8),
    lambda: sinusoidal_positions(4, 7), lambda: sinusoidal_positions(0, 8), lambda: sinusoidal_positions_2d(2, 2, 6),
    lambda: PatchEncoder(16, 0), lambda: PatchEncoder(15, 4), lambda: PatchEncoder(16, 4, position="rotary"),
    lambda: PatchEncoder(16, 4, stem="resnet"), lambda: PatchEncoder(16, 12, stem="hierarchical"),
    lambda: PatchEncoder(18, 16, stem="hierarchical"), lambda: PatchEncoder(18, 16, position="sinusoidal_2d"),
    lambda: PatchEncoder(16, 2, stem="hierarchical"), lambda: PatchEncoder(16, 5)(draw(1, 16, 16, 1)),
    lambda: SelfAttention(0), lambda: patch_importance(draw(3, 3)), lambda: MultiHeadSelfAttention(16, 3), lambda: MultiHeadSelfAttention(16, 0),
    lambda: FeedForward(0), lambda: FeedForward(4, mlp_ratio=0.1), lambda: FeedForward(4, dropout=1.0),
    lambda: TransformerBlock(16, 5), lambda: TransformerBlock(16, 2.0), lambda: TransformerBlock(16, 2, mlp_ratio=0),
    lambda: TransformerBlock(16, 2, dropout=-0.1), lambda: TransformerBlock(16, 2)(draw(1, 6, 8)),
    lambda: LesionPooling(0), lambda: LesionPooling(2.0), lambda: LesionPooling(2)(draw(1, 6, 8)), lambda: LesionPooling(2)(keras.Input((None, 8))),
    lambda: ViTConfig(splits=0), lambda: ViTConfig(splits=3, pool="lesion"), lambda: ViTConfig(splits=2, pool="mean"),
])
def test_wrong_arguments_say_what_they_received(make):
    with pytest.raises(ValueError, match="Received"):
        make()


# --- patches ----------------------------------------------------------------------------------------------------------
def test_patches_hold_the_pixels_in_reading_order():
    images = draw(2, *IMAGE)
    patches = values(Patches(8)(images))
    np.testing.assert_array_equal(patches[1, 7].reshape(8, 8, 2), images[1, 8:16, 8:16])
    np.testing.assert_array_equal(values(unpatch(patches, 8, 32, 48, 2)), images)


def test_a_patch_of_the_whole_image_and_of_one_pixel():
    images = draw(1, 4, 4, 1)
    np.testing.assert_array_equal(values(Patches(4)(images)), images.reshape(1, 1, 16))
    np.testing.assert_array_equal(values(Patches(1)(images)), images.reshape(1, 16, 1))


# --- position ---------------------------------------------------------------------------------------------------------
def test_sinusoidal_positions_are_the_two_formulas():
    codes = sinusoidal_positions(5, 6)
    for position in range(5):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert codes[position, 2 * i] == pytest.approx(np.sin(angle), abs=1e-6)
            assert codes[position, 2 * i + 1] == pytest.approx(np.cos(angle), abs=1e-6)


def test_sinusoidal_positions_2d_split_row_and_column():
    codes = sinusoidal_positions_2d(3, 4, 8).reshape(3, 4, 8)
    np.testing.assert_array_equal(codes[2, :, :4], np.tile(sinusoidal_positions(3, 4)[2], (4, 1)))
    np.testing.assert_array_equal(codes[:, 3, 4:], np.tile(sinusoidal_positions(4, 4)[3], (3, 1)))


def test_conv_embedding_is_a_matrix_product_of_the_patches():
    images, layer = draw(2, *IMAGE), PatchEncoder(16, 8)
    tokens = values(layer(images))
    kernel, bias = (values(w) for w in layer.stages[0].weights)
    expected = values(Patches(8)(images)) @ kernel.reshape(-1, 16) + bias + sinusoidal_positions(24, 16)
    np.testing.assert_allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize("stem", ["conv", "hierarchical"])
def test_equal_patches_get_equal_vectors_and_see_nothing_else(stem):
    layer = PatchEncoder(16, 16, position="none", stem=stem)
    images = draw(1, 32, 32, 1)
    images[0, 16:, 16:] = images[0, :16, :16]
    before = values(layer(images))[0]
    np.testing.assert_allclose(before[0], before[3], atol=1e-6)
    images[0, 16:, 16:] = 0
    after = values(layer(images))[0]
    np.testing.assert_allclose(after[:3], before[:3], atol=1e-6)
    assert np.abs(after[3] - before[3]).max() > 0.01


def test_position_is_added_to_the_embedding():
    images = draw(1, *IMAGE)
    for position, codes in [("sinusoidal", sinusoidal_positions(6, 16)), ("sinusoidal_2d", sinusoidal_positions_2d(2, 3, 16))]:
        layer = PatchEncoder(16, 16, position=position)
        np.testing.assert_allclose(values(layer(images)) - values(layer.embed(images)), codes[None], atol=1e-5)


# --- attention --------------------------------------------------------------------------------------------------------
def test_scaled_dot_product_attention_is_the_formula():
    query, key, value = draw(2, 3, 5, 4), draw(2, 3, 7, 4, seed=1), draw(2, 3, 7, 6, seed=2)
    output, scores = scaled_dot_product_attention(query, key, value)
    expected, expected_scores = attend(query, key, value)
    np.testing.assert_allclose(values(output), expected, atol=1e-5)
    np.testing.assert_allclose(values(scores), expected_scores, atol=1e-5)


def test_softmax_survives_half_precision():
    query = ops.cast(300 * draw(1, 4, 64), "float16")
    output, scores = scaled_dot_product_attention(query, query, query)
    assert np.isfinite(values(output)).all()
    np.testing.assert_allclose(values(scores).astype("float32").sum(-1), 1, atol=1e-2)


def test_patch_importance_is_the_column_sum_of_the_mean_head():
    scores = softmax(draw(2, 5, 3, 4, 4))
    importance = values(patch_importance(scores))
    np.testing.assert_allclose(importance, scores.mean(2).sum(-2), atol=1e-5)
    np.testing.assert_allclose(importance.sum(-1), 4, atol=1e-4)
    np.testing.assert_allclose(values(patch_importance(scores[0, 0])), importance[0, 0], atol=1e-6)


def test_self_attention_is_the_formula():
    tokens, layer = draw(2, *TOKENS), SelfAttention(16)
    layer.build(tokens.shape)
    randomise(layer)
    output, scores = layer(tokens, return_attention_scores=True)
    query, key, value = (tokens @ values(d.kernel) + values(d.bias) for d in (layer.query, layer.key, layer.value))
    expected, expected_scores = attend(query, key, value)
    np.testing.assert_allclose(values(output), expected, atol=1e-4)
    np.testing.assert_allclose(values(scores), expected_scores, atol=1e-4)


def test_multi_head_equals_keras():
    tokens, mine, keras_layer = draw(2, *TOKENS), MultiHeadSelfAttention(16, 4), keras.layers.MultiHeadAttention(4, 4)
    mine.build(tokens.shape), keras_layer.build(tokens.shape, tokens.shape)
    randomise(keras_layer)
    for target, source in zip(mine.weights, keras_layer.weights):
        target.assign(ops.reshape(source, target.shape))
    output, scores = mine(tokens, return_attention_scores=True)
    expected, expected_scores = keras_layer(tokens, tokens, return_attention_scores=True)
    np.testing.assert_allclose(values(output), values(expected), atol=1e-5)
    np.testing.assert_allclose(values(scores), values(expected_scores), atol=1e-5)


def test_block_is_the_formula():
    tokens, block = draw(2, *TOKENS), TransformerBlock(16, 4)
    block.build(tokens.shape)
    randomise(block)
    output, scores = block(tokens, return_attention_scores=True)
    weights = [values(w) for w in block.attention.weights]
    x = layer_norm(tokens, block.attention_norm)
    query, key, value = (np.einsum("bnd,dhk->bhnk", x, weights[i]) + weights[i + 1][:, None] for i in (0, 2, 4))
    heads, expected_scores = attend(query, key, value)
    x = tokens + np.einsum("bhnk,hkd->bnd", heads, weights[6]) + weights[7]
    widen, narrow = block.feed_forward.widen, block.feed_forward.narrow
    hidden = layer_norm(x, block.feed_forward_norm) @ values(widen.kernel) + values(widen.bias)
    expected = x + gelu(hidden) @ values(narrow.kernel) + values(narrow.bias)
    np.testing.assert_allclose(values(scores), expected_scores, atol=1e-4)
    np.testing.assert_allclose(values(output), expected, atol=2e-3)


@every_attention
def test_scores_come_out_eagerly_symbolically_and_after_reload(cls, arguments, scores_shape, tmp_path):
    inputs = keras.Input(TOKENS)
    outputs = cls(**arguments, name="layer")(inputs, return_attention_scores=True)
    assert [tuple(x.shape) for x in outputs] == [(None, *TOKENS), (None, *scores_shape)]
    model = keras.Model(inputs, outputs)
    randomise(model)
    x = draw(3, *TOKENS)
    tokens, scores = (values(y) for y in model(x))
    np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(values(model.get_layer("layer")(x)), tokens, atol=1e-4)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(values(again(x)[1]), scores, atol=1e-6)
    np.testing.assert_allclose(again.predict(x, verbose=0)[1], scores, atol=1e-5)


@every_attention
def test_masked_tokens_are_not_looked_at(cls, arguments, scores_shape):
    layer, tokens = cls(**arguments), draw(2, *TOKENS)
    mask = np.array([[True] * 4 + [False] * 2, [True] * 6])
    output, scores = (values(x) for x in layer(tokens, mask=mask, return_attention_scores=True))
    assert np.abs(scores[0, ..., :4, 4:]).max() == 0
    short = values(layer(tokens[:1, :4]))
    np.testing.assert_allclose(output[0, :4], short[0], atol=1e-5)
    np.testing.assert_allclose(values(layer(tokens, mask=mask))[0, :4], short[0], atol=1e-5)
    np.testing.assert_allclose(output[1], values(layer(tokens[1:]))[0], atol=1e-5)


@every_attention
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_masks_travel_through_a_model(cls, arguments, scores_shape, policy):
    inputs = keras.Input(TOKENS)
    x = keras.layers.Masking(0.0, dtype=policy)(inputs)
    for _ in range(2):
        x = cls(**arguments, dtype=policy)(x)
    x = keras.layers.GlobalAveragePooling1D(dtype=policy)(x)
    model = keras.Model(inputs, x)
    tokens = draw(1, *TOKENS)
    tokens[:, 4:] = 0
    padded, short = values(model(tokens)), values(keras.models.clone_model(model, keras.Input((4, 16)), clone_function=lambda layer: layer)(tokens[:, :4]))
    np.testing.assert_allclose(padded, short, atol=1e-5 if policy == "float32" else 2e-2)


def test_dropout_works_in_training_only():
    block, tokens = TransformerBlock(16, 4, dropout=0.5), draw(1, *TOKENS)
    calm, again, shaken = (values(block(tokens, training=training)) for training in (False, None, True))
    np.testing.assert_array_equal(calm, again)
    assert np.abs(shaken - calm).max() > 0.01


def test_masks_are_the_same_on_every_backend_and_look_random():
    assert values(keep_mask((1, 2), (12,), 0.5)).tolist() == KNOWN_MASK
    masks = np.stack([values(keep_mask((3, step), (40, 300), 0.1)) for step in range(6)]).reshape(6, -1)
    error = np.sqrt(0.1 * 0.9 / masks.shape[1])
    assert np.abs(masks.mean(1) - 0.9).max() < 5 * error
    pairs = [(masks[i], masks[j]) for i in range(6) for j in range(i)] + [(masks[0, :-lag], masks[0, lag:]) for lag in (1, 2, 3, 64, 128, 299, 300, 301, 600)]
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in pairs]
    assert np.abs(correlation).max() < 5 / np.sqrt(masks.shape[1])


def test_quick_dropout_drops_scales_and_moves_on():
    layer, ones = QuickDropout(0.25, seed=1), np.ones((50, 7, 40), "float32")
    first, second = (values(layer(ones, training=True)) for _ in range(2))
    assert set(np.unique(first).tolist()) == {0.0, np.float32(1 / 0.75).item()} and (first != second).any()
    assert abs(first.mean() - 1) < 0.02
    np.testing.assert_array_equal(values(QuickDropout(0.25, seed=1)(ones, training=True)), first)
    np.testing.assert_array_equal(values(layer(ones)), ones)
    np.testing.assert_array_equal(values(QuickDropout(0.0)(ones, training=True)), ones)
    same_for_all_tokens = values(QuickDropout(0.5, noise_shape=(None, 1, None))(ones, training=True))
    assert (same_for_all_tokens == same_for_all_tokens[:, :1]).all()
    assert values(QuickDropout(0.25, dtype="mixed_float16")(ones, training=True)).dtype == "float16"


def test_quick_dropout_learns_with_batches_of_any_size():
    model = keras.Sequential([keras.Input((5,)), QuickDropout(0.5), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    losses = [float(model.train_on_batch(np.ones((size, 5), "float32"), np.zeros((size, 1)))) for size in (4, 3)]
    assert np.isfinite(losses).all()


# --- pooling ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_lesion_pooling_is_the_formula(splits):
    layer, tokens = LesionPooling(splits), draw(2, 4, 8)
    layer.build(tokens.shape)
    randomise(layer)
    logits = tokens @ values(layer.score.kernel) + values(layer.score.bias)
    result = layer(tokens)
    weights = softmax(logits.reshape(2, -1)).reshape(logits.shape).sum(-1)
    expected = np.concatenate([tokens.mean(1), (weights[..., None] * tokens).sum(1)], axis=1)
    np.testing.assert_allclose(values(result["pooled"]), expected, atol=1e-5)
    squares = values(Patches(splits)(values(result["scores"]).reshape(2, 2 * splits, 2 * splits, 1)))
    np.testing.assert_allclose(squares, logits, atol=1e-5)  # cut like an image, the scores lie patch by patch again


@pytest.mark.parametrize("splits", [1, 2])
def test_lesion_pooling_does_not_look_at_masked_tokens(splits):
    layer, tokens = LesionPooling(splits), draw(1, 4, 8)
    mask = np.array([[True, True, False, True]])
    other = np.where(mask[..., None], tokens, 7.0)
    np.testing.assert_allclose(values(layer(tokens, mask=mask)["pooled"]), values(layer(other, mask=mask)["pooled"]), atol=1e-6)
    assert np.abs(values(layer(tokens)["pooled"]) - values(layer(tokens, mask=mask)["pooled"])).max() > 0.01


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_lesion_pooling_comes_back(policy, tmp_path):
    inputs = keras.Input((4, 8))
    model = keras.Model(inputs, LesionPooling(2, dtype=policy, name="pool")(inputs))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("pool").get_config() == model.get_layer("pool").get_config() and again.get_layer("pool").splits == 2
    for name, value in model(draw(3, 4, 8)).items():
        np.testing.assert_array_equal(values(again(draw(3, 4, 8))[name]), values(value))
    assert value.shape == (3, 16) and "float32" in str(value.dtype)


def test_one_score_per_patch_can_start_several(tmp_path):
    config = dict(image_size=32, patch_size=8, d_model=16, num_blocks=1, num_heads=2, pool="lesion")
    coarse, fine, wider = (build_vit(ViTConfig(**config | more)) for more in ({}, {"splits": 2}, {"splits": 2, "d_model": 32}))
    coarse.save(tmp_path / "coarse.keras")
    before, after = (predict_outputs(model, np.abs(draw(2, 32, 32, 1))) for model in (coarse, copy_weights(fine, tmp_path / "coarse.keras")))
    np.testing.assert_allclose(after["logit"], before["logit"], atol=1e-5)
    np.testing.assert_allclose(after["lesion"].reshape(2, 8, 8), before["lesion"].reshape(2, 4, 4).repeat(2, axis=1).repeat(2, axis=2), atol=1e-6)
    fine.save(tmp_path / "fine.keras")
    for model, file in ((wider, "coarse.keras"), (coarse, "fine.keras")):
        with pytest.raises(InputError, match="another model"):
            copy_weights(model, tmp_path / file)


@pytest.mark.skipif(OTHER, reason="this is the run on the other backend")
def test_all_of_this_on_the_other_backend():
    other = {"tensorflow": "jax", "jax": "tensorflow"}[keras.backend.backend()]
    pytest.importorskip(other, reason=f"{other} is not installed")
    environment = {**os.environ, "KERAS_BACKEND": other, "BRAIN_VIT_OTHER_BACKEND": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
