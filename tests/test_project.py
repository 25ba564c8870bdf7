"The project as a package: importable by name, light, complete as a wheel."
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_public_name_exists_and_none_hides_a_module():
    import brain_vit
    for module, names in brain_vit._PUBLIC.items():
        for name in names:
            assert getattr(brain_vit, name) is getattr(importlib.import_module(f"brain_vit.{module}"), name)
    assert not set(brain_vit._MODULE_OF) & {path.stem for path in (ROOT / "brain_vit").glob("*.py")}


def test_versions_agree():
    import brain_vit
    assert f"version = {brain_vit.__version__}\n" in (ROOT / "settings.ini").read_text()


def test_the_installed_library_needs_no_development_package():
    program = ("import sys, importlib, pkgutil, brain_vit\n"
               "for module in pkgutil.iter_modules(brain_vit.__path__): importlib.import_module(f'brain_vit.{module.name}')\n"
               "print(sorted({'fastcore', 'nbdev', 'execnb', 'pytest'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_each_notebook_has_its_own_module():
    import json
    import re
    modules = []
    for path in (ROOT / "nbs").glob("*.ipynb"):
        cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
        modules += [name for text in cells for name in re.findall(r"^#\|\s*default_exp (\S+)", text, re.MULTILINE)]
    assert len(modules) == len(set(modules))
    assert set(modules) == {path.stem for path in (ROOT / "brain_vit").glob("*.py")} - {"_modidx"}


def test_imports_point_backward_only():
    import json
    import re
    order, imports = {}, {}
    for position, path in enumerate(sorted((ROOT / "nbs").glob("*.ipynb"))):
        cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        name = next((n for text in cells for n in re.findall(r"^#\|\s*default_exp (\S+)", text, re.MULTILINE)), None)
        if name and name != "__init__":
            order[name] = position
            exported = "\n".join(text for text in cells if re.search(r"^#\|\s*export", text, re.MULTILINE))
            imports[name] = set(re.findall(r"^from brain_vit\.(\w+) import", exported, re.MULTILINE))
    for name, used in imports.items():
        for other in used:
            assert order[other] < order[name], f"{name} imports {other}, which comes later"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".venv", ".git", "runs", "build", "nbs", "*.egg-info"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source], check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_modules_and_weights_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"brain_vit/__init__.py", "brain_vit/vit.py", "brain_vit/weights/small.keras", "brain_vit/weights/small.json"} <= set(names)
    assert all(name.startswith(("brain_vit/", "brain_vit-")) for name in names)
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    needed = [line.split()[1] for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line]
    assert not any(name.startswith(("nbdev", "fastcore", "jax", "pytest")) for name in needed)


def test_the_wheel_works_from_another_folder(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    program = ("from brain_vit import Patches, PatchEncoder, TransformerBlock, build_vit, Predictor; import brain_vit; "
               "print(brain_vit.__file__, Predictor.load().name)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path / "site")})
    assert done.stdout.startswith(str(tmp_path)), done.stderr
