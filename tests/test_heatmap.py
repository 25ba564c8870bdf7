"""Heatmaps by value: against NumPy, finite differences and models made to look at one place; on both backends."""
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from brain_vit import draw as drawing
from brain_vit import faithfulness as exam
from brain_vit import heatmap as maps_of
from brain_vit import views
from brain_vit._base import patch_means
from brain_vit.predict import Predictor
from brain_vit.vit import ViTConfig, attention_maps, build_vit, predict_outputs

OTHER = "BRAIN_VIT_OTHER_BACKEND" in os.environ  # this process is the run on the other backend, see the last test
TINY = dict(image_size=16, patch_size=4, d_model=8, num_blocks=2, num_heads=2, dropout=0.0)
every_pool = pytest.mark.parametrize("pool", ["mean", "lesion"])


def tiny(pool="mean", seed=0, scale=0.5):
    model = build_vit(ViTConfig(**TINY, pool=pool))
    generator = np.random.default_rng(seed)
    model.set_weights([scale * generator.normal(size=weight.shape).astype("float32") for weight in model.weights])
    return model


def draw(count=3, seed=1):
    return np.random.default_rng(seed).random((count, 16, 16, 1)).astype("float32")


def pixel_model(pixels):
    "A model whose tumor logit is the weighted sum of the pixels, with the layer names that the methods ask for."
    image = keras.Input((16, 16, 1), name="image")
    model = build_vit(ViTConfig(**TINY))
    flat = keras.layers.Flatten()(image)
    logit = keras.layers.Dense(1, use_bias=False, name="tumor")(flat)
    plain = keras.Model(image, {"tumor": logit})
    plain.get_layer("tumor").set_weights([pixels.reshape(-1, 1).astype("float32")])
    plain.get_layer = lambda name: model.get_layer(name)
    return plain


