"""How near are phantoms to real slices, and can anything but the lesion tell their class?

    BRAIN_VIT_DATA=folder_with_yes_and_no python benchmarks/phantom_realism.py

writes phantom_realism.json beside this file: means and spreads over the real pictures (numbers only, no picture), and the accuracy of
the probe on phantoms. Without BRAIN_VIT_DATA the real part is kept as it is in the file. Takes about two minutes.
"""
import argparse
import json
import os
from pathlib import Path

import numpy as np

from brain_vit._base import write_json
from brain_vit.phantom import Phantom
from brain_vit.realism import NAMES, border_statistics, picture_statistics, probe

PATH = Path(__file__).with_suffix(".json")


def real_part(folder):
    "Averages over a folder of real slices."
    from brain_vit.data import load_folder
    images = load_folder(folder).images
    numbers = np.array([picture_statistics(image) for image in images])
    return {"count": len(numbers), "names": list(NAMES), "mean": numbers.mean(0).round(4), "spread": numbers.std(0).round(4)}


def probe_part(count):
    "Accuracy of the probe on `count` phantoms, from their borders alone."
    recipe, features, labels = Phantom.full(), [], []
    for index in range(count):
        item = recipe.render(seed=2024, index=index)
        features.append(border_statistics(item.image))
        labels.append(item.label)
    return {"count": count, "positive": float(np.mean(labels)), "border": probe(np.array(features), np.array(labels))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000, help="phantoms for the probe")
    count = parser.parse_args().count
    result = json.loads(PATH.read_text()) if PATH.exists() else {}
    if os.environ.get("BRAIN_VIT_DATA"):
        result |= real_part(os.environ["BRAIN_VIT_DATA"])
    result["probe"] = probe_part(count)
    write_json(PATH, result)
    print(json.dumps(result["probe"], indent=2))


if __name__ == "__main__":
    main()
