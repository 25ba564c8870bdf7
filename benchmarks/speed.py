"""How fast brain_vit is beside its peers, as ratios of one run on one machine.

    make bench                                                            everything but growth, with the peers in an environment of their own
    .bench/bin/python benchmarks/speed.py --only growth --sizes 250,2500 --tasks audit --json   one part, of it these folders, and this command

Every contender is a process that has built and compiled its part and waits. The rounds go through all of them in turn, so a
busy minute slows all alike, and a ratio is taken within each round. --json writes what ran into speed.json beside this file, which
the README's table shows; what did not run stays there as it was, and models measured on another kind of machine move to "elsewhere".
Growth writes each figure when it has it, and leaves out what the file already holds for the same code: stopped, it goes on where it
was. --again measures all anew.
"""
import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
PRESETS = ("lecture", "small")
DROPOUT = 0.1
KERAS = [(name, backend) for backend in ("tensorflow", "jax") for name in ("ours", "stock", "example", "hub")]


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
        contenders = [Contender(name, backend, (preset, str(DROPOUT))) for name, backend in (*KERAS, ("timm", "jax"))]  # timm uses no backend, and beside TensorFlow some builds of PyTorch crash
        peak = Contender("peak")
        jobs = {"peak": (peak, "run", 20)}
        for one in contenders:
            jobs[f"{one.label} train"] = (one, "train", 3)
            if not one.label.startswith("stock"):
                jobs[f"{one.label} predict"] = (one, "predict", 8)
            if one.label.startswith("ours"):
                jobs[f"{one.label} maps"] = (one, "maps", 8)
        rates = interleave(jobs, rounds)
        for one in (*contenders, peak):
            one.close()
        work = flops(preset)
        report[preset] = {
            "flops_forward": work, "peak_gflops": spread(rates["peak"], 1), "rates": {name: spread(values, 1) for name, values in rates.items() if name != "peak"},
            "ratios": {f"{backend} {task} against {peer}": ratio(rates, f"ours/{backend} {task}", f"{peer}/{backend} {task}" if peer != "timm" else f"timm {task}")
                       for backend in ("tensorflow", "jax") for task in ("train", "predict") for peer in ("example", "hub", "timm")}
            | {f"{backend} train against stock": ratio(rates, f"ours/{backend} train", f"stock/{backend} train") for backend in ("tensorflow", "jax")},
            "maps_cost": {backend: ratio(rates, f"ours/{backend} predict", f"ours/{backend} maps") for backend in ("tensorflow", "jax")},
            "share_of_peak": {name: spread([rate * work * (3 if name.endswith("train") else 1) / 1e9 / top for rate, top in zip(values, rates["peak"])])
                              for name, values in rates.items() if name != "peak" and (preset == "lecture" or name.startswith("ours"))}}
        show(preset, report[preset])
    return report


def measure_compiled(rounds):
    "Ours under TensorFlow against the Keras peers when these are compiled by XLA, too."
    report = {}
    for preset in PRESETS:
        contenders = [Contender(name, "tensorflow", (preset, str(DROPOUT))) for name in ("ours", "example-compiled", "hub-compiled")]
        rates = interleave({f"{one.label} {task}": (one, task, count) for one in contenders for task, count in (("train", 3), ("predict", 8))}, rounds)
        for one in contenders:
            one.close()
        report[preset] = {f"{task} against {peer}": ratio(rates, f"ours/tensorflow {task}", f"{peer}-compiled/tensorflow {task}")
                          for task in ("train", "predict") for peer in ("example", "hub")}
    show("peers compiled, too", report)
    return report


def waiting(fixed, fed):
    "The share of training time that goes when input is ready: from the medians of all rounds, for single rounds differ more than that; and the range of the rounds."
    median = 1 - statistics.median(fed) / statistics.median(fixed)
    return spread([1 - b / a for a, b in zip(fixed, fed)]) | {"median": round(median, 3), "rates": {"fixed": spread(fixed, 1), "fed": spread(fed, 1)}}


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
            report["waiting"][f"{backend} {preset}"] = waiting(rates["fixed"], rates["fed"])
    show("input", report)
    return report


