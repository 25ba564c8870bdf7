"Exported models: the same results as Keras, without Keras, and one sentence for each file that is none of ours."
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from brain_vit.onnx_model import LIGHT_HEATMAPS

WEIGHTS = Path(__file__).parent.parent / "brain_vit" / "weights"
HEAVY = ("keras", "tensorflow", "jax", "sklearn", "matplotlib", "scipy", "onnx")


@pytest.fixture(scope="module")
def images():
    "Preprocessed phantoms, (n, 128, 128, 1)."
    from brain_vit.phantom import phantom_dataset
    from brain_vit.preprocess import preprocess_all
    return preprocess_all(phantom_dataset(5, seed=11), 128)[0]


def shaken(config):
    "An untrained model whose every weight is random: biases and norms too, which start as zeros and ones."
    import keras
    from brain_vit.vit import build_vit
    model, generator = build_vit(config), np.random.default_rng(1)
    keras.utils.set_random_seed(1)
    model.set_weights([weight + generator.normal(scale=0.1, size=weight.shape).astype("float32") for weight in model.get_weights()])
    return model


def assert_same(model, file, images):
    "All outputs of the file, for one image and for several, equal Keras's."
    from brain_vit.onnx_model import OnnxModel
    from brain_vit.vit import attention_readout
    reader = OnnxModel(file)
    for batch in (images, images[:1]):
        wanted = attention_readout(model).predict(batch, verbose=0)
        assert sorted(reader.names) == sorted(wanted)
        for name in wanted:
            found = reader.run(batch, name, batch_size=2)
            assert found.shape == wanted[name].shape and found.dtype == np.float32
            assert np.abs(found - wanted[name]).max() < 1e-4, name
    return reader


def variants():
    from brain_vit.vit import LECTURE, SMALL
    return {"small": SMALL, "lecture": LECTURE,
            "other": replace(SMALL, num_blocks=1, num_heads=2, patch_size=32, position="sinusoidal_2d", mlp_ratio=1.5),
            "one score": replace(SMALL, num_blocks=1, splits=1),
            "learned": replace(LECTURE, image_size=64, patch_size=8, d_model=64, num_blocks=2, position="learned")}


@pytest.mark.parametrize("name", ["small", "lecture", "other", "one score", "learned"])
def test_the_file_gives_keras_results(name, images, tmp_path):
    from brain_vit.export import config_of, export_onnx
    config = variants()[name]
    model = shaken(config)
    assert config_of(model) == config
    assert export_onnx(model, tmp_path / "model.onnx", name, temperature=1.7, threshold=0.3) < 1e-4
    reader = assert_same(model, tmp_path / "model.onnx", images[:, :config.image_size, :config.image_size])
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert reader.settings["config"] == vars(config) and reader.settings["name"] == name
    assert (reader.settings["temperature"], reader.settings["threshold"]) == (1.7, 0.3)
    assert reader.settings["heatmap"] == ("lesion" if config.pool == "lesion" else "attention")


def test_the_bundled_file_is_the_bundled_model(images):
    import keras
    import brain_vit.vit  # registers the layers
    from brain_vit.heatmap import heatmap
    model = keras.saving.load_model(WEIGHTS / "small.keras", compile=False)
    reader = assert_same(model, WEIGHTS / "small.onnx", images)
    for method in LIGHT_HEATMAPS:
        assert np.abs(reader.heat(images, method) - heatmap(model, images, method)).max() < 1e-4
    card = json.loads((WEIGHTS / "small.json").read_text())
    assert reader.settings["sha256"] == card["sha256"] == hashlib.sha256((WEIGHTS / "small.keras").read_bytes()).hexdigest()
    assert all(reader.settings[key] == card[key] for key in ("name", "threshold", "temperature", "heatmap"))
    assert reader.settings["config"] == card["config"]["model"]
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 8e6


def test_other_models_are_not_exported(tmp_path):
    import keras
    from brain_vit._base import InputError
    from brain_vit.export import export_onnx
    from brain_vit.vit import SMALL, build_vit
    model = build_vit(SMALL)
    other = keras.Model(model.input, {"tumor": keras.layers.Dense(1)(keras.layers.Activation("relu")(model.get_layer("norm").output[:, 0]))})
    flat = keras.Sequential([keras.Input((128, 128, 1)), keras.layers.Flatten(), keras.layers.Dense(1)])
    for foreign in (other, flat):
        with pytest.raises(InputError, match="cannot be exported"):
            export_onnx(foreign, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="must end in .onnx"):
        export_onnx(model, tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())