def test_upsampling_keeps_the_hottest_pixel_in_the_hottest_patch():
    generator = np.random.default_rng(0)
    for grid, size in ((8, 128), (8, 64), (4, 20), (4, 12), (8, 8), (2, 32)):
        values = generator.random((50, grid * grid))
        heats = drawing.upsample_patches(values, size)
        row, column = np.divmod(heats.reshape(50, -1).argmax(axis=1), size)
        assert np.array_equal(row // (size // grid) * grid + column // (size // grid), values.argmax(axis=1)), (grid, size)
        assert heats.shape == (50, size, size) and heats.max() <= 1 and heats.min() >= 0
        np.testing.assert_allclose(heats.max(axis=(1, 2)), values.max(axis=1), rtol=1e-6)
    assert np.ptp(drawing.upsample_patches(np.full((1, 16), 0.3), 32)) < 1e-6


def test_upsampling_has_no_steps():
    heats = drawing.upsample_patches(np.random.default_rng(0).random((20, 64)), 128)
    assert max(np.abs(np.diff(heats, axis=axis)).max() for axis in (1, 2)) < 0.2


def test_a_peak_leans_towards_its_warmer_neighbor():
    values = np.zeros((1, 64))
    values[0, [26, 27]] = 1.0, 0.9
    row, column = np.divmod(drawing.upsample_patches(values, 128)[0].argmax(), 128)
    assert row in (55, 56) and 40 < column < 48


def test_attention_heat_is_the_column_sum_on_an_absolute_scale():
    model, images = tiny(), draw()
    scores = attention_maps(model, images)
    for block, head in ((0, None), (-1, None), (1, 1)):
        share = scores[block].sum(axis=2)
        share = share.mean(axis=1) if head is None else share[:, head]
        expected = np.maximum(1 - 1 / share, 0)
        heat = maps_of.attention_heat(model, images, block=block, head=head)
        np.testing.assert_allclose(heat, drawing.upsample_patches(expected, 16), atol=1e-5)


def test_rollout_by_hand():
    first = np.array([[[0.8, 0.2], [0.4, 0.6]], [[0.6, 0.4], [0.2, 0.8]]])  # two heads, mean [[.7, .3], [.3, .7]]
    second = np.array([[[1.0, 0.0], [1.0, 0.0]]] * 2)
    rollout = maps_of.attention_rollout(np.stack([first, second])[:, None])
    np.testing.assert_allclose(rollout[0], np.array([[1.0, 0.0], [0.5, 0.5]]) @ np.array([[0.85, 0.15], [0.15, 0.85]]))


def test_rollout_of_no_mixing_is_the_identity_and_rows_sum_to_one():
    np.testing.assert_allclose(maps_of.attention_rollout(np.eye(4)[None, None, None].repeat(3, 0))[0], np.eye(4))
    np.testing.assert_allclose(maps_of.attention_rollout(attention_maps(tiny(), draw())).sum(axis=-1), 1, atol=1e-5)


@every_pool
def test_the_probed_forward_is_the_model(pool):
    model, images = tiny(pool), draw()
    parts = maps_of.logit_gradients(model, images)
    np.testing.assert_allclose(parts["scores"], attention_maps(model, images), atol=1e-5)
    zeros = [np.zeros_like(parts["scores"]), np.zeros_like(parts["tokens"])]
    logit = keras.ops.convert_to_numpy(maps_of.probed_logit(model, images, *zeros)[0])
    np.testing.assert_allclose(logit, predict_outputs(model, images)["logit"], atol=1e-4)


@every_pool
def test_gradients_are_finite_differences(pool):
    model, images = tiny(pool), draw(2)
    parts = maps_of.logit_gradients(model, images)
    generator, step = np.random.default_rng(3), 1e-2
    for name, slot in (("score_gradients", 0), ("token_gradients", 1)):
        for _ in range(4):
            direction = generator.normal(size=parts[name].shape).astype("float32")
            direction /= np.linalg.norm(direction)
            ends = []
            for sign in (1, -1):
                probes = [np.zeros_like(parts["scores"]), np.zeros_like(parts["tokens"])]
                probes[slot] = sign * step * direction
                ends.append(keras.ops.convert_to_numpy(maps_of.probed_logit(model, images, *probes)[0]).sum())
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((parts[name] * direction).sum(), rel=0.03, abs=2e-3), name
    assert np.abs(parts["score_gradients"]).max() > 1e-3 and np.abs(parts["token_gradients"]).max() > 1e-3


def test_relevance_by_hand_and_through_the_model():
    scores, gradients = np.full((1, 1, 2, 2, 2), 0.5), np.zeros((1, 1, 2, 2, 2))
    gradients[0, 0, 0] = [[4, -4], [0, 2]]  # head 0; head 1 does not matter, negative gradients are dropped
    np.testing.assert_allclose(maps_of.relevance_rollout(scores, gradients)[0], [[2, 0], [0, 1.5]])
    model, images = tiny(), draw(5)
    parts = maps_of.logit_gradients(model, images)
    total = np.eye(16)
    for block in range(2):
        total = total + np.maximum(parts["scores"][block] * parts["score_gradients"][block], 0).mean(1) @ total
    excess = total.sum(axis=1) - 1
    heat = maps_of.relevance_heat(model, images, batch_size=2)
    np.testing.assert_allclose(heat, drawing.upsample_patches(excess / (1 + excess), 16), atol=1e-4)


def test_relevance_and_gradcam_belong_to_the_class():
    "The model whose answer is turned around shows another map; attention does not change."
    model, images = tiny(), draw()
    before = {method: maps_of.heatmap(model, images, method) for method in ("relevance", "gradcam", "attention")}
    tumor = model.get_layer("tumor")
    tumor.set_weights([-weight for weight in tumor.get_weights()])
    np.testing.assert_allclose(maps_of.heatmap(model, images, "attention"), before["attention"], atol=1e-6)
    for method in ("relevance", "gradcam"):
        assert np.abs(maps_of.heatmap(model, images, method) - before[method]).max() > 0.01, method


def test_gradcam_of_mean_pooling_is_the_evidence_of_each_token():
    model, images = tiny(), draw()
    tokens = maps_of.logit_gradients(model, images)["tokens"]
    evidence = np.maximum(tokens @ model.get_layer("tumor").get_weights()[0][:, 0], 0)
    heat = maps_of.gradcam_heat(model, images)
    np.testing.assert_allclose(heat, drawing.upsample_patches(evidence / (1 + evidence), 16), atol=1e-4)


def test_occlusion_finds_the_one_patch_a_model_looks_at():
    pixels = np.zeros((16, 16))
    pixels[4:8, 8:12] = np.indices((4, 4)).sum(0) % 2 - 0.5  # a chess board, which blurring takes away
    model, images = pixel_model(pixels), draw(2)
    images[:, 4:8, 8:12, 0] = np.indices((4, 4)).sum(0) % 2
    heat = maps_of.occlusion_heat(model, images)
    hidden = maps_of.hide_patches(images, np.arange(16)[None] == 6, maps_of.blurred(images, 2.0))
    drop = predict_outputs(model, images)["logit"] - predict_outputs(model, hidden)["logit"]
    expected = np.zeros((2, 16))
    expected[:, 6] = 1 - np.exp(-drop)
    assert (drop > 0.1).all()
    np.testing.assert_allclose(heat, drawing.upsample_patches(expected, 16), atol=1e-5)


def test_hide_patches_hides_these_and_no_others():
    images, hiding = draw(2), np.full((2, 16, 16, 1), 9, "float32")
    hidden = np.zeros((2, 16), bool)
    hidden[0, 5] = hidden[1, 12] = True
    result = maps_of.hide_patches(images, hidden, hiding)
    assert (result[0, 4:8, 4:8] == 9).all() and (result[1, 12:16, 0:4] == 9).all() and (result == 9).sum() == 32


@every_pool
def test_every_method_keeps_to_one_form(pool):
    model, images = tiny(pool), draw()
    for method in maps_of.HEATMAPS:
        if pool == "mean" and method.startswith("lesion"):
            with pytest.raises(maps_of.InputError):
                maps_of.heatmap(model, images, method)
            continue
        heat = maps_of.heatmap(model, images, method)
        assert heat.shape == (3, 16, 16) and heat.dtype == np.float32 and 0 <= heat.min() and heat.max() < 1.0001, method
        np.testing.assert_allclose(maps_of.heatmap(model, images[1:2], method)[0], heat[1], atol=1e-4, err_msg=method)
    with pytest.raises(ValueError, match="magic"):
        maps_of.heatmap(model, images, "magic")


def test_moving_goes_by_whole_pixels():
    images = draw()
    moved = views.move(images, 2, -3)
    assert np.array_equal(moved[0, 2:, :13], images[0, :14, 3:]) and not moved[0, :2].any() and not moved[0, :, 13:].any()
    assert np.array_equal(views.move(images, 0, 0), images)


def test_looking_back_undoes_looking_away_from_the_edges():
    images, edge = np.random.default_rng(0).random((2, 64, 64, 1)), views.step_of(64)
    assert edge == 3
    for view in views.VIEWS:
        seen = views.look(images, view)
        assert view == (0, 0, False) or not np.array_equal(seen, images)
        back = views.look_back(seen[..., 0], view)
        assert np.array_equal(back[:, edge:-edge, edge:-edge], images[:, edge:-edge, edge:-edge, 0])


def test_the_mean_of_six_views_is_not_damped_at_the_edges():
    images = np.random.default_rng(0).random((2, 64, 64, 1)).astype("float32")
    even = views.mean_heat(lambda seen: np.full(seen.shape[:3], 0.3), images)
    assert even.dtype == np.float32
    np.testing.assert_allclose(even, 0.3, rtol=1e-6)
    np.testing.assert_allclose(views.mean_heat(lambda seen: seen[..., 0], images), images[..., 0], atol=1e-6)


def test_patch_means_are_the_way_back():
    values = np.random.default_rng(0).random((3, 16))
    blocks = values.reshape(3, 4, 4).repeat(8, axis=1).repeat(8, axis=2)
    np.testing.assert_allclose(patch_means(blocks, 8), values, rtol=1e-6)


def test_the_answer_is_the_mean_over_six_views():
    model, images = tiny(), draw()
    apart = [predict_outputs(model, views.look(images, view))["logit"] for view in views.VIEWS]
    assert len(apart) == 6 and np.ptp(apart, axis=0).min() > 1e-3
    np.testing.assert_allclose(views.tumor_logits(model, images), np.mean(apart, axis=0), atol=1e-5)
    np.testing.assert_allclose(Predictor(model).probability(images), 1 / (1 + np.exp(-np.mean(apart, axis=0))), atol=1e-5)


def test_head_statistics_by_hand():
    itself, twin = np.eye(4), np.full((4, 4), 0.25)
    statistics = maps_of.head_statistics(np.stack([itself, twin])[None, None], patch_size=8)
    np.testing.assert_allclose(statistics["distance"], [[0, (0 + 8 + 8 + 8 * 2 ** 0.5) / 4]])
    np.testing.assert_allclose(statistics["diversity"], [0.75])


@pytest.mark.parametrize("shape", [(45, 64), (200, 130), (600, 800)])
def test_overlay_keeps_the_originals_pixels_and_size(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    heat = np.zeros(shape, "float32")
    picture = drawing.overlay(image, heat, "a caption")
    height, width = shape
    gap, strip = max(2, width // 100), picture.shape[0] - height
    assert picture.dtype == np.uint8 and strip > 0
    for left in (0, width + gap):  # without heat, the overlay shows the original, too
        assert np.array_equal(picture[strip:, left:left + width], np.repeat(image[..., None], 3, axis=2))


def gaps(strip):
    "Widths of the empty columns between the letters of a caption."
    inked = np.flatnonzero((strip.max(axis=-1) > 100).any(axis=0))
    return np.diff(inked) - 1


@pytest.mark.parametrize("width", [64, 128, 512])
def test_words_of_a_caption_stay_apart(width):
    image = np.zeros((width, width), np.uint8)
    joined, apart = (drawing.overlay(image, image * 0.0, text)[:-width] for text in ("llll", "ll ll"))
    assert gaps(apart).max() >= gaps(joined).max() + 3


def test_a_long_caption_goes_on_in_a_second_line():
    image = np.zeros((64, 64), np.uint8)
    short, long = (drawing.overlay(image, image * 0.0, text) for text in ("no", "no tumor detected, probability 0.50"))
    assert len(long) > len(short) + 10 and long.shape[1] == short.shape[1]
    words = "no tumor detected, probability 0.50".split()
    lines = drawing._wrapped(words, drawing._font(11), long.shape[1] - 8)
    assert " ".join(lines).split() == words and all(drawing._font(11).getlength(line) <= long.shape[1] - 8 for line in lines)


def test_overlay_scale_is_absolute_and_its_colours_are_ordered():
    image = np.zeros((100, 100), np.uint8)
    heats = [np.full((100, 100), value, "float32") for value in (0.1, 0.3, 0.45, 0.6, 0.8, 1.0)]
    gap = 2
    lightness = [float(drawing.overlay(image, heat)[-50, 100 + gap + 50] @ np.array([0.3, 0.6, 0.1])) for heat in heats]
    assert np.all(np.diff(lightness) > 5)
    bar = drawing.overlay(image, heats[0])[-100:, -3] @ np.array([0.3, 0.6, 0.1])
    assert bar[5] > 200 and bar[-5] < 20


def test_overlay_draws_the_contour_at_the_stated_heat():
    image, heat = np.full((100, 100), 50, np.uint8), np.zeros((100, 100), "float32")
    heat[30:60, 30:60] = 0.6
    plain, lined = (drawing.overlay(image, heat, contour=contour)[-100:, 102:202] for contour in (0.7, 0.5))
    assert not (plain == 255).all(axis=-1).any() and (lined[30, 40] == 255).all() and (lined[59, 40] == 255).all()
    assert np.array_equal(plain[45, 45], lined[45, 45])


def test_overlay_says_that_nothing_was_detected(monkeypatch):
    seen, image = [], np.zeros((64, 64), np.uint8)
    monkeypatch.setattr(drawing, "_with_caption", lambda picture, caption: seen.append(caption) or picture)
    for detected, caption in ((False, "p 0.10"), (False, ""), (False, "no tumor detected, p 0.1"), (True, "p 0.9"), (None, "p 0.1")):
        drawing.overlay(image, image * 0.0, caption, detected=detected)
    assert seen == ["no tumor detected, p 0.10", "no tumor detected", "no tumor detected, p 0.1", "p 0.9", "p 0.1"]


def test_deletion_hides_the_hottest_first_and_insertion_shows_them_first():
    "Patches worth 3, 2 and 1 logits: each portion of the curve falls (or rises) by what its patches are worth."
    chess, pixels = np.indices((4, 4)).sum(0) % 2 - 0.5, np.zeros((16, 16))
    images, worth = np.full((1, 16, 16, 1), 0.5, "float32"), {0: 3.0, 6: 2.0, 15: 1.0}
    for patch, value in worth.items():
        row, column = 4 * (patch // 4), 4 * (patch % 4)
        pixels[row:row + 4, column:column + 4] = chess * value
        images[0, row:row + 4, column:column + 4, 0] += chess
    model = pixel_model(pixels)
    blurred = maps_of.blurred(images, 2.0)
    lost = {patch: predict_outputs(model, images)["logit"][0] - predict_outputs(model, maps_of.hide_patches(images, np.arange(16)[None] == patch, blurred))["logit"][0]
            for patch in worth}
    order = np.zeros(16)
    order[[0, 6, 15]] = 0.9, 0.6, 0.3
    heats = order.reshape(1, 4, 4).repeat(4, axis=1).repeat(4, axis=2)
    logit = lambda p: np.log(p / (1 - p))
    answer = lambda seen: predict_outputs(model, seen)["probability"]
    falls = -np.diff(logit(exam.deletion_curves(answer, images, heats, 4, steps=16)))[0]
    np.testing.assert_allclose(falls[:4], [lost[0], lost[6], lost[15], 0], atol=1e-3)
    rises = np.diff(logit(exam.deletion_curves(answer, images, heats, 4, steps=16, insert=True)))[0]
    np.testing.assert_allclose(rises, falls, atol=1e-3)
    wrong = exam.curve_area(exam.deletion_curves(answer, images, 1 - heats, 4, steps=16))
    assert exam.curve_area(exam.deletion_curves(answer, images, heats, 4, steps=16)) < wrong


def test_curve_area_energy_and_precision_by_hand():
    np.testing.assert_allclose(exam.curve_area(np.array([[1.0, 0.5, 0.0], [1, 1, 1]])), [0.5, 1])
    masks = np.zeros((2, 8, 8), bool)
    masks[:, :4, :4] = True
    heats = np.zeros((2, 8, 8))
    heats[0, :4] = 2.0
    np.testing.assert_allclose(exam.lesion_energy(heats, masks), [0.5, 0])
    heats[:, :4, :4], heats[0, :4, 4:], heats[1, :4, 4:] = 0.5, 0.9, 0.1
    np.testing.assert_allclose(exam.patch_precision(heats, masks, 4), [0.5, 1])
    np.testing.assert_allclose(exam.patch_precision(heats, masks & False, 4), [0, 0])  # a lesion outside of what the model sees


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr
    first, second = np.random.default_rng(0).random((2, 5, 30))
    second[0], second[1, :10] = 1.0, 0.5
    expected = [0] + [spearmanr(*pair).statistic for pair in list(zip(first, second))[1:]]
    np.testing.assert_allclose(exam.rank_correlation(first, second), expected, atol=1e-9)


def test_summaries_and_hit_rates():
    summary = exam.summarize(np.array([True] * 9 + [False]))
    assert summary["value"] == 0.9 and summary["interval"][0] == pytest.approx(0.596, abs=1e-3) and summary["n"] == 10
    mean = exam.summarize(np.linspace(0, 1, 101))
    assert mean["interval"][0] == pytest.approx(0.443, abs=0.01) and exam.summarize(np.array([]))["interval"] is None
    rows = exam.hit_rates([True, False, True, True], np.array([0.1, 0.2, 0.9, np.nan]), (0.2,))
    assert [(row["from"], row["to"], row["n"], row["value"]) for row in rows] == [(None, 0.2, 1, 1.0), (0.2, None, 2, 0.5)]
    assert "from 0.2" in exam.hits_table(rows, "size") and "to 0.2" in exam.hits_table(rows, "size")


def test_the_sanity_check_leaves_out_what_all_maps_of_a_method_share():
    generator, border = np.random.default_rng(0), np.repeat([0.0, 5.0], 32)
    own, other = generator.random((2, 40, 64))
    shared = exam.sanity_check(own + border, other + border)
    assert abs(shared["sanity"].mean()) < 0.1 and shared["sanity_plain"].mean() > 0.6
    survived = exam.sanity_check(own + border, own + border)  # a map that does not depend on the weights
    assert survived["sanity"].mean() > 0.99
    flat = exam.sanity_check(own, np.zeros_like(own))
    assert not flat["sanity"].any() and not flat["sanity_plain"].any()


def test_the_exam_of_a_tiny_model():
    model, images = tiny("lesion"), draw(4)
    masks = np.zeros((4, 16, 16), bool)
    masks[:, 4:9, 4:9] = True
    report = exam.faithfulness(model, images, masks, methods=["lesion", "relevance", "random"], steps=2, sanity=2)
    assert report["lesion"]["sanity"]["n"] == report["lesion"]["sanity_plain"]["n"] == 2 and "sanity" not in report["random"]
    assert all(row["pointing"]["n"] == 4 and len(row["energy"]["each"]) == 4 for row in report.values())
    lines = exam.faithfulness_table(report).splitlines()
    assert len(lines) == 5 and len(set(map(len, lines))) == 1
    before = maps_of.heatmap(model, images, "relevance")
    other = exam.randomized(model)
    assert np.abs(maps_of.heatmap(other, images, "relevance") - before).max() > 1e-3
    np.testing.assert_array_equal(maps_of.heatmap(model, images, "relevance"), before)


def test_size_and_contrast_of_a_disc_by_hand():
    image, mask = np.zeros((1, 64, 64, 1), "float32"), np.zeros((1, 64, 64), bool)
    image[0, 12:52, 12:52], mask[0, 20:30, 20:30] = 0.4, True
    image[0, 20:30, 20:30] = 0.9
    assert exam.lesion_size(image, mask)[0] == pytest.approx(100 / 1600, rel=0.01)
    assert exam.lesion_contrast(image, mask)[0] == pytest.approx(0.5, abs=1e-6)


def test_equal_values_claim_no_certainty():
    assert exam.summarize(np.array([0.53]))["interval"] is exam.summarize(np.full(3, 0.5))["interval"] is None
    assert exam.summarize(np.array([True]))["interval"][0] < 0.5
    assert "0.53 " in exam.faithfulness_table({"lesion": {"energy": exam.summarize(np.array([0.53]))}})


def test_a_head_near_the_border_is_not_larger_than_it_is():
    image, mask = np.zeros((2, 64, 64, 1), "float32"), np.zeros((2, 64, 64), bool)
    image[0, 2:62, 2:62], image[1] = 0.4, 0.4
    image[0, 30:34, 30:34], mask[:, 20:30, 20:30] = 0, True  # a dark ventricle belongs to the head
    np.testing.assert_allclose(exam.lesion_size(image, mask), [100 / 3600, 100 / 4096])


def write_folder(folder, count=3):
    "`yes` with phantoms, `masks` with their lesions."
    from PIL import Image

    from brain_vit.phantom import Phantom
    for part in ("yes", "masks"):
        (folder / part).mkdir()
    for index in range(count):
        item = Phantom.easy(image_size=96).render(3, index, lesion=True)
        Image.fromarray(item.image).save(folder / "yes" / f"{index}.png")
        Image.fromarray(255 * item.mask.astype("uint8")).save(folder / "masks" / f"{index}.png")
    Image.fromarray(item.image).save(folder / "yes" / "without.png")


def test_score_folder_gives_the_whole_table(tmp_path):
    write_folder(tmp_path)
    predictor = Predictor(tiny("lesion"))
    scores = exam.score_folder(predictor, [tmp_path], tmp_path / "masks", steps=2)
    assert scores["n"] == 3 and [os.path.basename(path) for path in scores["skipped"]] == ["without.png"] and scores["failed"] == []
    assert list(scores["all"]) == ["lesion", "attention", "random"]
    for row in scores["all"].values():
        assert list(row) == ["pointing", "energy", "precision", "deletion", "insertion"]
        assert all(cell["n"] == 3 and len(cell["interval"]) == 2 for cell in row.values())
    for bins in scores["hit_rates"]["all"]["lesion"].values():
        assert sum(row["n"] for row in bins) == 3 and bins[0]["from"] is None
    assert "Infinity" not in json.dumps(scores) and "NaN" not in json.dumps(scores)
    with pytest.raises(exam.InputError, match="does not exist"):
        exam.score_folder(predictor, [tmp_path / "yes"], tmp_path / "nowhere")
    with pytest.raises(exam.InputError, match="No image has a mask"):
        exam.score_folder(predictor, [tmp_path / "masks"], tmp_path / "masks")


def test_score_folder_points_on_the_originals_pixels(tmp_path):
    "Heat on the lesion alone, drawn where the model sees it, is on the lesion of the original, too."
    from PIL import Image

    from brain_vit.preprocess import preprocess
    write_folder(tmp_path)
    predictor = Predictor(tiny("lesion"))
    seen = {}
    for path in sorted((tmp_path / "masks").iterdir()):
        image, frame = preprocess(np.asarray(Image.open(tmp_path / "yes" / path.name)), 16)
        seen[image.tobytes()] = frame.to_preprocessed(np.asarray(Image.open(path)) > 127).astype("float32")
    predictor.heat = lambda images, method: np.stack([seen.get(image.tobytes(), np.zeros((16, 16), "float32")) for image in images])
    row = exam.score_folder(predictor, [tmp_path / "yes"], tmp_path / "masks", steps=2)["all"]["lesion"]
    assert row["pointing"]["value"] == 1 and row["precision"]["value"] == 1 and row["energy"]["value"] > 0.4


def test_what_fails_is_kept_as_a_sentence_and_the_others_count(tmp_path):
    from PIL import Image
    write_folder(tmp_path)
    Image.new("L", (5, 5)).save(tmp_path / "masks" / "0.png")
    (tmp_path / "yes" / "broken.png").write_text("I am a text")
    scores = exam.score_folder(Predictor(tiny("lesion")), [tmp_path / "yes", tmp_path / "gone.png"], tmp_path / "masks", ["attention"], steps=2)
    errors = [failure["error"] for failure in scores["failed"]]
    assert scores["n"] == 2 and len(errors) == 3 and len(scores["skipped"]) == 1
    for words in ("own pixels", "broken.png", "gone.png"):
        assert sum(words in error for error in errors) == 1


def test_masks_find_their_images_by_place_then_by_stem(tmp_path):
    for name in ("masks/yes/a.png", "masks/other/a.png", "masks/b_mask.png", "masks/deep/c.tif", "masks/yes/d.png", "masks/yes/d.bmp", "masks/e/f.png", "masks/g/f.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    files = exam.mask_files(tmp_path / "masks")
    found = lambda name: (mask := exam.find_mask(tmp_path / name, tmp_path / "masks", files)) and mask.relative_to(tmp_path.resolve() / "masks").as_posix()
    assert found("yes/a.jpg") == "yes/a.png" and found("other/a.jpg") == "other/a.png"
    assert found("yes/b.jpg") == "b_mask.png" and found("yes/c.jpg") == "deep/c.tif" and found("yes/unknown.jpg") is None
    assert found("no/a.jpg") is None and found("masks/yes/a.png") is None
    for name in ("yes/d.jpg", "yes/f.jpg"):
        with pytest.raises(exam.InputError, match="more than one mask"):
            found(name)


def test_two_images_do_not_share_a_mask(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "0.png").write_bytes((tmp_path / "yes" / "1.png").read_bytes())
    scores = exam.score_folder(Predictor(tiny("lesion")), [tmp_path / "yes", tmp_path / "more"], tmp_path / "masks", ["attention"], steps=2)
    assert scores["n"] == 2 and len(scores["failed"]) == 2 and all("shares the mask" in failure["error"] for failure in scores["failed"])


@pytest.mark.skipif(OTHER, reason="this is the other backend already")
def test_on_the_other_backend():
    other = "tensorflow" if keras.backend.backend() == "jax" else "jax"
    pytest.importorskip(other)
    environment = {**os.environ, "KERAS_BACKEND": other, "BRAIN_VIT_OTHER_BACKEND": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    names = "rollout or finite or probed or relevance or gradcam or occlusion or every_method"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
