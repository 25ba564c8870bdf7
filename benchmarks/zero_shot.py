"""What more phantoms bring: pretraining runs on held-out phantoms and on the 253 real images, of which they have seen none.

    BRAIN_VIT_DATA=../brain_tumor_dataset python benchmarks/zero_shot.py runs/first runs/second runs/third

Every model answers as it is: its threshold and temperature come from phantoms. Writes zero_shot.json beside this file; rows of other
stages that it holds already stay.
"""
import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from evaluate_real import SUSPECTS

from brain_vit._base import write_json
from brain_vit.accuracy import classification_metrics
from brain_vit.phantom import phantom_dataset
from brain_vit.predict import Predictor, locate_model
from brain_vit.preprocess import load_dataset, preprocess_all
from brain_vit.pretrain import HELD_OUT_SEED
from brain_vit.vit import PRESETS


def judged(predictor, images, labels, groups):
    "Metrics with intervals."
    return classification_metrics(labels, predictor.probability(images), groups, predictor.threshold)


def preset_of(config):
    "The name of the preset that a run's model is."
    return next((name for name, preset in PRESETS.items() if asdict(preset) == config), "another model")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="pretraining runs")
    options = parser.parse_args()
    if not os.environ.get("BRAIN_VIT_DATA"):
        sys.exit("Set BRAIN_VIT_DATA to the folder with 'yes' and 'no'.")
    real, held_out = load_dataset(os.environ["BRAIN_VIT_DATA"]), phantom_dataset(1000, seed=HELD_OUT_SEED, start=1000)
    trusted = np.array([path not in SUSPECTS for path in real.paths])
    real_images, phantoms = preprocess_all(real)[0], preprocess_all(held_out)[0]
    path, rows = Path(__file__).with_suffix(".json"), []
    for run in options.runs:
        predictor, settings = Predictor.load(run), locate_model(run)[1]
        rows.append({
            "model": preset_of(settings["model"]), "images_seen": settings["images_seen"],
            "held_out": judged(predictor, phantoms, held_out.labels, held_out.groups),
            "real": judged(predictor, real_images, real.labels, real.groups),
            "real_without_suspects": judged(predictor, real_images[trusted], real.labels[trusted], real.groups[trusted])})
        print(f"{rows[-1]['model']} {rows[-1]['images_seen']:9,} images", *(f"{part} ROC-AUC {rows[-1][part]['roc_auc']['value']:.3f}" for part in ("held_out", "real")), sep="  ", flush=True)
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = {(row["model"], row["images_seen"]): row for row in earlier + rows}
    write_json(path, {"protocol": "trained on phantoms only; 1,000 held-out phantoms, and the real images with groups of twins; rows without "
                                  "held_out are stages whose weights are gone: their phantoms were of an earlier recipe",
                      "rows": [measured[key] for key in sorted(measured)]})


if __name__ == "__main__":
    main()
