"""JupyterLab in a headless browser: a notebook opened and run top to bottom, as a reader does it.

Needs `pip install playwright` and a Chromium: that of `playwright install chromium`, or one on the path."""
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")
from playwright.sync_api import Error, sync_playwright

ROOT = Path(__file__).parent.parent
NOTEBOOK = "results.ipynb"
PATIENCE = 300_000  # ms


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(args=["--no-sandbox"], executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        except Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A server of JupyterLab on a copy of the notebook, so that nothing in the repository changes."
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
    folder = tmp_path_factory.mktemp("lab")
    for name in ("benchmarks", "brain_vit"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "nbs").mkdir()
    notebook = json.loads((ROOT / "nbs" / NOTEBOOK).read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    (folder / "nbs" / NOTEBOOK).write_text(json.dumps(notebook))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = {**os.environ, "PYTHONPATH": str(folder), "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data")}
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0",
                               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder / 'nbs'}"],
                              cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w"))
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()[-2000:]
                time.sleep(0.5)
        yield address, token, folder / "nbs" / NOTEBOOK
    finally:
        server.terminate()
        server.wait(60)


def kernel_is_ready(page):
    "Wait for an idle kernel; JupyterLab may first ask which one, and offers the right one."
    for _ in range(3):
        page.get_by_text("| Idle").wait_for(timeout=PATIENCE)
        page.wait_for_timeout(2000)
        if not page.locator(".jp-Dialog .jp-mod-accept").count():
            return
        page.locator(".jp-Dialog .jp-mod-accept").first.click()
        page.wait_for_timeout(2000)


def code_cells(file):
    return [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]


def test_a_notebook_runs_top_to_bottom_in_jupyterlab(browser, lab):
    address, token, file = lab
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(f"{address}/lab/tree/{NOTEBOOK}?token={token}&reset", timeout=PATIENCE)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=PATIENCE)
    kernel_is_ready(page)
    page.get_by_role("menuitem", name="Run", exact=True).click(timeout=PATIENCE)
    page.get_by_text("Run All Cells", exact=True).click(timeout=PATIENCE)
    cells, deadline = code_cells(file), time.monotonic() + PATIENCE / 1000
    while not all(cell["execution_count"] for cell in cells) and time.monotonic() < deadline:
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2000)
        with contextlib.suppress(json.JSONDecodeError):  # it is being written
            cells = code_cells(file)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert "accuracy" in json.dumps([cell["outputs"] for cell in cells])
    page.close()