def process(command, **options):
    "Seconds and peak memory in MB of a whole process, which must succeed: all of it, and without pages of files that the system may drop."
    start, own = time.perf_counter(), [0.0]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, **options)
        threading.Thread(target=watch, args=(child.pid, own), daemon=True).start()
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            errors.seek(0)
            raise SystemExit(f"{command} failed:\n{errors.read().decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, own[0]


def watch(number, own):
    "Note the peak of a process's own memory, where Linux tells it."
    try:
        while True:
            status = Path(f"/proc/{number}/status").read_text()
            own[0] = max(own[0], int(status.split("RssAnon:")[1].split()[0]) / 1024)
            time.sleep(0.1)
    except (OSError, IndexError):
        pass


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


def code_digest():
    "A name for the code that growth measures."
    files = sorted((HERE.parent / "brain_vit").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def measure_growth(sizes, names, known, keep):
    "Seconds and peak memory of audit, predict and one epoch of training as the folder grows. `known`: rows that need not be measured; `keep` is told of each figure."
    rows = {row["images"]: row for row in known}
    for size in sizes:
        row = rows.setdefault(size, {"images": size})
        for name in names:
            if row.get(name, {}).get("code") != code_digest():
                row[name] = grown(size, name)
                print("{:6} images  {:8} {seconds:8.1f} s {megabytes:8} MB, {own_megabytes} MB of its own".format(size, name, **row[name]), flush=True)
                keep([rows[images] for images in sorted(rows)])
        shutil.rmtree(phantom_folder(size), ignore_errors=True)
    return [rows[images] for images in sorted(rows)]


def phantom_folder(size):
    "Where phantoms wait until all figures of their size are there."
    return Path(tempfile.gettempdir()) / f"brain_vit-growth-{size}"


def grown(size, name):
    "One figure. Masks stay where training finds them; what predict reads has none."
    folder = phantom_folder(size)
    if not (folder / "set").exists():
        process([BIN / "brain_vit", "phantom", folder / "set", "--count", str(size)])
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = {"predict": ["predict", folder / "set" / "yes", folder / "set" / "no"], "audit": ["audit", folder / "set", "--out", f"{out}/audit"],
                   "train": ["train", folder / "set", "--epochs", "1", "--out", f"{out}/run"]}[name]
        seconds, memory, own = process([BIN / "brain_vit", *command])
    return {"seconds": round(seconds, 1), "megabytes": round(memory), "own_megabytes": round(own), "code": code_digest(), "processor": processor()}


def show(title, report):
    "Print the medians."
    print(f"\n{title}")
    for group, values in report.items():
        for name, value in values.items() if isinstance(values, dict) and "median" not in values else [("", values)]:
            text = f"{value['median']:10} ({value['lowest']} to {value['highest']})" if isinstance(value, dict) else value
            print(f"  {group:15} {name:40} {text}", flush=True)


def processor():
    "The processor's name, as the system tells it."
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0] if names else platform.processor()
    if platform.system() == "Darwin":
        return subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
    return platform.processor()


def vectors():
    "The widest vector instructions, where Linux names them: they decide how fast matrix products are."
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), None)


def machine():
    "What the figures were measured on."
    packages = {}
    for name in ("keras", "tensorflow", "jax", "keras-hub", "torch", "timm", "albumentations", "numpy", "opencv-python-headless", "onnxruntime"):
        try:
            packages[name] = version(name)
        except ModuleNotFoundError:
            pass
    return {"processor": processor(), "vectors": vectors(), "cores": os.cpu_count(), "architecture": platform.machine(), "system": platform.system(), "python": platform.python_version(), "packages": packages}


def of_one_kind(one, other):
    "Whether two runs were measured on machines alike."
    return all(one["machine"].get(name) == other["machine"].get(name) for name in ("processor", "vectors"))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="models,compiled,input,cold", help="which of models, compiled, input, cold, growth")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", default="250,2500,25000", help="folder sizes of growth")
    parser.add_argument("--tasks", default="predict,audit,train", help="what growth measures")
    parser.add_argument("--again", action="store_true", help="growth: measure what speed.json holds anew")
    parser.add_argument("--json", type=Path, nargs="?", const=HERE / "speed.json", help="write what ran into this file (default: speed.json)")
    options = parser.parse_args(arguments)
    file = options.json or HERE / "speed.json"
    result = json.loads(file.read_text()) if file.exists() else {}

    def keep(name, values):
        "Put one part into the file; the others stay."
        about = {"machine": machine()} if name == "growth" else {"machine": machine(), "rounds": options.rounds}
        before = result.setdefault("measured", {}).get(name)
        if name == "models" and before and not of_one_kind(before, about):
            result["elsewhere"] = before | {name: result[name]}
        result[name], result["measured"][name] = values, about
        if name == "models" or "machine" not in result:
            result.update(about | {"batch": 32, "image_size": 128, "dropout": DROPOUT})
        if options.json:
            file.with_suffix(".writing").write_text(json.dumps(result, indent=1) + "\n")
            os.replace(file.with_suffix(".writing"), file)

    parts = {"models": measure_models, "compiled": measure_compiled, "input": measure_input, "cold": measure_cold}
    for name in options.only.split(","):
        if name == "growth":
            sizes, tasks = [int(size) for size in options.sizes.split(",")], options.tasks.split(",")
            forget = lambda row, task: options.again and row["images"] in sizes and task in tasks
            known = [{task: value for task, value in row.items() if not forget(row, task)} for row in result.get("growth", [])]
            keep(name, measure_growth(sizes, tasks, known, lambda rows: keep("growth", rows)))
        else:
            keep(name, parts[name](options.rounds))


if __name__ == "__main__":
    main()
