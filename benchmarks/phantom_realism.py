"""How near are phantoms to real slices, and can anything but the lesion tell their class?

    BRAIN_VIT_DATA=folder_with_yes_and_no python benchmarks/phantom_realism.py

writes phantom_realism.json beside this file: means and spreads over the real pictures (numbers only, no picture), and the accuracy of
the probes on phantoms: from their borders, and from all metadata of PNG files, as in an audit. Without BRAIN_VIT_DATA the real part is
kept as it is in the file. Takes about two minutes.
"""
import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from brain_vit._base import write_json
from brain_vit.phantom import Phantom
from brain_vit.realism import NAMES, border_statistics, picture_statistics, probe
from brain_vit.review import describe_border, describe_file, metadata_columns, shortcut_probe

PATH = Path(__file__).with_suffix(".json")


def real_part(folder):
    "Averages over a folder of real slices."
    from brain_vit.data import load_folder
    images = load_folder(folder).images
    numbers = np.array([picture_statistics(image) for image in images])
    return {"count": len(numbers), "names": list(NAMES), "mean": numbers.mean(0).round(4), "spread": numbers.std(0).round(4)}


def describe_slice(image, path):
    "What an audit knows of a slice in a PNG file without looking at the head."
    Image.fromarray(image).save(path)
    return describe_file(path) | describe_border(image)


def probe_part(count):
    "Accuracy of the probes on `count` phantoms, from their borders alone and from all their metadata."
    with tempfile.TemporaryDirectory() as folder:
        items = (Phantom.full().render(seed=2024, index=index) for index in range(count))
        rows = [(border_statistics(item.image), describe_slice(item.image, Path(folder) / "slice.png"), item.label) for item in items]
    borders, facts, labels = map(list, zip(*rows))
    labels = np.array(labels)
    return {"count": count, "positive": float(labels.mean()), "border": probe(np.array(borders), labels),
            "metadata": shortcut_probe(metadata_columns(facts), labels, np.arange(count))}


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
