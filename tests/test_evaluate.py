"""Metrics against scikit-learn, intervals that keep their promise, folds that never split a group, and evaluations that survive a kill."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import cv2
import joblib
import numpy as np
import pytest
from sklearn import metrics as sk

from brain_vit._base import InputError
from brain_vit.accuracy import METRICS, classification_metrics, format_metric, group_weights, metrics_table, newcombe_interval, ranking_metrics, wilson_interval
from brain_vit.baselines import Method, Outputs, Part, hog_features, make_method
from brain_vit.calibration import choose_threshold, fit_temperature
from brain_vit.crossvalidate import Fold, FoldStore, check_split, fold_key, make_folds, part_digest, run_folds
from brain_vit.data import ImageSet, LazyImages
from brain_vit.evaluate import accuracy_difference, evaluate, pool_folds
from brain_vit.phantom import Phantom, phantom_dataset


def draw(n=200, seed=0, ties=False):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n)
    probabilities = 1 / (1 + np.exp(-(labels + generator.normal(size=n) - 0.5)))
    return labels, probabilities.round(1) if ties else probabilities


def blobs(n=60, seed=0, group_size=1):
    "Noise; images with tumor have a bright disc. Fast, learnable, and each image carries its index in its first pixels."
    generator = np.random.default_rng(seed)
    groups = np.arange(n) // group_size
    labels = generator.permutation(np.arange(groups.max() + 1) % 2)[groups]
    images = []
    for index, label in enumerate(labels):
        image = generator.integers(30, 90, (64, 64)).astype("uint8")
        cv2.circle(image, (32, 32), 30, 120, -1)
        if label:
            cv2.circle(image, tuple(int(c) for c in generator.integers(20, 44, 2)), 8, 230, -1)
        images.append(image)
    return ImageSet(images, labels, [f"{'yes' if label else 'no'}/{i}.png" for i, label in enumerate(labels)], groups, name="blobs")


# Metrics

@pytest.mark.parametrize("ties", [False, True])
def test_metrics_agree_with_scikit_learn(ties):
    labels, probabilities = draw(ties=ties)
    ours = classification_metrics(labels, probabilities, num_bootstrap=50)
    decisions = probabilities >= 0.5
    expected = {
        "accuracy": sk.accuracy_score(labels, decisions), "balanced_accuracy": sk.balanced_accuracy_score(labels, decisions),
        "sensitivity": sk.recall_score(labels, decisions), "specificity": sk.recall_score(labels, decisions, pos_label=0),
        "roc_auc": sk.roc_auc_score(labels, probabilities), "average_precision": sk.average_precision_score(labels, probabilities),
        "brier_score": sk.brier_score_loss(labels, probabilities),
    }
    assert {name: ours[name]["value"] for name in expected} == pytest.approx(expected)
    assert np.ravel(list(ours["confusion_matrix"].values())).tolist() == sk.confusion_matrix(labels, decisions).ravel().tolist()


def test_a_weight_of_two_is_an_image_twice():
    labels, probabilities = draw(60, ties=True)
    models = np.arange(60) % 3
    weights = np.random.default_rng(1).integers(0, 4, 60)
    once = ranking_metrics(labels, probabilities, weights[None].astype(float), models)
    repeated = [np.repeat(x, weights) for x in (labels, probabilities, models)]
    again = ranking_metrics(repeated[0], repeated[1], np.ones((1, weights.sum())), repeated[2])
    assert once["roc_auc"] == pytest.approx(again["roc_auc"]) and once["average_precision"] == pytest.approx(again["average_precision"])


def test_ranks_are_compared_within_a_model():
    labels, probabilities = draw()
    models = np.arange(200) % 4
    shifted = np.clip(probabilities * 0.2 + 0.2 * models, 0, 1)
    pairs = [(labels[models == m] == 1).sum() * (labels[models == m] == 0).sum() for m in range(4)]
    expected = np.average([sk.roc_auc_score(labels[models == m], probabilities[models == m]) for m in range(4)], weights=pairs)
    assert classification_metrics(labels, shifted, models=models, num_bootstrap=0)["roc_auc"]["value"] == pytest.approx(expected)


def test_calibration_error_by_hand():
    report = classification_metrics([1, 0, 1, 1], [0.62, 0.68, 0.91, 1.0], num_bootstrap=0)
    assert report["expected_calibration_error"]["value"] == pytest.approx(2 / 4 * abs(0.65 - 0.5) + 2 / 4 * abs(0.955 - 1))


@pytest.mark.parametrize("labels, probabilities", [
    ([1], [0.9]), ([0], [0.9]), ([1, 1, 1], [0.9, 0.8, 0.1]), ([0, 0], [0.5, 0.5]), ([0, 1], [0.5, 0.5]), ([0, 1, 0, 1], [0.0, 1.0, 0.0, 1.0]),
    ([0, 1], [1.0, 0.0]), ([0, 1] * 20, [0.7] * 40),
])
@pytest.mark.parametrize("grouped", [False, True])
def test_degenerate_cases_are_honest(labels, probabilities, grouped):
    groups = np.arange(len(labels)) // 2 if grouped else None
    report = classification_metrics(labels, probabilities, groups, num_bootstrap=200)
    json.loads(json.dumps(report, allow_nan=False))
    for name in METRICS:
        metric = report[name]
        if metric["value"] is not None and metric["interval"] is not None:
            low, high = metric["interval"]
            assert 0 <= low <= metric["value"] <= high <= 1, name
        if metric["value"] in (0, 1) and name in ("accuracy", "sensitivity", "specificity", "balanced_accuracy"):
            assert metric["interval"][1] - metric["interval"][0] > 0.02, f"{name} claims certainty"
    if len(set(labels)) < 2:
        assert report["roc_auc"]["value"] is report["balanced_accuracy"]["value"] is report["roc_auc"]["interval"] is None
    if len(set(labels)) == 2 and len(set(probabilities)) == 1:
        assert report["roc_auc"]["value"] == 0.5
    assert "None" not in metrics_table({"model": report})


def test_perfect_results_of_few_groups_stay_uncertain():
    labels = np.repeat([0, 1], 20)
    report = classification_metrics(labels, labels.astype(float), groups=np.arange(40) // 10)
    assert report["accuracy"]["interval"][0] < 0.52 and report["accuracy"]["method"] == "Wilson on groups"
    assert report["roc_auc"]["interval"][0] < 0.6 and report["average_precision"]["interval"] is None
    assert format_metric(report["average_precision"]) == "1.000"


@pytest.mark.parametrize("bad", [dict(labels=[0, 2]), dict(labels=[0]), dict(labels=[], probabilities=[]), dict(probabilities=[0.1, 1.2]), dict(probabilities=[0.1, np.nan]), dict(groups=[1])])
def test_bad_input_is_named(bad):
    with pytest.raises(InputError):
        classification_metrics(**{"labels": [0, 1], "probabilities": [0.1, 0.9], **bad})


def test_wilson_of_the_lecture():
    assert wilson_interval(24, 26) == pytest.approx([0.759, 0.979], abs=1e-3)


def test_newcombe_is_monotone_and_holds_the_value():
    intervals = np.array([newcombe_interval(value, 20, 15) for value in (0, 0.3, 0.5, 0.9, 1)])
    assert (np.diff(intervals, axis=0) >= 0).all() and (intervals[:, 0] <= (0, 0.3, 0.5, 0.9, 1)).all() and (intervals[:, 1] >= (0, 0.3, 0.5, 0.9, 1)).all()
    assert intervals[0][1] == pytest.approx(1 - intervals[4][0])


def test_intervals_hold_the_truth_as_often_as_they_say():
    "150 groups of one to three alike images; the truth from a very large set."
    generator = np.random.default_rng(0)
    def sample(count):
        truth = generator.integers(0, 2, count)
        evidence = truth * 1.5 + generator.normal(size=count) - 0.75
        groups = np.repeat(np.arange(count), generator.integers(1, 4, count))
        return truth[groups], 1 / (1 + np.exp(-1.5 * evidence[groups])), groups
    truth = classification_metrics(*sample(100_000), num_bootstrap=0)
    names = ("accuracy", "balanced_accuracy", "sensitivity", "roc_auc", "average_precision", "brier_score")
    held = {name: 0 for name in names}
    for _ in range(150):
        report = classification_metrics(*sample(150), num_bootstrap=300)
        for name in names:
            low, high = report[name]["interval"]
            held[name] += low <= truth[name]["value"] <= high
    assert all(0.87 * 150 <= count <= 150 for count in held.values()), held


def test_the_calibration_error_keeps_its_promise_too():
    "A calibrated model, a boasting one, a constant one; twins in pairs."
    generator = np.random.default_rng(0)
    def sample(count, scale, shift):
        logits = generator.normal(0.4, 1.3, count)
        labels = (generator.random(count) < 1 / (1 + np.exp(-logits))).astype(int)
        return np.repeat(labels, 2), np.repeat(1 / (1 + np.exp(-scale * logits - shift)), 2), np.repeat(np.arange(count), 2)
    for scale, shift in ((1, 0), (2.5, 0), (0, 0.4)):
        truth = classification_metrics(*sample(200_000, scale, shift), num_bootstrap=0)["expected_calibration_error"]["value"]
        intervals = [classification_metrics(*sample(150, scale, shift), num_bootstrap=200)["expected_calibration_error"]["interval"] for _ in range(60)]
        held = sum(low <= (0 if scale == 1 else truth) <= high for low, high in intervals)
        assert held >= 52, (scale, truth, held)
        assert scale != 2.5 or np.mean([low > 0 for low, _ in intervals]) > 0.8, "a boasting model is found out"


def test_twins_widen_the_interval_and_time_is_bounded():
    labels, probabilities = draw(253)
    start = time.perf_counter()
    alone = classification_metrics(labels, probabilities, groups=None)["roc_auc"]["interval"]
    assert time.perf_counter() - start < 3
    five = [np.repeat(x, 5) for x in (labels, probabilities, np.arange(253))]
    together = classification_metrics(*five)["roc_auc"]["interval"]
    naive = classification_metrics(*five[:2])["roc_auc"]["interval"]
    width = lambda interval: interval[1] - interval[0]
    assert width(together) == pytest.approx(width(alone), rel=0.15) and width(naive) < 0.6 * width(together)


def test_resamples_draw_whole_groups():
    groups = np.array([3, 3, 9, 9, 9, 4])
    weights = group_weights(groups, 500, np.random.default_rng(0))
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 2] == weights[:, 4]).all()
    assert (weights[:, [0, 2, 5]].sum(axis=1) == 3).all()


# Calibration

def test_temperature_is_found_and_stays_sane():
    generator = np.random.default_rng(0)
    honest = generator.normal(size=5000) * 2
    labels = (generator.random(5000) < 1 / (1 + np.exp(-honest))).astype(int)
    for factor in (0.3, 1, 4):
        assert fit_temperature(labels, factor * honest) == pytest.approx(factor, rel=0.1)
    assert fit_temperature([1, 1], [2.0, 3.0]) == 1 and fit_temperature([0, 1], [1.0, 1.0]) == 1
    for logits in ([-5.0, 5.0], [5.0, -5.0], [-np.inf, np.inf], [-1e9, 1e9], [-1e-9, 1e-9]):
        assert 0.05 <= fit_temperature([0, 1], logits) <= 20
    assert fit_temperature([0] * 10 + [1] * 10, [-1.0] * 10 + [1.0] * 10) > 0.2
    with pytest.raises(InputError):
        fit_temperature([0, 1], [np.nan, 1.0])


def test_threshold_moves_only_for_a_reason():
    generator = np.random.default_rng(0)
    for _ in range(50):
        labels, probabilities = draw(40, seed=int(generator.integers(1e6)))
        threshold = choose_threshold(labels, probabilities)
        assert 0 < threshold <= 1
    labels, probabilities = draw(2000)
    assert abs(choose_threshold(labels, probabilities) - 0.5) < 0.05
    shifted = probabilities / (probabilities + (1 - probabilities) * 20)
    moved = choose_threshold(labels, shifted)
    assert moved < 0.2 and sk.balanced_accuracy_score(labels, shifted >= moved) > sk.balanced_accuracy_score(labels, shifted >= 0.5) + 0.1
    assert choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]) == 0.5
    assert choose_threshold([0, 1], [0.4, 0.4]) == 0.5 and choose_threshold([1, 1], [0.1, 0.2]) == 0.5


# Folds

def test_no_group_is_ever_split():
    "Whatever the labels, groups and seeds: parts share no group, each image is a test once per repeat, folds stay stratified."
    generator, refused = np.random.default_rng(0), 0
    for seed in range(36):
        n = int(generator.integers(40, 200))
        groups = generator.integers(0, n // int(generator.integers(1, 4)), n)
        labels = generator.integers(0, 2, n) if seed % 3 == 0 else (generator.random(groups.max() + 1) < generator.uniform(0.2, 0.8)).astype(int)[groups]
        folds, repeats = int(generator.integers(2, 6)), int(generator.integers(1, 3))
        try:
            plan = make_folds(labels, groups, folds, repeats, seed)
        except InputError:
            refused += 1
            continue
        largest = np.bincount(groups).max()
        tested = np.zeros(n, int)
        for fold in plan:
            sides = [set(groups[part]) for part in (fold.train, fold.validation, fold.test)]
            assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
            assert len(fold.train) + len(fold.validation) + len(fold.test) == n
            assert set(labels[fold.train]) == set(labels[fold.validation]) == {0, 1}
            tested[fold.test] += 1
            for label in (0, 1):
                assert abs((labels[fold.test] == label).sum() - (labels == label).sum() / folds) <= largest + 1
        assert (tested == repeats).all()
        assert len({fold.seed for fold in plan}) == len(plan)
        again = make_folds(labels, groups, folds, repeats, seed)
        assert all(a.seed == b.seed and np.array_equal(a.train, b.train) and np.array_equal(a.test, b.test) for a, b in zip(plan, again))
    assert refused < 4


def test_a_leaking_split_is_refused_by_name(tmp_path):
    rows = [{"path": "a.png", "label": 1, "group": 3, "part": "train"}, {"path": "b.png", "label": 1, "group": 3, "part": "train"}, {"path": "c.png", "label": 0, "group": 5, "part": "test"}]
    assert check_split(rows) == {"3": "train", "5": "test"}
    (tmp_path / "split.csv").write_text("path,label,group,part\na.png,1,3,train\nc.png,0,5,test\nb.png,1,3,test\n")
    with pytest.raises(InputError, match=r"group 3 .*a\.png.*b\.png"):
        check_split(tmp_path / "split.csv")
    with pytest.raises(InputError, match="columns"):
        check_split([{"path": "a.png"}])


# Methods

seen = []


def spy(train, validation, test, seed, image_set=None):
    "Notes what it is given; answers by the mean of the image."
    seen.append((train, validation, test, seed))
    return Outputs(validation.images.mean(axis=(1, 2, 3)) * 20 - 5, test.images.mean(axis=(1, 2, 3)) * 20 - 5, heats=test.images[..., 0])


def test_a_method_never_sees_the_test_labels_or_a_twin_of_a_test_image():
    images = blobs(60, group_size=3)
    images.masks = [image > 200 for image in images.images]
    seen.clear()
    evaluate(images, [Method("spy", spy)], folds=4, progress=False)
    whole = {image.tobytes(): i for i, image in enumerate(np.concatenate([test.images for _, _, test, _ in seen]))}
    assert len(seen) == 4 and len(whole) == 60
    group_of = {}
    order = np.concatenate([fold.test for fold in make_folds(images.labels, images.groups, 4)])
    for i, image in enumerate(np.concatenate([test.images for _, _, test, _ in seen])):
        group_of[image.tobytes()] = images.groups[order[i]]
    for train, validation, test, _ in seen:
        assert test.labels is None and test.masks is None and train.masks is not None
        sides = [{group_of[image.tobytes()] for image in part.images} for part in (train, validation, test)]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_no_augmented_child_of_a_test_image_is_trained_on(monkeypatch):
    "Every image that augmentation touches during an evaluation of a network is one of the training part of that turn."
    import brain_vit.augment, brain_vit.baselines
    images = blobs(48, group_size=2)
    touched, turns, original, run = [], [], brain_vit.augment.augment_batch, brain_vit.baselines.train_network
    def note(batch, *arguments, **options):
        touched.extend(image.tobytes() for image in batch)
        return original(batch, *arguments, **options)
    def turn(train, validation, test, seed, **settings):
        touched.clear()
        outputs = run(train, validation, test, seed, **settings)
        turns.append((set(touched), *({image.tobytes() for image in part.images} for part in (train, validation, test))))
        return outputs
    monkeypatch.setattr(brain_vit.augment, "augment_batch", note)
    method = make_method("cnn", epochs=1)
    evaluate(images, [replace(method, function=turn, image_size=32)], folds=2, progress=False)
    assert len(turns) == 2
    for augmented, train, validation, test in turns:
        assert augmented == train and not augmented & (validation | test)


def test_a_small_transformer_is_evaluated_like_any_method():
    method = make_method("small", epochs=1)
    tiny = replace(method.settings["config"], image_size=32, d_model=16, num_blocks=1)
    method = replace(method, settings={**method.settings, "config": tiny}, image_size=32)
    report = evaluate(blobs(36), [method], folds=2, progress=False)["methods"]["small"]
    assert report["metrics"]["n"] == 36 and all(row["temperature"] > 0 for row in report["folds"])
    assert report["settings"]["training"]["TrainConfig"]["epochs"] == 1


def test_a_network_repeats_itself():
    images = blobs(24)
    part = Part(np.stack([cv2.resize(image, (32, 32)) for image in images.images])[..., None] / np.float32(255), images.labels)
    method, thirds = make_method("cnn", epochs=1), np.arange(24).reshape(3, 8)
    first, second = (method(*(part.subset(third) for third in thirds), seed=3) for _ in range(2))
    assert np.allclose(first.test, second.test, atol=1e-5) and not np.allclose(first.test, first.test[0])


def test_the_presets_differ_in_what_their_names_say():
    plain, lecture = make_method("lecture_plain"), make_method("lecture")
    assert not plain.settings["training"].augment and lecture.settings["training"].augment and plain.settings["config"] == lecture.settings["config"]
    assert make_method("small", start="w.keras", epochs=3).name == "small, pretrained"


@pytest.mark.parametrize("preset", ["small", "lecture", "lecture_plain", "cnn"])
def test_python_and_the_command_line_train_alike(preset, monkeypatch):
    import brain_vit.cli, brain_vit.evaluate
    from brain_vit.training import train_recipe
    given = []
    monkeypatch.setattr(brain_vit.evaluate, "_check_request", lambda image_set, methods, *rest: given.extend(methods))
    monkeypatch.setattr(brain_vit.evaluate, "make_folds", lambda *arguments: [])
    monkeypatch.setattr(brain_vit.evaluate, "run_folds", lambda *arguments: [])
    monkeypatch.setattr(brain_vit.evaluate, "_report", lambda *arguments: {})
    monkeypatch.setattr(brain_vit.evaluate, "summary", lambda report: "")
    monkeypatch.setattr(brain_vit.cli, "_load", lambda *arguments: blobs(1000))
    brain_vit.cli.evaluate("any", preset, start="scratch", suspect=None, out=None)
    evaluate(blobs(1000), [preset], progress=False)
    command, python = given
    assert command.name == python.name and command.settings["training"] == python.settings["training"] and command.settings["config"] == python.settings["config"]
    if preset == "small":
        assert (python.settings["config"], python.settings["training"]) == train_recipe("small", 1000)


def test_a_start_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "w.keras").write_bytes(b"nothing")
    with pytest.raises(InputError, match="w.keras"):
        evaluate(blobs(30), [make_method("lecture", epochs=1, start=str(tmp_path / "w.keras"))], folds=2, progress=False)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="hog"):
        make_method("oracle")


def test_hog_sees_the_direction_of_an_edge():
    image = np.zeros((1, 64, 64, 1), "float32")
    image[:, :, 24:] = 1
    assert not np.allclose(hog_features(image), hog_features(image.transpose(0, 2, 1, 3)))
    assert np.allclose(hog_features(image), hog_features(0.5 * image), atol=1e-2)


# Evaluations

def without_times(report):
    report = json.loads(json.dumps(report))
    for method in report["methods"].values():
        method.pop("seconds")
        [row.pop("seconds") for row in method["folds"]]
    return report


def test_the_most_frequent_class_is_what_it_should_be():
    images = blobs(60)
    images = images.subset(np.r_[np.flatnonzero(images.labels == 1), np.flatnonzero(images.labels == 0)[:15]])
    metrics = evaluate(images, ["majority"], progress=False)["methods"]["most frequent class"]["metrics"]
    assert metrics["accuracy"]["value"] == pytest.approx(30 / 45) and metrics["sensitivity"]["value"] == 1
    assert metrics["roc_auc"]["value"] == 0.5 and metrics["roc_auc"]["interval"] == [0.5, 0.5]


def test_two_jobs_and_another_backend_give_the_same_report():
    images = blobs(60, group_size=2)
    alone = without_times(evaluate(images, ["hog", "majority"], folds=3, progress=False))
    assert without_times(evaluate(images, ["hog", "majority"], folds=3, jobs=2, progress=False)) == alone

    class AllAtOnce(joblib._parallel_backends.ThreadingBackend):
        supports_return_generator = False

    joblib.register_parallel_backend("all at once", AllAtOnce)
    with joblib.parallel_config(backend="all at once", n_jobs=2):
        assert without_times(evaluate(images, ["hog", "majority"], folds=3, progress=False)) == alone


def test_repeats_do_not_multiply_images():
    images = blobs(60)
    once, thrice = (evaluate(images, ["hog"], repeats=repeats, progress=False)["methods"]["HOG + SVM"] for repeats in (1, 3))
    assert thrice["metrics"]["n"] == 60 and thrice["metrics"]["num_predictions"] == 180 and thrice["repeats"] == 3
    width = lambda report: np.ptp(report["metrics"]["brier_score"]["interval"])
    assert width(thrice) > 0.6 * width(once)


def test_the_folder_holds_everything(tmp_path):
    images = blobs(40, group_size=2)
    report = evaluate(images, [Method("spy", spy), make_method("majority", repeats=1), "metadata"], folds=4, repeats=2, out=tmp_path / "test", progress=False, suspects=[images.paths[0], images.paths[1]])
    files = {path.name for path in (tmp_path / "test").iterdir()}
    assert {"README.md", "metrics.json", "folds.csv", "predictions.csv", "split.csv", "errors.csv", "roc.png", "reliability.png", "confusion.png"} <= files
    assert [path.name for path in tmp_path.iterdir()] == ["test"]
    assert json.loads((tmp_path / "test" / "metrics.json").read_text()) == json.loads(json.dumps(report))
    assert report["skipped"] == {"file metadata only": "the set has no files"} and "left out" in (tmp_path / "test" / "README.md").read_text()
    assert report["methods"]["spy"]["metrics_without_suspects"]["n"] == 38 and report["methods"]["most frequent class"]["repeats"] == 1
    assert len((tmp_path / "test" / "predictions.csv").read_text().splitlines()) == 1 + 80 + 40
    assert len((tmp_path / "test" / "folds.csv").read_text().splitlines()) == 1 + 8 + 4
    with pytest.raises(InputError, match="exists"):
        evaluate(images, ["majority"], out=tmp_path / "test", progress=False)


def test_errors_are_listed_with_the_most_confident_first():
    images = ImageSet([None] * 4, [0, 0, 1, 1], list("abcd"), None)
    fold = lambda repeat, *part: Fold(repeat, 0, np.array([0]), np.array([1]), np.array(part), 0)
    answer = lambda part, probability: {"test": np.array(part), "probability": np.array(probability), "threshold": 0.5, "temperature": 1.0, "seconds": 0.0}
    pooled = pool_folds(images, [fold(0, 0, 2), fold(0, 1, 3), fold(1, 0, 1, 2, 3)],
                        [answer([0, 2], [0.1, 0.3]), answer([1, 3], [0.9, 0.8]), answer([0, 1, 2, 3], [0.2, 0.7, 0.6, 0.9])])
    assert [(row["path"], row["wrong"], row["of"], row["probability"]) for row in pooled["errors"]] == [("b", 2, 2, 0.8), ("c", 1, 2, 0.45)]
    assert pooled["metrics"]["accuracy"]["value"] == 5 / 8 and pooled["metrics"]["n"] == 4 and pooled["repeats"] == 2


def answers(train, validation, test, seed, says):
    "The same logit for everyone, and heats that tell which answer it was."
    logit = says[seed]
    return Outputs(np.full(len(validation.images), logit), np.full(len(test.images), logit), np.full(test.images.shape[:3], 0.25 if logit > 0 else 0.75))


def test_the_heat_of_a_mistake_is_that_of_a_wrong_turn(tmp_path, monkeypatch):
    "Half of the turns call everything tumor, the others nothing: each image is wrong once, and the heat tells when."
    import brain_vit.evaluate
    images, shown = blobs(20), []
    draw = brain_vit.evaluate.show_images

    def show(pictures, titles, heats, size):
        shown.extend((title.split("\n")[1].split(",")[0], float(heat.max())) for title, heat in zip(titles, heats or ()))
        return draw(pictures, titles, heats=heats, size=size)

    monkeypatch.setattr(brain_vit.evaluate, "show_images", show)
    for first in (1.0, -1.0):
        shown.clear()
        says = {fold.seed: first if fold.repeat else -first for fold in make_folds(images.labels, images.groups, 2, 2)}
        out = tmp_path / str(first)
        evaluate(images, [Method("two minds", answers, {"says": says}), "hog"], folds=2, repeats=2, out=out, progress=False)
        minds = [row for row in shown if row[1] in (0.25, 0.75)]
        assert len(minds) == 20 and set(minds) == {("tumor", 0.75), ("none", 0.25)}
        assert (out / "errors_two_minds.png").stat().st_size > 1000


@pytest.mark.parametrize("change, message", [
    (dict(methods=[]), "method"), (dict(methods=["hog", "hog"]), "name"), (dict(folds=1), "folds"), (dict(repeats=0), "repeat"),
    (dict(suspects=["yes/none.png"]), "none.png"), (dict(folds=40), "fewer folds"),
])
def test_requests_that_cannot_work_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        evaluate(**{"image_set": blobs(30), "methods": ["majority"], "progress": False, **change})


def test_one_label_is_refused():
    images = blobs(30)
    images.labels[:] = 1
    with pytest.raises(InputError, match="same label"):
        evaluate(images, ["majority"], progress=False)


def test_a_name_depends_on_everything_that_matters():
    images = blobs(30)
    part, plan = Part(np.stack(images.images)[..., None] / np.float32(255), images.labels), make_folds(images.labels, images.groups, 3)
    other = replace(part, labels=1 - images.labels)
    keys = {fold_key(make_method("hog"), part_digest(part), plan[0]), fold_key(make_method("hog"), part_digest(other), plan[0]),
            fold_key(make_method("hog"), part_digest(part), plan[1]), fold_key(make_method("majority"), part_digest(part), plan[0]),
            fold_key(replace(make_method("hog"), settings={"features": hog_features}), part_digest(part), plan[0])}
    assert len(keys) == 5


def benchmark(name):
    import importlib.util
    specification = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_fine_tuning_turns_of_other_weights_are_not_used_again(tmp_path, monkeypatch):
    finetune, images = benchmark("finetune"), blobs(30)
    fold = make_folds(images.labels, images.groups, 3)[0]
    keys = set()
    for content in (b"old", b"new"):
        (tmp_path / "small.keras").write_bytes(content)
        monkeypatch.setattr(finetune, "WEIGHTS", tmp_path / "small.keras")
        keys |= {fold_key(finetune.variant(name), "content", one) for name in finetune.VARIANTS for one in (fold, finetune.fewer(fold, 5))}
    assert len(keys) == 2 * 2 * len(finetune.VARIANTS)


def test_each_variant_of_the_ablation_changes_one_thing_and_the_lecture_three():
    from dataclasses import asdict
    from brain_vit.vit import build_vit
    ablation = benchmark("ablation")
    configs = {name: replace(ablation.BASE, **change) for name, change in ablation.VARIANTS.items()}
    assert len(set(configs.values())) == len(configs) and configs["patch_size 8"].num_patches == 256
    for name, config in configs.items():
        changed = asdict(config).items() - asdict(ablation.BASE).items()
        assert len(changed) == 3 if name == "lecture" else len(changed) <= 1
        assert build_vit(config).count_params() > 100_000


def test_a_name_depends_on_the_version_and_the_backend(monkeypatch):
    import brain_vit.crossvalidate
    images = blobs(30)
    fold = make_folds(images.labels, images.groups, 3)[0]
    key = lambda: fold_key(make_method("hog"), "content", fold)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    keys = {key(), key()}
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keys.add(key())
    monkeypatch.setattr(brain_vit.crossvalidate, "__version__", "0.0.1")
    assert len(keys | {key()}) == 3


def test_the_backend_is_known_without_loading_keras(tmp_path):
    "The same answer as Keras gives, from the environment, from its settings file, and by default."
    program = ("import sys; from brain_vit.crossvalidate import keras_backend; found = keras_backend(); assert 'keras' not in sys.modules; "
               "import keras; assert found == keras.backend.backend(); print(found)")
    clean = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"} | {"KERAS_HOME": str(tmp_path)}
    ask = lambda **change: subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=clean | change).stdout.strip()
    assert ask(KERAS_BACKEND="jax") == "jax"
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    assert ask() == "jax"
    (tmp_path / "keras.json").write_text("{}")
    assert ask() == "tensorflow"


def test_a_torn_file_is_run_again(tmp_path):
    images = blobs(40)
    part, plan = Part(np.stack(images.images)[..., None] / np.float32(255), images.labels), make_folds(images.labels, images.groups, 2)
    seen.clear()
    method, store = Method("spy", spy), FoldStore(tmp_path / "x.partial")
    first = run_folds([(method, part, fold) for fold in plan], store=store, progress=False)
    file = sorted((tmp_path / "x.partial").iterdir())[0]
    file.write_bytes(file.read_bytes()[:100])
    again = run_folds([(method, part, fold) for fold in plan], store=store, progress=False)
    assert len(seen) == 3 and all(np.array_equal(a["probability"], b["probability"]) for a, b in zip(first, again))


SLOW = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_evaluate import blobs
    from brain_vit.baselines import Method, make_method
    from brain_vit.evaluate import evaluate

    def slow(train, validation, test, seed):
        with open({log!r}, "a") as file:
            file.write("turn\\n")
        time.sleep({seconds})
        return make_method("hog")(train, validation, test, seed)

    evaluate(blobs(40), [Method("slow", slow)], folds=4, out={out!r}, progress=False)
"""


