"""Which way of fine-tuning the bundled weights is best, what choosing it costs, and how many real images it takes.

    BRAIN_VIT_DATA=../brain_tumor_dataset python benchmarks/finetune.py [--repeats 1] [--variants "learning rate 3e-4,layer decay 0.7"] [--sizes 25,50]

Nested folds on the 253 real images: in every turn each variant learns from the training part; the variant with the lowest loss on
the validation part answers as "chosen". No variant is ever chosen by a test image. For the learning curve the first variant learns
from so many images of the training part; the validation part stays whole. Finished turns are kept in --work, under names that
change with the weights, the images and the settings. Writes finetune.json beside this file. About a quarter of an hour on two idle
cores.
"""
import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from joblib import Parallel, delayed

from brain_vit._base import sigmoid, write_json
from brain_vit.accuracy import classification_metrics
from brain_vit.baselines import Part, make_method
from brain_vit.calibration import calibrate
from brain_vit.crossvalidate import FoldStore, fold_key, make_folds, part_digest
from brain_vit.preprocess import load_dataset, preprocess_all

WEIGHTS = Path(__file__).parent.parent / "brain_vit" / "weights" / "small.keras"
VARIANTS = {
    "learning rate 3e-4": {}, "learning rate 1e-4": {"learning_rate": 1e-4}, "layer decay 0.7": {"layer_decay": 0.7},
    "label smoothing 0.1": {"label_smoothing": 0.1}, "phantoms 0.25": {"phantoms": 0.25}, "running average of the weights": {"average": 0.97},
    "no augmentation": {"augment": False}, "12 epochs": {"epochs": 12},
}
SIZES = (25, 50, 100)


def cross_entropy(labels, logits):
    "Mean over images."
    return float(np.mean(np.logaddexp(0, logits) - labels * logits))


def fewer(fold, size):
    "The fold with `size` images of its training part, or all; a smaller choice is part of a larger one."
    return fold if size is None else replace(fold, train=np.random.default_rng(fold.seed).permutation(fold.train)[:size])


def variant(name):
    "The way of fine-tuning as a method."
    method = make_method("small", start=WEIGHTS)
    return replace(method, settings={**method.settings, "training": replace(method.settings["training"], **VARIANTS[name])})


def turn(part, fold, name, store, key):
    "Validation and test logits of one variant in one turn, read from the store where they are there."
    result = store.load(key)
    if result is None:
        outputs = variant(name)(part.subset(fold.train), part.subset(fold.validation), part.subset(fold.test), fold.seed)
        result = {"validation": outputs.validation, "test": outputs.test}
        store.save(key, result)
    return result["validation"], result["test"]


def judged(labels, groups, turns):
    "Pooled metrics of turns (fold, validation logits, test logits), temperature from each turn's validation part."
    tested = np.concatenate([fold.test for fold, *_ in turns])
    probability = np.concatenate([sigmoid(test / calibrate(labels[fold.validation], validation)[0]) for fold, validation, test in turns])
    metrics = classification_metrics(labels[tested], probability, groups[tested], 0.5)
    return {"n": len(labels), "turns": len(turns),
            "validation_loss": float(np.mean([cross_entropy(labels[fold.validation], validation) for fold, validation, _ in turns])),
            **{name: metrics[name] for name in ("accuracy", "sensitivity", "specificity", "roc_auc", "expected_calibration_error")}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="turns at a time")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, joined by commas; the first one draws the learning curve")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of training images of the learning curve, joined by commas; may be empty")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="the file to write")
    parser.add_argument("--work", type=Path, default=Path("runs") / "finetune", help="folder of the finished turns")
    options = parser.parse_args()
    if not os.environ.get("BRAIN_VIT_DATA"):
        sys.exit("Set BRAIN_VIT_DATA to the folder with 'yes' and 'no'.")
    variants, sizes = options.variants.split(","), [int(size) for size in options.sizes.split(",") if size]
    if unknown := [name for name in variants if name not in VARIANTS]:
        parser.error(f"there is no variant '{unknown[0]}': choose from {', '.join(VARIANTS)}")
    image_set = load_dataset(os.environ["BRAIN_VIT_DATA"])
    part, labels, groups = Part(preprocess_all(image_set)[0], image_set.labels), image_set.labels, image_set.groups
    folds = make_folds(labels, groups, 5, options.repeats)
    seen = json.loads(WEIGHTS.with_suffix(".json").read_text())["images_seen"]
    first, store, content = variants[0], FoldStore(options.work), part_digest(part)
    tasks = [(fold, name, None) for fold in folds for name in variants] + [(fold, first, size) for fold in folds for size in sizes]
    jobs = [(part, fewer(fold, size), name) for fold, name, size in tasks]
    keys = [f"{fold.repeat}_{fold.number}_{name.replace(' ', '_')}_{fold_key(variant(name), content, fold)}" for _, fold, name in jobs]
    outputs = Parallel(n_jobs=options.jobs, verbose=5)(delayed(turn)(*job, store, key) for job, key in zip(jobs, keys))
    logits = {(fold.repeat, fold.number, name, size): output for (fold, name, size), output in zip(tasks, outputs)}

    def best(fold):
        return min(variants, key=lambda name: cross_entropy(labels[fold.validation], logits[fold.repeat, fold.number, name, None][0]))

    def row(names, size=None):
        return judged(labels, groups, [(fold, *logits[fold.repeat, fold.number, name, size]) for fold, name in zip(folds, names)])

    choices = {**{name: [name] * len(folds) for name in variants}, "chosen": [best(fold) for fold in folds]}
    rows = {title: row(names) for title, names in choices.items()}
    curve = {str(size): row(choices[first], size) for size in sizes}
    for title, one in (rows | curve).items():
        print(f"{title:32} validation loss {one['validation_loss']:.3f}  accuracy {one['accuracy']['value']:.3f}  ROC-AUC {one['roc_auc']['value']:.3f}")
    report = {
        "protocol": f"5 grouped folds x {options.repeats} of the 253 images; accuracy at threshold 0.5 after temperature scaling on the validation part",
        "images_seen": seen, "variants": {name: VARIANTS[name] for name in variants}, "chosen": [str(name) for name in choices["chosen"]], "rows": rows}
    if sizes:
        report["training_images"] = {"images_seen": seen, "variant": first, "all": int(np.mean([len(fold.train) for fold in folds])),
                                     "rows": curve | {"all": rows[first]}}
    elif options.out.exists():  # the curve stays, with the weights it was measured from
        report["training_images"] = json.loads(options.out.read_text())["training_images"]
    write_json(options.out, report)


if __name__ == "__main__":
    main()
