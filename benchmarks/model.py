"""Images per second of both presets: training, predicting, predicting with all attention maps.

    python benchmarks/model.py [--rounds 5] [--json]

The three are interleaved, so that a busy minute slows all alike; look at the ratios, not at the seconds.
"""
import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import numpy as np

from brain_vit.training import TrainConfig, compile_vit
from brain_vit.vit import PRESETS, attention_readout, build_vit

BATCH = 32


def timed(work):
    start = time.perf_counter()
    work()
    return BATCH / (time.perf_counter() - start)


def measure(config, rounds):
    model = compile_vit(build_vit(config), TrainConfig(), total_steps=1000)
    reader = attention_readout(model)
    images = np.random.default_rng(0).random((BATCH, config.image_size, config.image_size, 1), "float32")
    targets = {"tumor": np.zeros((BATCH, 1), "float32"), "lesion": np.zeros((BATCH, config.num_patches), "float32")}
    targets = {name: targets[name] for name in model.output}
    work = {"training": lambda: model.train_on_batch(images, targets),
            "predicting": lambda: model.predict_on_batch(images),
            "predicting with maps": lambda: reader.predict_on_batch(images)}
    for task in work.values():
        task()  # compiles
    rates = {name: [] for name in work}
    for _ in range(rounds):
        for name, task in work.items():
            rates[name].append(timed(task))
    return rates


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--json", action="store_true", help="also write model.json beside this file")
options = parser.parse_args()

report = {"backend": keras.backend.backend(), "keras": keras.__version__, "cores": os.cpu_count(), "machine": platform.machine(), "batch": BATCH, "presets": {}}
for name, config in PRESETS.items():
    rates = measure(config, options.rounds)
    medians = {task: statistics.median(values) for task, values in rates.items()}
    report["presets"][name] = {task: {"median": medians[task], "lowest": min(values), "highest": max(values)} for task, values in rates.items()}
    for task, values in rates.items():
        print(f"{name:8} {task:22} {medians[task]:8.1f} images/s  ({min(values):.1f} to {max(values):.1f})")
    print(f"{name:8} maps cost {medians['predicting'] / medians['predicting with maps']:.2f} times plain prediction")
if options.json:
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
