"""Phantoms per second, at 128 and 224 pixels, with one and two workers.

    python benchmarks/phantom.py [--seconds 10] [--json]
    python benchmarks/phantom.py --stream 100000 [--json]

One worker is measured in this process on one thread; two workers through `phantom_stream`. --stream N instead renders N phantoms of 128
pixels in this process and prints the resident memory ten times on the way (Linux only). --json also writes what was measured into
phantom.json beside this file, speed and memory each in its own part, and keeps the other part.
"""
import argparse
import json
import os
import time
from pathlib import Path

import cv2

from brain_vit._base import write_json
from brain_vit.phantom import Phantom, phantom_stream

PATH = Path(__file__).with_suffix(".json")


def rate(size, workers, seconds, batch_size=32):
    "Images per second of wall time, and milliseconds of processor time per image where they are rendered here."
    stream = phantom_stream(Phantom.full(image_size=size), batch_size=batch_size, workers=workers)
    for _ in range(2 + 8 * (workers > 0)):
        next(stream)
    count, start, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        next(stream)
        count += batch_size
    wall, busy = time.perf_counter() - start, time.process_time() - used
    stream.close()
    return {"image_size": size, "workers": max(1, workers), "images_per_second": round(count / wall, 1),
            "ms_per_image": round(1000 * wall / count, 2), "cpu_ms_per_image": None if workers else round(1000 * busy / count, 2)}


def resident():
    "Megabytes of memory that this process holds now."
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch_memory(count, batch_size=20):
    "Memory after every tenth of a stream: flat means that nothing is kept."
    stream = phantom_stream(Phantom.full(), batch_size=batch_size, workers=0)
    rows = []
    print(f"{'images':>9} {'resident MB':>12}")
    for done in range(batch_size, count + 1, batch_size):
        next(stream)
        if done % max(batch_size, count // 10) < batch_size:
            rows.append({"images": done, "megabytes": round(resident(), 1)})
            print(f"{done:9d} {rows[-1]['megabytes']:12.1f}", flush=True)
    return {"stream": rows}


def measure_speed(seconds):
    "Both sizes, with one and with two workers."
    load, rows = round(os.getloadavg()[0], 1), []
    print(f"{'pixels':>7} {'workers':>8} {'images/s':>9} {'ms/image':>9} {'cpu ms':>7}")
    for size in (128, 224):
        for workers in (0, 2):
            row = rate(size, workers, seconds)
            rows.append(row)
            print(f"{size:7d} {row['workers']:8d} {row['images_per_second']:9.1f} {row['ms_per_image']:9.2f} {row['cpu_ms_per_image'] or '':>7}")
    return {"cpus": os.cpu_count(), "load_before": load, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="length of each measurement")
    parser.add_argument("--json", action="store_true", help="write what was measured into phantom.json")
    parser.add_argument("--stream", type=int, metavar="N", help="memory along N phantoms instead of speed")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    measured = watch_memory(options.stream) if options.stream else measure_speed(options.seconds)
    if options.json:
        write_json(PATH, (json.loads(PATH.read_text()) if PATH.exists() else {}) | measured)


if __name__ == "__main__":
    main()
