"""Make a finished pretraining run the weights that ship with the package.

    brain_vit pretrain --images 219136 --lesion-weight 1 --out runs/first
    brain_vit pretrain --from runs/first --images 299008 --seed 1 --out runs/second
    brain_vit pretrain --from runs/second --images 327680 --seed 2 --out runs/third
    brain_vit pretrain --from runs/third --images 1064960 --seed 3 --out runs/fourth
    brain_vit pretrain --from runs/fourth --images 524288 --seed 4 --out runs/fifth
    brain_vit pretrain --from runs/fifth --images 524288 --seed 5 --out runs/sixth
    brain_vit pretrain --from runs/sixth --images 917504 --seed 6 --out runs/seventh
    python benchmarks/bundle.py runs/seventh

The first three stages ran on JAX, the others on TensorFlow, each from the bundled copy of the stage before (`--from bundled`). Before the
fifth stage the phantoms changed: ragged rings, wider swelling, confluent white matter. Before the sixth the model did: each patch's lesion
score became four, one per quarter, which began as the old one.
"""
import hashlib
import json
import sys
from pathlib import Path

from brain_vit.export import export_onnx
from brain_vit.run import save_model
from brain_vit.vit import ViTConfig, build_vit, copy_weights

run = Path(sys.argv[1])
weights = Path(__file__).parent.parent / "brain_vit" / "weights"
config = json.loads((run / "config.json").read_text())
metrics = json.loads((run / "metrics.json").read_text())
weights.mkdir(exist_ok=True)
model_config = ViTConfig(**config["model"])
model = copy_weights(build_vit(model_config), run / "model.keras")
save_model(model, model_config, weights / "small.keras")
card = {
    "name": "small-phantom",
    "heatmap": config.get("heatmap", "lesion"),
    "threshold": config["threshold"],
    "temperature": config["temperature"],
    "sha256": hashlib.sha256((weights / "small.keras").read_bytes()).hexdigest(),
    "trained_on": f"{config['images_seen']:,} views of phantoms, no real image",
    "images_seen": config["images_seen"],
    "seeds": config["seeds"],
    "not_for": "diagnosis of any kind; see the model card in README.md beside this file",
    "config": {key: config[key] for key in ("start", "model", "training", "recipe", "pool_size", "passes", "packages")},
    "held_out_phantoms": metrics["parts"]["test"],
}
export_onnx(model, weights / "small.onnx", **{key: card[key] for key in ("name", "temperature", "threshold", "heatmap", "sha256")})
(weights / "small.json").write_text(json.dumps(card, indent=2) + "\n")
accuracy, area = (metrics["parts"]["test"][name] for name in ("accuracy", "roc_auc"))
(weights / "README.md").write_text(f"""# Model card: small-phantom

A Vision Transformer (preset `small`) trained on {card['trained_on']}; recipe, seeds and versions are in `small.json`.

- **Use**: a starting point for training on real slices, and the default of `brain_vit predict` and `heatmap` for learning.
- **Not for**: diagnosis, triage, or any decision about a patient. It has never seen a real image.
- **Measured** on {metrics['parts']['test']['n']} held-out phantoms, the second half of {2 * metrics['parts']['test']['n']} ({metrics['protocol']}):
  accuracy {accuracy['value']:.3f} ({accuracy['interval'][0]:.3f} to {accuracy['interval'][1]:.3f}),
  ROC-AUC {area['value']:.3f} ({area['interval'][0]:.3f} to {area['interval'][1]:.3f}).
- **SHA-256**: `{card['sha256']}`
""")
print(f"{weights}: {sum(file.stat().st_size for file in weights.iterdir()) / 1e6:.1f} MB")
