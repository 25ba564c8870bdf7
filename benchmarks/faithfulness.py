"""Which heatmap tells the truth: all methods and measures on held-out phantoms, with 95% intervals.

    python benchmarks/faithfulness.py [--count 1000] [--more 10000] [--model RUN] [--methods lesion,attention,…] [--steps 8]

Detected lesions are examined (table), the pointing game also by size and contrast. --more plays the pointing game of the default method
on so many further phantoms, for a narrower interval. Writes faithfulness.json beside this file.
"""
import argparse
import time
from pathlib import Path

import numpy as np

from brain_vit._base import write_json
from brain_vit.faithfulness import BINS, faithfulness, faithfulness_table, hit_rates, lesion_contrast, lesion_size, summarize
from brain_vit.heatmap import HEATMAPS, pointing_hits
from brain_vit.phantom import Phantom
from brain_vit.predict import Predictor
from brain_vit.pretrain import HELD_OUT_SEED, render_pool

FIRST = 300  # phantoms before this index were looked at when enlargement and shifts were chosen


def above_2_percent(hits, size):
    "The pointing game on lesions above 2% of the head."
    return hit_rates(hits, size, (0.02,))[1]


def by_property(report, size, contrast):
    "The pointing game of each method in bins."
    return {method: {"size": hit_rates(rows["pointing"]["each"], size, BINS["size"]),
                     "contrast": hit_rates(rows["pointing"]["each"], contrast, BINS["contrast"]),
                     "above_2_percent": above_2_percent(rows["pointing"]["each"], size)} for method, rows in report.items()}


def detected_lesions(predictor, first, count):
    "Phantoms of the exam whose lesion the model finds: images, masks, and how many have one."
    images, labels, masks = render_pool(Phantom.full(), HELD_OUT_SEED - 1, first, count, predictor.image_size)
    detected = (labels == 1) & (predictor.probability(images) >= predictor.threshold)
    return images[detected], masks[detected], int(labels.sum())


def play_more(predictor, first, count, part=1000):
    "The pointing game of the default method on many phantoms, a part at a time."
    hits, sizes = [], []
    for start in range(first, first + count, part):
        images, masks, _ = detected_lesions(predictor, start, min(part, first + count - start))
        hits.append(pointing_hits(predictor.heat(images, predictor.method), masks))
        sizes.append(lesion_size(images, masks))
    hits, sizes = np.concatenate(hits), np.concatenate(sizes)
    return {"method": predictor.method, "first": first, "phantoms": count, "pointing": summarize(hits), "above_2_percent": above_2_percent(hits, sizes)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="phantoms rendered, half of them with a lesion")
    parser.add_argument("--more", type=int, default=10_000, help="further phantoms for the pointing game of the default method")
    parser.add_argument("--model", help="a run folder or .keras file; by default the bundled weights")
    parser.add_argument("--methods", help=f"separated by commas: {', '.join(HEATMAPS)}, random; by default all")
    parser.add_argument("--steps", type=int, default=8, help="portions of the deletion and insertion curves")
    options = parser.parse_args()
    start, predictor = time.perf_counter(), Predictor.load(options.model)
    images, masks, with_lesion = detected_lesions(predictor, FIRST, options.count)
    print(f"{options.count} phantoms, {with_lesion} with a lesion, {len(images)} of them detected\n")
    report = faithfulness(predictor.model, images, masks, options.methods and options.methods.split(","), steps=options.steps)
    size, contrast = lesion_size(images, masks), lesion_contrast(images, masks)
    bins = by_property(report, size, contrast)
    winner = max(report, key=lambda method: report[method]["pointing"]["value"])
    print(faithfulness_table(report))
    print("\nPointing into lesions above 2% of the head:")
    for method, rows in bins.items():
        print(f"{method:15} {rows['above_2_percent']['value'] or 0:.3f} of {rows['above_2_percent']['n']}")
    more = play_more(predictor, FIRST + options.count, options.more) if options.more else None
    if more:
        print(f"\n{options.more} further phantoms, {more['method']}: {more['pointing']}, above 2%: {more['above_2_percent']}")
    short = {method: {name: {key: value for key, value in summary.items() if key != "each"} for name, summary in rows.items()} for method, rows in report.items()}
    write_json(Path(__file__).with_suffix(".json"), {
        "model": predictor.name, "phantoms": options.count, "seed": HELD_OUT_SEED - 1, "first": FIRST, "with_lesion": with_lesion, "detected": len(images),
        "winner_by_pointing": winner, "measures": short, "pointing_by": bins, "more": more, "seconds": round(time.perf_counter() - start, 1)})


if __name__ == "__main__":
    main()
