"The site: links and anchors, the sidebar, the form of every page, alt texts, nothing from another site."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
PAGES = sorted(NBS.glob("*.ipynb"))
NAMES = {path.name for path in PAGES}
LESSONS = [path for path in PAGES if re.match(r"\d\d", path.name) and path.stem not in ("00_base", "17_package")]
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text())
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def text(cell):
    return "".join(cell["source"])


def prose(path):
    "The page's Markdown without its code blocks."
    return re.sub(r"```.*?```", "", "\n\n".join(text(cell) for cell in cells(path, "markdown")), flags=re.DOTALL)


def identifier(heading):
    "The anchor that Pandoc gives to a heading."
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "").replace("$", "").lower()
    words = re.sub(r"[^\w\s.-]", "", words)
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", words.strip())) or "section"


def anchors(path):
    "All anchors of a page. A heading inside a callout is its title and has none."
    found, seen = set(), {}
    for heading in re.findall(r"^#{2,6} (.+)$", re.sub(r"^:::.*?^:::\s*$", "", prose(path), flags=re.DOTALL | re.MULTILINE), re.MULTILINE):
        name = identifier(heading)
        number = seen[name] = seen.get(name, -1) + 1
        found.add(f"{name}-{number}" if number else name)
    return found


def links(source):
    "(text, target) of every Markdown link, and every HTML one."
    return re.findall(r"(?<!!)\[([^]\n]*)\]\(([^)\s]+)\)", source) + [("", target) for target in re.findall(r"<a [^>]*href=\"([^\"]+)\"", source)]


def sidebar_pages(items):
    for item in items:
        if isinstance(item, str):
            yield item
        elif "contents" in item:
            yield from sidebar_pages(item["contents"])
        else:
            yield item["href"]


def test_anchors_are_named_as_pandoc_names_them():
    assert identifier("The library's layer") == "the-librarys-layer"
    assert identifier(r"Why divide by $\sqrt{d_k}$?") == "why-divide-by-sqrtd_k"
    assert identifier("Feed-forward: think about what you heard") == "feed-forward-think-about-what-you-heard"
    assert identifier("253 → 512") == "section"


@every_page
def test_internal_links_lead_somewhere(path):
    for label, target in links(prose(path)):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        page = NBS / file if file else path
        assert page.exists(), f"'{label}' leads to {target}, which is not there"
        if anchor and page.suffix == ".ipynb":
            assert anchor in anchors(page), f"'{label}' leads to {target}, but {page.name} has only {sorted(anchors(page))}"


@every_page
def test_notebooks_named_in_prose_exist(path):
    assert set(re.findall(r"\b[\w]+\.ipynb\b", prose(path))) <= NAMES


@every_page
def test_pictures_have_words(path):
    for alt, target in re.findall(r"!\[([^]]*)\]\(([^)\s]+)\)", prose(path)):
        assert len(alt) > 15, f"the picture {target} has no description"
        assert (NBS / target).exists(), f"the picture {target} is not there"
    for cell in cells(path, "code"):
        if any("image/png" in output.get("data", {}) or "image/svg+xml" in output.get("data", {}) for output in cell["outputs"]):
            assert re.search(r"^#\|\s*fig-alt:\s*\S.{15,}", text(cell), re.MULTILINE), f"a figure without fig-alt:\n{text(cell)[:200]}"


@every_page
def test_nothing_is_fetched_from_another_site(path):
    html = ["".join(output.get("data", {}).get("text/html", "")) for cell in cells(path, "code") for output in cell["outputs"]]
    for source in [prose(path), *html]:
        assert not re.search(r"<(script|iframe|link|img|video|object)\b[^>]*(src|href)=[\"']?(https?:)?//", source, re.IGNORECASE)
        assert not re.search(r"!\[[^]]*\]\((https?:)?//", source)


@every_page
def test_outputs_name_no_folder_of_a_machine(path):
    outputs = json.dumps([cell["outputs"] for cell in cells(path, "code")])
    found = re.search(rf"/(home|Users|root|work)/|{re.escape(str(ROOT))}", outputs)
    assert not found, f"an output shows {found[0]}"
    assert "Traceback" not in outputs


def test_every_page_is_in_the_sidebar_once():
    listed = list(sidebar_pages(CONFIG["website"]["sidebar"]["contents"]))
    assert sorted(listed) == sorted(NAMES)
    assert [item["section"] for item in CONFIG["website"]["sidebar"]["contents"] if "section" in item] == ["Data", "Encoder", "Training", "Trust", "Use"]


def test_the_site_is_complete_and_fetches_no_fonts():
    website, html = CONFIG["website"], CONFIG["format"]["html"]
    assert html["html-math-method"] == "mathml" and {"light", "dark"} <= set(html["theme"]) and website["search"]
    for theme in html["theme"].values():
        assert theme[-1] == "theme.scss"
    assert "$web-font-path: false;" in (NBS / "theme.scss").read_text()
    assert (NBS / website["open-graph"]["image"]).exists() and website["open-graph"]["image-alt"]
    assert (NBS / "_quarto.yml").samefile(ROOT / "_quarto.yml")
    for _, target in links((NBS / "404.qmd").read_text()):
        assert (NBS / target).exists()
    styles = (NBS / "styles.css").read_text() + (NBS / "theme.scss").read_text() + json.dumps(html)
    assert "//" not in re.sub(r"^\s*//.*$", "", styles, flags=re.MULTILINE).replace("/*--", "").replace("--*/", "")