def test_a_killed_evaluation_goes_on_at_the_first_unfinished_fold(tmp_path):
    def start(name, seconds):
        script = SLOW.format(tests=str(Path(__file__).parent), log=str(tmp_path / f"{name}.log"), out=str(tmp_path / name), seconds=seconds)
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})
    turns = lambda name: len((tmp_path / f"{name}.log").read_text().splitlines())
    process = start("killed", 1.5)
    deadline = time.monotonic() + 90
    while len(list((tmp_path / "killed.partial").glob("*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    done = len(list((tmp_path / "killed.partial").glob("*.npz")))
    before = turns("killed")
    assert 2 <= done < 4
    assert start("killed", 0).wait() == 0 and turns("killed") - before == 4 - done
    assert start("whole", 0).wait() == 0 and not (tmp_path / "killed.partial").exists()
    reports = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("killed", "whole")]
    assert without_times(reports[0]) == without_times(reports[1])
    assert (tmp_path / "killed" / "predictions.csv").read_text() == (tmp_path / "whole" / "predictions.csv").read_text()


def test_a_paired_difference_is_narrower_than_two_intervals():
    images = blobs(60)
    part, plan = Part(np.stack(images.images)[..., None] / np.float32(255), images.labels), make_folds(images.labels, images.groups)
    results = run_folds([(make_method("hog"), part, fold) for fold in plan], progress=False)
    assert accuracy_difference(images.labels, images.groups, results, results)["interval"] is None
    guesses = run_folds([(make_method("majority"), part, fold) for fold in plan], progress=False)
    difference = accuracy_difference(images.labels, images.groups, results, guesses)
    right = lambda runs: np.mean(np.concatenate([run["decision"] == images.labels[run["test"]] for run in runs]))
    assert difference["value"] == pytest.approx(right(results) - right(guesses)) and difference["interval"][0] <= difference["value"] <= difference["interval"][1]


# The wrong protocols

def twin(image, generator):
    size = len(image)
    top, left = generator.integers(0, size // 16, 2)
    crop = image[top:top + size - size // 16, left:left + size - size // 16]
    return (cv2.resize(crop, (size, size)) * generator.uniform(0.8, 1.2) + generator.uniform(-10, 10)).clip(0, 255).astype("uint8")


def with_twins(image_set, share, seed):
    generator, n = np.random.default_rng(seed), len(image_set)
    parents = generator.choice(n, round(n * share / (1 - share)), replace=False)
    source = np.r_[np.arange(n), parents]
    images = [*image_set.images, *(twin(image_set.images[i], generator) for i in parents)]
    return ImageSet(images, image_set.labels[source], [f"{i}.png" for i in range(len(source))], image_set.groups[source])


def test_wrong_protocols_flatter():
    "30% planted near-duplicates: a random split scores higher than a grouped one, augmentation before the split higher still."
    phantoms = with_twins(phantom_dataset(110, seed=11, recipe=Phantom.full(image_size=64)), share=0.3, seed=1)
    enlarged = with_twins(phantoms, share=0.5, seed=2)
    accuracy = lambda image_set: evaluate(image_set, ["hog"], progress=False)["methods"]["HOG + SVM"]["metrics"]["accuracy"]["value"]
    grouped, random, augmented_first = accuracy(phantoms), accuracy(replace(phantoms, groups=None)), accuracy(replace(enlarged, groups=None))
    assert grouped + 0.05 < random < augmented_first and grouped + 0.2 < augmented_first
    assert accuracy(enlarged) < augmented_first - 0.05, "with its groups, the enlarged set flatters nobody"


def test_the_audit_and_the_metadata_method_agree(tmp_path):
    "The same columns, folds, seeds and classifier, so the same accuracy at threshold 0.5."
    from brain_vit.preprocess import load_dataset
    from brain_vit.review import audit
    generator = np.random.default_rng(0)
    for index, image in enumerate(phantom_dataset(60, seed=3, recipe=Phantom.easy(image_size=64)).images):
        label = index % 2
        place = tmp_path / ("yes" if label else "no") / f"{index}{'.png' if generator.random() < 0.3 + 0.4 * label else '.jpg'}"
        place.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(place), np.pad(image, int(generator.integers(0, 6))))
    probe = audit(tmp_path)["shortcuts"]["all metadata"]
    method = evaluate(load_dataset(tmp_path), ["metadata"], progress=False)["methods"]["file metadata only"]
    assert method["accuracy_at_half"]["value"] == pytest.approx(probe["accuracy"]) and probe["accuracy"] > 0.5


def test_a_forest_does_not_depend_on_the_order_of_rows():
    from brain_vit.review import random_forest
    generator = np.random.default_rng(0)
    table, labels, order = generator.integers(0, 4, (80, 3)).astype(float), generator.integers(0, 2, 80), generator.permutation(80)
    first, second = random_forest(5).fit(table, labels), random_forest(5).fit(table[order], labels[order])
    assert np.array_equal(first.predict_proba(table), second.predict_proba(table))
    assert not np.array_equal(first.predict_proba(table), random_forest(6).fit(table, labels).predict_proba(table))


# Real images

@pytest.mark.skipif(not os.environ.get("BRAIN_VIT_DATA"), reason="BRAIN_VIT_DATA names no folder of real images")
def test_a_real_set_end_to_end(tmp_path):
    from brain_vit.preprocess import load_dataset
    images = load_dataset(os.environ["BRAIN_VIT_DATA"])
    report = evaluate(images, ["majority", "metadata", "hog"], out=tmp_path / "test", progress=False)
    assert isinstance(images.images, LazyImages) and not report["skipped"]
    hog, guess = (report["methods"][name]["metrics"]["accuracy"]["value"] for name in ("HOG + SVM", "most frequent class"))
    assert hog > guess + 0.05 and report["methods"]["HOG + SVM"]["metrics"]["n"] == len(images)
    from brain_vit.review import audit
    probe = audit(os.environ["BRAIN_VIT_DATA"])["shortcuts"]["all metadata"]
    assert report["methods"]["file metadata only"]["accuracy_at_half"]["value"] == pytest.approx(probe["accuracy"])
