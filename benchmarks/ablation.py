"""Which part of the `small` model earns its place, trained from scratch on the same easy phantoms: one change at a time, and `lecture` beside it.

    python benchmarks/ablation.py [--images 60000] [--variants "small,pool mean"]

Every variant sees the same phantoms in the same order, so many images in all, and answers the same held-out phantoms; speed stands
beside accuracy, so that accuracy per minute can be seen. No real image is used. After each variant, ablation.json beside this file
is written anew: a killed run continues with the first variant that is missing. The changes start from `small` with one lesion
score per patch; the row `small` itself has four. About an hour and a half on two idle cores.
"""
import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from joblib import Parallel, delayed

from brain_vit._base import write_json
from brain_vit.accuracy import classification_metrics
from brain_vit.phantom import Phantom
from brain_vit.pretrain import HELD_OUT_SEED, render_pool
from brain_vit.vit import LECTURE, SMALL

BASE = replace(SMALL, dropout=0.0, splits=1)  # no dropout, as in pretraining
VARIANTS = {
    "small": {"splits": 2}, "one score per patch": {}, "lecture": asdict(replace(LECTURE, dropout=0.0)), "stem conv": {"stem": "conv"},
    "position sinusoidal_2d": {"position": "sinusoidal_2d"}, "position learned": {"position": "learned"},
    "position none": {"position": "none"}, "pool mean": {"pool": "mean"}, "2 blocks": {"num_blocks": 2}, "6 blocks": {"num_blocks": 6},
    "d_model 64": {"d_model": 64}, "d_model 192": {"d_model": 192}, "patch_size 8": {"patch_size": 8}, "8 heads": {"num_heads": 8},
}


def phantoms(seed, count, size=250):
    "Easy phantoms, rendered on all cores: images, labels, masks."
    starts = range(0, count, size)
    parts = Parallel(n_jobs=-1)(delayed(render_pool)(Phantom.easy(), seed, start, min(size, count - start), BASE.image_size) for start in starts)
    return [np.concatenate(arrays) for arrays in zip(*parts)]


def measure(config, pool, held_out, images, seed):
    "Train one variant on about `images` images; its size, its speed, and its answers on the held-out phantoms."
    import keras
    from brain_vit.augment import augment_batch
    from brain_vit.training import SliceBatches, TrainConfig, fit
    from brain_vit.vit import build_vit, predict_outputs
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    model, square_size = build_vit(config), config.square_size
    train = SliceBatches(*pool, square_size, augment=augment_batch, seed=seed)
    watched = SliceBatches(*(array[:32] for array in pool), square_size)  # `fit` wants something to watch; nothing is chosen by it
    recipe = TrainConfig(epochs=max(1, round(images / len(pool[1]))), learning_rate=1e-3, average=0.99, seed=seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fit(model, train, watched, recipe, folder, progress=False, keep="last")
    seconds = time.perf_counter() - start
    metrics = classification_metrics(held_out[1], predict_outputs(model, held_out[0])["probability"])
    return {"parameters": model.count_params(), "images": recipe.epochs * len(pool[1]), "seconds": seconds,
            "images_per_second": recipe.epochs * len(pool[1]) / seconds, "n": len(held_out[1]),
            **{name: metrics[name] for name in ("accuracy", "roc_auc")}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000, help="each variant sees about so many, repeats counted")
    parser.add_argument("--pool", type=int, default=12_000, help="distinct phantoms to learn from; every pass over them varies them anew")
    parser.add_argument("--held-out", type=int, default=1000, help="phantoms to answer")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, joined by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="the file to write")
    options = parser.parse_args()
    names = options.variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"there is no variant '{unknown[0]}': choose from {', '.join(VARIANTS)}")
    settings = {"images": options.images, "pool": min(options.pool, options.images), "held_out": options.held_out, "seed": options.seed}
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = {row["variant"]: row for row in report.get("rows", [])} if report.get("settings") == settings else {}
    rows = {name: row for name, row in rows.items() if row["config"] == asdict(replace(BASE, **VARIANTS.get(name, {})))}
    missing = [name for name in names if name not in rows]
    pool, held_out = (phantoms(*which) for which in ((options.seed, settings["pool"]), (HELD_OUT_SEED, options.held_out))) if missing else (None, None)
    for name in missing:
        config = replace(BASE, **VARIANTS[name])
        rows[name] = row = {"variant": name, "config": asdict(config), **measure(config, pool, held_out, options.images, options.seed)}
        print(f"{name:24} {row['parameters']:9,} parameters  {row['images_per_second']:5.0f} images/s  accuracy {row['accuracy']['value']:.3f}  "
              f"ROC-AUC {row['roc_auc']['value']:.3f}", flush=True)
        write_json(options.out, {
            "protocol": f"trained from scratch on {row['images']:,} views of {settings['pool']:,} easy phantoms, one seed; "
                        f"{options.held_out:,} held-out easy phantoms, accuracy at threshold 0.5",
            "settings": settings, "cores": os.cpu_count(), "rows": [rows[name] for name in VARIANTS if name in rows]})


if __name__ == "__main__":
    main()