@every_page
def test_a_page_opens_with_title_and_subtitle(path):
    first = text(json.loads(path.read_text())["cells"][0]).strip().splitlines()
    assert first[0].startswith("# ") and [line for line in first[1:] if line][0].startswith("> ")
    assert sum(line.startswith("# ") for line in prose(path).splitlines()) == 1


@every_lesson
def test_a_lesson_closes_with_findings_exercises_and_the_next_page(path):
    headings = re.findall(r"^## (.+)$", prose(path), re.MULTILINE)
    assert [heading for heading in headings if heading in ("What we saw", "Exercises")] == ["What we saw", "Exercises"]
    exercises = prose(path).split("## Exercises")[1]
    assert [int(number) for number in re.findall(r"^(\d)\. ", exercises.split("<details><summary>Answers")[0], re.MULTILINE)] == [1, 2, 3]
    assert exercises.count("<details>") in (1, 3) and exercises.count("<details>") == exercises.count("</details>")
    if path.stem != "16_cli":
        assert re.search(r"^Next: \[[^]]+\]\(\w+\.ipynb\)\s*$", exercises, re.MULTILINE)


def test_the_lessons_follow_one_another():
    order = [path.name for path in LESSONS]
    for path in LESSONS:
        for target in re.findall(r"^Next: \[[^]]+\]\((\w+\.ipynb)\)", prose(path), re.MULTILINE):
            later = order[order.index(path.name) + 1:]
            assert target == (later[0] if later else target), f"{path.name} is followed by {later[:1]}, and links to {target}"


def test_every_slide_has_a_place():
    rows = re.findall(r"^\| (?!slide|---)(.+?) \| (.+?) \| (.+?) \|$", prose(NBS / "slides.ipynb"), re.MULTILINE)
    assert len(rows) > 40
    for slide, shown, where in rows:
        targets = [target for _, target in links(where)]
        assert targets and shown, f"the slide '{slide}' leads nowhere"
        for file, _, anchor in (target.partition("#") for target in targets):
            assert (NBS / file).exists(), f"the slide '{slide}' leads to {file}, which is not there"
            assert not anchor or anchor in anchors(NBS / file), f"the slide '{slide}' leads to {file}#{anchor}; there are {sorted(anchors(NBS / file))}"
    assert {"**Question 1**", "**Question 2**", "**Question 3**"} <= {slide.split(":")[0] for slide, _, _ in rows}


def test_the_results_page_shows_the_committed_files():
    shown = json.dumps([cell["outputs"] for cell in cells(NBS / "results.ipynb", "code")])
    for path in (ROOT / "benchmarks").glob("*.json"):
        row = re.search(rf"\| `{re.escape(path.name)}` \|[^|]*\| ([^|]*) \|", shown)
        assert row and row[1] == "yes", f"{path.name} is newer than the page: run nbs/results.ipynb again"


def test_the_citation_agrees_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    settings = (ROOT / "settings.ini").read_text()
    assert f"version = {citation['version']}\n" in settings
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


PROCESS = """
import os, sys
from pathlib import Path
os.environ["IN_TEST"] = "1"
from nbdev.serve import FilterDefaults
from nbdev.serve_drv import exec_nb
for page in sorted(Path().glob("*.ipynb")):
    exec_nb(page, Path(sys.argv[1]) / page.name, FilterDefaults)
"""


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    "All pages as `nbdev_docs` hands them to Quarto: hidden cells gone, arguments and texts of each exported name in their place."
    folder = tmp_path_factory.mktemp("_proc")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROCESS, str(folder)], cwd=NBS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_site_can_be_made(processed):
    assert {path.name for path in processed.glob("*.ipynb")} == NAMES
    for path in processed.glob("*.ipynb"):
        assert not [text(cell) for cell in cells(path, "code") if re.search(r"^#\|\s*(hide|export)\s*$", text(cell), re.MULTILINE)], path.name


def test_exported_names_are_documented_with_their_arguments(processed):
    shown = (processed / "04_patches.ipynb").read_text()
    assert "### Patches" in shown and "side of a square patch, pixels" in shown


def test_links_lead_somewhere_on_the_processed_pages(processed):
    for path in processed.glob("*.ipynb"):
        for label, target in links(prose(path)):
            file = target.partition("#")[0]
            if file.endswith(".ipynb"):
                assert (processed / file).exists(), f"{path.name}: '{label}' leads to {target}, which is not there"


@pytest.mark.skipif(not os.environ.get("BRAIN_VIT_SITE"), reason="BRAIN_VIT_SITE names no rendered site (_docs)")
def test_the_rendered_site_asks_no_other_site_for_anything():
    site = Path(os.environ["BRAIN_VIT_SITE"])
    for path in site.rglob("*.html"):
        found = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"(?:https?:)?//[^\"]+|<link[^>]*rel=\"(?:stylesheet|preload|preconnect)\"[^>]*href=\"(?:https?:)?//[^\"]+", path.read_text())
        assert not found, f"{path.name} fetches {found[:3]}"
    for path in site.rglob("*.css"):
        assert not re.search(r"@import\s*(url\()?[\"']?(https?:)?//", path.read_text()), f"{path.name} imports from another site"
    for name in ("404.html", "search.json", "slides.html", "results.html", "limits.html", "cite.html", "walkthrough.html"):
        assert (site / name).exists()
