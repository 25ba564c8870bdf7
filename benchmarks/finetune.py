"""Which way of fine-tuning the bundled weights is best, and what choosing it costs: nested folds on the 253 real images.

    BRAIN_VIT_DATA=../brain_tumor_dataset python benchmarks/finetune.py [--repeats 1] [--jobs 2]

In every turn each variant learns from the training part; the variant with the lowest loss on the validation part answers as "chosen".
No variant is ever chosen by a test image. Finished turns are kept in --work. Writes finetune.json beside this file.
"""
import argparse
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
from brain_vit.crossvalidate import make_folds
from brain_vit.preprocess import load_dataset, preprocess_all

WEIGHTS = Path(__file__).parent.parent / "brain_vit" / "weights" / "small.keras"
VARIANTS = {"learning rate 3e-4": {}, "learning rate 1e-4": {"learning_rate": 1e-4}, "running average of the weights": {"average": 0.97}}


def cross_entropy(labels, logits):
    "Mean over images."
    return float(np.mean(np.logaddexp(0, logits) - labels * logits))


def turn(part, fold, name, file):
    "Validation and test logits of one variant in one turn, read from `file` where they are there."
    if not file.exists():
        method = make_method("small", start=WEIGHTS, training=None)
        settings = {**method.settings, "training": replace(method.settings["training"], **VARIANTS[name])}
        outputs = replace(method, settings=settings)(part.subset(fold.train), part.subset(fold.validation), part.subset(fold.test), fold.seed)
        temporary = file.with_suffix(".writing.npz")
        np.savez(temporary, validation=outputs.validation, test=outputs.test)
        os.replace(temporary, file)
    with np.load(file) as saved:
        return saved["validation"], saved["test"]


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
    parser.add_argument("--work", type=Path, default=Path("runs") / "finetune", help="folder of the finished turns")
    options = parser.parse_args()
    if not os.environ.get("BRAIN_VIT_DATA"):
        sys.exit("Set BRAIN_VIT_DATA to the folder with 'yes' and 'no'.")
    image_set = load_dataset(os.environ["BRAIN_VIT_DATA"])
    part, labels, groups = Part(preprocess_all(image_set)[0], image_set.labels), image_set.labels, image_set.groups
    folds = make_folds(labels, groups, 5, options.repeats)
    options.work.mkdir(parents=True, exist_ok=True)
    tasks = [(fold, name, options.work / f"{fold.repeat}_{fold.number}_{name.replace(' ', '_')}.npz") for fold in folds for name in VARIANTS]
    outputs = Parallel(n_jobs=options.jobs, verbose=5)(delayed(turn)(part, *task) for task in tasks)
    logits = {(fold.repeat, fold.number, name): output for (fold, name, _), output in zip(tasks, outputs)}

    def best(fold):
        return min(VARIANTS, key=lambda name: cross_entropy(labels[fold.validation], logits[fold.repeat, fold.number, name][0]))

    choices = {**{name: [name] * len(folds) for name in VARIANTS}, "chosen": [best(fold) for fold in folds]}
    rows = {title: judged(labels, groups, [(fold, *logits[fold.repeat, fold.number, name]) for fold, name in zip(folds, names)])
            for title, names in choices.items()}
    for title, row in rows.items():
        print(f"{title:32} validation loss {row['validation_loss']:.3f}  accuracy {row['accuracy']['value']:.3f}  ROC-AUC {row['roc_auc']['value']:.3f}")
    write_json(Path(__file__).with_suffix(".json"), {
        "protocol": f"5 grouped folds x {options.repeats} of the 253 images; accuracy at threshold 0.5 after temperature scaling on the validation part",
        "variants": VARIANTS, "chosen": [str(name) for name in choices["chosen"]], "rows": rows})


if __name__ == "__main__":
    main()
