"""Evaluate every method on the 253 real images and write benchmarks/evaluate_real.json, which nbs/results.ipynb prints.

    BRAIN_VIT_DATA=../brain_tumor_dataset python benchmarks/evaluate_real.py
    BRAIN_VIT_DATA=... python benchmarks/evaluate_real.py --preset majority,metadata --repeats 1 --out quick.json

`small` starts from the bundled weights; `small_scratch` is the same without them. Hours on two cores: a run that was
killed continues where it stopped, from the folder named by --work. The report holds figures and names of files, no path of
the machine and no picture.
"""
import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from brain_vit._base import write_json
from brain_vit.baselines import METHODS, make_method
from brain_vit.evaluate import evaluate, summary
from brain_vit.preprocess import load_dataset

# Labels that are doubted by eye, by no radiologist: an abdominal slice, a head with a mass, and heads with lesions in "no".
SUSPECTS = ["yes/Y248.JPG", "no/N1.JPG", "no/N15.jpg", "no/N16.jpg", "no/N17.jpg", "no/N19.JPG", "no/N22.JPG"]
KEPT = {"repeats", "metrics", "metrics_without_suspects", "accuracy_at_half", "seconds", "folds", "errors", "settings"}


def method(text):
    "A method as --preset names it: NAME, NAME:REPEATS or NAME:REPEATS:EPOCHS."
    name, repeats, epochs = (text.split(":") + ["", ""])[:3]
    start = Path(__file__).parent.parent / "brain_vit" / "weights" / "small.keras" if name == "small" else None
    return make_method(name.removesuffix("_scratch"), int(epochs) if epochs else None, start=start, repeats=int(repeats) if repeats else None)


def public(report, folder):
    "The report without anything that belongs to this machine."
    methods = {name: {key: value for key, value in result.items() if key in KEPT} for name, result in report["methods"].items()}
    packages = {name: version(name) for name in ("keras", "tensorflow", "numpy", "scikit-learn", "opencv-python-headless")}
    kept = {**report, "methods": methods, "suspects": SUSPECTS,
            "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "python": platform.python_version(), "packages": packages}}
    kept["data"] = {**report["data"], "name": "253 images of the challenge"}
    for text in strings(kept):
        if os.path.isabs(text) or str(folder) in text or str(Path.home()) in text:
            raise SystemExit(f"The report would show a path of this machine: {text}")
    return kept


def strings(value):
    "Every text inside nested dictionaries and lists."
    if isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="majority,metadata,hog,small,cnn:1,lecture_plain:1:15,lecture:1:15",
                        help=f"methods, joined by commas: {', '.join(METHODS)}, small_scratch; each with its own number of repeats and epochs as in lecture:1:30")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="turns at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs") / "evaluate_real", help="folder of the full report, with predictions and plots")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="the file to write")
    parser.add_argument("--keep", action="store_true", help="methods that are not measured now keep the figures that the file holds; needs the same folds and seed")
    options = parser.parse_args()
    folder = os.environ.get("BRAIN_VIT_DATA")
    if not folder:
        sys.exit("Set BRAIN_VIT_DATA to the folder with 'yes' and 'no'.")
    methods = [method(text) for text in options.preset.split(",")]
    options.work.parent.mkdir(parents=True, exist_ok=True)
    report = evaluate(load_dataset(folder), methods, options.folds, options.repeats, options.jobs, options.seed, options.work, suspects=SUSPECTS)
    result = public(report, Path(folder).resolve())
    if options.keep and options.out.exists():
        before = json.loads(options.out.read_text())
        if any(before[key] != result[key] for key in ("data", "folds", "seed")):
            sys.exit(f"'{options.out}' was measured with other images, folds or seed: leave --keep out.")
        result["methods"] = before["methods"] | result["methods"]
    write_json(options.out, result)
    print(summary(report))


if __name__ == "__main__":
    main()
