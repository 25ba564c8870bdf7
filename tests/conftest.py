"What several test files share."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def real_folder():
    "The folder with the challenge's images, where the machine has them."
    folder = os.environ.get("BRAIN_VIT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("BRAIN_VIT_DATA names no folder with real images")
    return Path(folder)


@pytest.fixture
def close_folders(monkeypatch):
    "Make folders of a name impossible to open, whoever runs the tests: for root all others are open."

    def close(name):
        scan = os.scandir

        def refuse(path):
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return close


@pytest.fixture(scope="session")
def run_cli():
    "Call the command in a process of its own, as a user does."

    def run(*arguments, code=0, cwd=None, **environment):
        done = subprocess.run([sys.executable, "-m", "brain_vit.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
                              env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment})
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def slices(tmp_path_factory):
    "A folder with good files of every kind, and broken ones of every kind."
    from brain_vit.phantom import Phantom

    folder = tmp_path_factory.mktemp("slices")
    pictures = [Image.fromarray(Phantom.easy(image_size=size).render(seed=9, index=index).image) for index, size in enumerate((96, 128, 160, 64, 200))]
    good, bad = folder / "good", folder / "bad"
    good.mkdir()
    bad.mkdir()
    pictures[0].save(good / "png named.jpg", format="PNG")
    pictures[1].convert("RGBA").save(good / "with alpha.png")
    pictures[2].convert("P").save(good / "palette.png")
    pictures[3].convert("RGB").crop((0, 5, 64, 50)).save(good / "WIDE.JPG")
    pictures[4].save(good / "plain.jpeg")
    (bad / "text.jpg").write_text("I am a text")
    (bad / "empty.png").write_bytes(b"")
    whole = (good / "plain.jpeg").read_bytes()
    (bad / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (bad / "nothing").mkdir()
    return folder
