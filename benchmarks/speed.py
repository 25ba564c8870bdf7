"""How fast brain_vit is beside its peers, as ratios of one run on one machine.

    make bench       everything but growth, with the peers in an environment of their own
    .bench/bin/python benchmarks/speed.py --only growth --json

Every contender is a process that has built and compiled its part and waits. The rounds go through all of them in turn, so a
busy minute slows all alike, and a ratio is taken within each round. --json writes the parts that ran into speed.json beside
this file, which the README's table shows.
"""
import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
PRESETS = ("lecture", "small")
DROPOUT = 0.1
KERAS = [(name, backend) for backend in ("tensorflow", "jax") for name in ("ours", "example", "hub")]


class Contender:
    "A process that works when told to."

    def __init__(self, name, backend="tensorflow", arguments=()):
        self.label = name if name in ("timm", "peak") or not arguments else f"{name}/{backend}"
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(HERE.parent)}
        self.process = subprocess.Popen([sys.executable, HERE / "contender.py", name, *arguments], env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{name} {backend} did not start:\n{self.process.stderr.read()[-2000:]}")

    def ask(self, task, count):
        "Images per second (GFLOP/s for the peak)."
        print(task, count, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def interleave(jobs, rounds):
    "Rates per job, the jobs taking turns. `jobs`: name → (contender, task, count)."
    rates = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, (contender, task, count) in jobs.items():
            rates[name].append(contender.ask(task, count))
    return rates


def spread(values, digits=3):
    "Median and range."
    return {"median": round(statistics.median(values), digits), "lowest": round(min(values), digits), "highest": round(max(values), digits)}


def ratio(rates, name, other):
    "How many times faster `name` was than `other`, round by round."
    return spread([a / b for a, b in zip(rates[name], rates[other])])


def flops(preset):
    "Multiply-adds × 2 of the matrix products of one image, forward. Training is counted as three times that."
    from brain_vit.vit import PRESETS
    config = PRESETS[preset]
    tokens, width = config.num_patches, config.d_model
    if config.stem == "conv":
        stem = 2 * tokens * config.patch_size**2 * width
    else:  # 4x4 pixels, then 2x2 merges; the width doubles at each
        stages, pixels, channels, stem = (config.patch_size // 4).bit_length(), 16, width // (config.patch_size // 4), 0
        for stage in range(stages):
            stem += 2 * tokens * 4 ** (stages - 1 - stage) * pixels * channels
            pixels, channels = 4 * channels, 2 * channels
    block = 2 * tokens * width**2 * (4 + 2 * config.mlp_ratio) + 4 * tokens**2 * width
    return int(stem + config.num_blocks * block)


def measure_models(rounds):
    "Training, prediction and maps of both presets against the peers."
    report = {}
    for preset in PRESETS:
        contenders = [Contender(name, backend, (preset, str(DROPOUT))) for name, backend in (*KERAS, ("timm", "tensorflow"))]
        peak = Contender("peak")
        jobs = {"peak": (peak, "run", 20)}
        for one in contenders:
            jobs |= {f"{one.label} train": (one, "train", 3), f"{one.label} predict": (one, "predict", 8)}
            if one.label.startswith("ours"):
                jobs[f"{one.label} maps"] = (one, "maps", 8)
        rates = interleave(jobs, rounds)
        for one in (*contenders, peak):
            one.close()
        work = flops(preset)
        report[preset] = {
            "flops_forward": work, "peak_gflops": spread(rates["peak"], 1), "rates": {name: spread(values, 1) for name, values in rates.items() if name != "peak"},
            "ratios": {f"{backend} {task} against {peer}": ratio(rates, f"ours/{backend} {task}", f"{peer}/{backend} {task}" if peer != "timm" else f"timm {task}")
                       for backend in ("tensorflow", "jax") for task in ("train", "predict") for peer in ("example", "hub", "timm")},
            "maps_cost": {backend: ratio(rates, f"ours/{backend} predict", f"ours/{backend} maps") for backend in ("tensorflow", "jax")},
            "share_of_peak": {name: spread([rate * work * (3 if name.endswith("train") else 1) / 1e9 / top for rate, top in zip(values, rates["peak"])])
                              for name, values in rates.items() if name != "peak" and (preset == "lecture" or name.startswith("ours"))}}
        show(preset, report[preset])
    return report


def measure_input(rounds):
    "Augmentation against its peers, decoding, rendering, and how long training waits."
    names = {"ours": "augment-ours", "keras": "augment-keras", "albumentations": "augment-albumentations", "decode": "decode", "render": "render"}
    contenders = {name: Contender(script) for name, script in names.items()}
    rates = interleave({name: (one, "run", 10) for name, one in contenders.items()}, rounds)
    for one in contenders.values():
        one.close()
    report = {"rates": {name: spread(values, 1) for name, values in rates.items()},
              "ratios": {f"augmentation against {peer}": ratio(rates, "ours", peer) for peer in ("keras", "albumentations")}, "waiting": {}}
    for backend in ("tensorflow", "jax"):
        for preset in PRESETS:
            one = Contender("feed", backend, (preset, str(DROPOUT)))
            rates = interleave({"fixed": (one, "fixed", 1), "fed": (one, "fed", 1)}, rounds)
            one.close()
            report["waiting"][f"{backend} {preset}"] = spread([1 - fed / fixed for fed, fixed in zip(rates["fed"], rates["fixed"])])
    show("input", report)
    return report


def process(command, **options):
    "Seconds and peak memory in MB of a whole process, which must succeed."
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, **options)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            errors.seek(0)
            raise SystemExit(f"{command} failed:\n{errors.read().decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


HUB_SCRIPT = """
import sys, cv2, keras, keras_hub
image = cv2.resize(cv2.imread(sys.argv[2], cv2.IMREAD_GRAYSCALE), (128, 128)).reshape(1, 128, 128, 1) / 255
print(keras.saving.load_model(sys.argv[1], compile=False).predict(image, verbose=0))
"""
HUB_MODEL = """
import sys, keras, keras_hub
image = keras.Input((128, 128, 1))
backbone = keras_hub.models.ViTBackbone(image_shape=(128, 128, 1), patch_size=(16, 16), num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=256, use_class_token=False)
keras.Model(image, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(backbone(image)))).save(sys.argv[1])
"""


def measure_cold(rounds):
    "Whole processes, from the command to its end, on one image."
    with tempfile.TemporaryDirectory() as folder:
        process([BIN / "brain_vit", "phantom", f"{folder}/one", "--count", "1"])
        image = next(Path(folder).rglob("one/[yn]*/*.png"))
        process([sys.executable, "-c", HUB_MODEL, f"{folder}/hub.keras"])
        commands = {"--help": [BIN / "brain_vit", "--help"], "predict": [BIN / "brain_vit", "predict", image],
                    "heatmap": [BIN / "brain_vit", "heatmap", image, "--out"],
                    "KerasHub script": [sys.executable, "-c", HUB_SCRIPT, f"{folder}/hub.keras", image]}
        seconds = {name: [] for name in commands}
        for number in range(rounds + 1):  # the first round only fills the disk's cache
            for name, command in commands.items():
                taken = process([*command, f"{folder}/heat{number}"] if name == "heatmap" else command)[0]
                if number:
                    seconds[name].append(taken)
    report = {"seconds": {name: spread(values, 2) for name, values in seconds.items()},
              "ratios": {"predict against KerasHub": spread([slow / fast for slow, fast in zip(seconds["KerasHub script"], seconds["predict"])], 1)}}
    show("cold start", report)
    return report


def measure_growth(counts):
    "Seconds and peak memory of audit, predict and one epoch of training as the folder grows."
    report = []
    for count in counts:
        folder = Path(tempfile.mkdtemp())
        try:
            process([BIN / "brain_vit", "phantom", folder / "set", "--count", str(count)])
            commands = {"predict": ["predict", folder / "set"], "audit": ["audit", folder / "set", "--out", folder / "audit"],
                        "train": ["train", folder / "set", "--epochs", "1", "--out", folder / "run"]}
            row = {"images": count}
            for name, command in commands.items():
                seconds, memory = process([BIN / "brain_vit", *command])
                row[name] = {"seconds": round(seconds, 1), "megabytes": round(memory)}
                print(f"{count:6} images  {name:8} {seconds:8.1f} s {memory:8.0f} MB", flush=True)
            report.append(row)
        finally:
            shutil.rmtree(folder)
    return report


def show(title, report):
    "Print the medians."
    print(f"\n{title}")
    for group, values in report.items():
        for name, value in values.items() if isinstance(values, dict) and "median" not in values else [("", values)]:
            text = f"{value['median']:10} ({value['lowest']} to {value['highest']})" if isinstance(value, dict) else value
            print(f"  {group:15} {name:40} {text}", flush=True)


def machine():
    "What the figures were measured on."
    packages = {}
    for name in ("keras", "tensorflow", "jax", "keras-hub", "torch", "timm", "albumentations", "numpy", "opencv-python-headless", "onnxruntime"):
        try:
            packages[name] = version(name)
        except ModuleNotFoundError:
            pass
    return {"cores": os.cpu_count(), "architecture": platform.machine(), "system": platform.system(), "python": platform.python_version(), "packages": packages}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="models,input,cold", help="which of models, input, cold, growth")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--counts", type=int, nargs="+", default=[250, 2500, 25000], help="folder sizes of growth")
    parser.add_argument("--json", action="store_true", help="write what ran into speed.json")
    options = parser.parse_args()
    parts = {"models": measure_models, "input": measure_input, "cold": measure_cold, "growth": lambda rounds: measure_growth(options.counts)}
    file = HERE / "speed.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    result |= {"machine": machine(), "batch": 32, "image_size": 128, "dropout": DROPOUT, "rounds": options.rounds}
    for name in options.only.split(","):
        result[name] = parts[name](options.rounds)
        if options.json:
            file.write_text(json.dumps(result, indent=1) + "\n")