def test_broken_and_foreign_files_get_a_sentence(tmp_path):
    from brain_vit._base import InputError
    from brain_vit.onnx_model import OnnxModel
    onnx = pytest.importorskip("onnx")
    whole = (WEIGHTS / "small.onnx").read_bytes()
    foreign = onnx.load_from_string(whole)
    del foreign.metadata_props[:]
    cases = {"missing": None, "empty": b"", "text": b"I am a text", "cut": whole[:len(whole) // 2], "foreign": foreign.SerializeToString()}
    for name, content in cases.items():
        path = tmp_path / f"{name}.onnx"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError) as error:
            OnnxModel(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="magic"):
        OnnxModel(WEIGHTS / "small.onnx").heat(np.zeros((1, 128, 128, 1)), "magic")


def imported(*arguments, code=0):
    "Run the command in a process of its own; returns its output and which of the heavy packages it imported."
    program = ("import sys, atexit\n"
               f"atexit.register(lambda: print('IMPORTED', *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr))\n"
               f"from brain_vit.cli import main; main({[str(a) for a in arguments]!r})")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout, next(line for line in done.stderr.splitlines() if line.startswith("IMPORTED")).split()[1:]


def test_predict_and_heatmap_never_import_keras(slices, tmp_path):
    out, heavy = imported("predict", slices / "good", "--json")
    assert len(out.splitlines()) == 5 and heavy == []
    copy = tmp_path / "copy.onnx"
    copy.write_bytes((WEIGHTS / "small.onnx").read_bytes())
    again, heavy = imported("predict", slices / "good", "--model", copy, "--json")
    assert again == out and heavy == []
    for method in LIGHT_HEATMAPS:
        out, heavy = imported("heatmap", slices / "good", "--out", tmp_path / method, "--npy", "--method", method)
        assert len(out.splitlines()) == 5 and heavy == []
        assert len(list((tmp_path / method).glob("*.npy"))) == 5


def test_scoring_with_masks_never_imports_keras(run_cli, tmp_path):
    run_cli("phantom", tmp_path / "phantoms", "--count", 6, "--recipe", "easy")
    copy = tmp_path / "copy.onnx"
    copy.write_bytes((WEIGHTS / "small.onnx").read_bytes())
    arguments = ("heatmap", tmp_path / "phantoms", "--masks", tmp_path / "phantoms" / "masks", "--json")
    reports = []
    for more in ((), ("--model", copy), ("--method", "lesion")):
        out, heavy = imported(*arguments, *more)
        assert not {"keras", "tensorflow", "jax"} & set(heavy)
        reports.append(json.loads(out))
    assert reports[0] == reports[1] and list(reports[0]["all"])[0] == "lesion_shifted" and list(reports[2]["all"]) == ["lesion", "attention", "random"]


def test_the_light_and_the_full_predictor_score_alike(run_cli, tmp_path):
    from brain_vit.faithfulness import score_folder
    from brain_vit.predict import Predictor, load_predictor
    run_cli("phantom", tmp_path / "phantoms", "--count", 6, "--recipe", "easy")
    full, light = (score_folder(predictor, [tmp_path / "phantoms"], tmp_path / "phantoms" / "masks", steps=2) for predictor in (Predictor.load(), load_predictor(None)))
    assert full["n"] == light["n"] > 0 and full["skipped"] == light["skipped"]
    for method, row in full["all"].items():
        for name, cell in row.items():
            assert abs(cell["value"] - light["all"][method][name]["value"]) < 1e-3, (method, name)


def test_six_views_of_even_scores_are_even():
    from brain_vit.onnx_model import OnnxModel
    model = object.__new__(OnnxModel)
    model.names, model.image_size, model.run = ["lesion"], 64, lambda images, name: np.full((len(images), 16), 1.5, "float32")
    assert np.allclose(model.heat(np.zeros((2, 64, 64, 1)), "lesion_shifted"), 1 / (1 + np.exp(-1.5)))


def test_the_light_and_the_full_predictor_agree(slices):
    from brain_vit.predict import Predictor, load_predictor
    full, light = Predictor.load(), load_predictor(None)
    for method in LIGHT_HEATMAPS:
        for (one, image, heat), (two, same, other) in zip(full.explain([slices / "good"], method), light.explain([slices / "good"], method), strict=True):
            assert (one.path, one.label, one.threshold, one.model) == (two.path, two.label, two.threshold, two.model)
            assert abs(one.probability - two.probability) < 2e-4
            assert np.array_equal(image, same) and np.abs(heat - other).max() < 1e-4


def test_export_on_the_command_line(run_cli, slices, tmp_path):
    done = run_cli("export", "--out", tmp_path / "new" / "mine.onnx")
    assert "mine.onnx" in done.stdout
    rows = run_cli("predict", slices / "good", "--model", tmp_path / "new" / "mine.onnx", "--json").stdout
    assert rows == run_cli("predict", slices / "good", "--json").stdout
    assert "must end in .onnx" in run_cli("export", "--out", tmp_path / "mine.keras", code=2).stderr
    (tmp_path / "text.onnx").write_text("I am a text")
    assert "text.onnx" in run_cli("predict", slices / "good", "--model", tmp_path / "text.onnx", code=2).stderr


def test_prediction_reads_ahead_but_never_far(slices, monkeypatch):
    "Results come while files are still unread, and no more than two batches are held."
    from brain_vit import predict
    from brain_vit.predict import load_predictor
    predictor, read = load_predictor(None), []
    one = predict._read_one
    monkeypatch.setattr(predict, "_read_one", lambda found, image_size: read.append(found) or one(found, image_size))
    results = predictor.predict([slices / "good" / "plain.jpeg"] * 200)
    next(results)
    assert 32 <= len(read) <= 64
    assert sum(1 for _ in results) == 199 and len(read) == 200
