"""The report: complete, offline, and fit for a browser (where there is one)."""

import json
import os
import re
import subprocess
import sys
from urllib.parse import urldefrag

import pytest

from sdaug_utils.site import pages
from sdaug_utils.study import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The report of experiments 03 and 05 at smoke."""
    folder = tmp_path_factory.mktemp("site")
    store = {"SDAUG_STORE": str(folder / "store")}
    own = {"SDAUG_OUTPUT": str(folder)}
    run = ["run_all.py", "--profile", "smoke", "--only", "03", "05", "--output", folder / "runs"]
    report = ["-m", "sdaug_utils", "report", "--runs", folder / "runs"]
    there = {name: value for name, value in os.environ.items() if name not in own | store}
    for command, more in ((run, own | store), (report, {})):  # which a run's record knows
        subprocess.run([sys.executable, *command], cwd=ROOT, env=there | more, check=True)
    return folder / "runs" / "report"


@pytest.fixture
def opened(browser):
    """A page, with what it complained about and whom it asked for anything."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    complaints, asked = [], []
    page.on(
        "console",
        lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    return page, complaints, asked


def test_there_is_a_page_for_every_notebook_and_all_links_lead_somewhere(site):
    names = {path.name for path in site.glob("*.html")}
    executed = {path.stem for path in site.parent.glob("*.ipynb")}
    assert names == {"index.html", "gallery.html"} | {f"{stem}.html" for stem in executed}
    for path in site.glob("*.html"):
        text = path.read_text()
        links = {urldefrag(link)[0] for link in re.findall(r'(?:href|src)="([^"]*)"', text)}
        own = {link for link in links if not link.startswith(("http", "data:", "../"))}
        there = {file.relative_to(site).as_posix() for file in site.rglob("*")}
        assert own - {""} <= there, path.name
        of_project = {link for link in links if link.startswith("../")}
        assert all((path.parent / link).exists() for link in of_project), path.name
        inside = {urldefrag(link)[1] for link in re.findall(r'href="(#[^"]+)"', text)}
        assert inside <= set(re.findall(r'id="([^"]+)"', text)), path.name
        assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="http', text)
        assert re.search(r"<title>.+</title>", text)
    assert (
        'rel="prev" href="03-training-percentage.html"'
        in (site / "05-all-generated.html").read_text()
    )


def test_the_front_page_shows_figure_verdicts_and_what_ran_where(site):
    front = (site / "index.html").read_text()
    assert f'src="{pages.MAIN_FIGURE}"' in front
    assert len(re.findall(r'<tr data-chapter="(?:03|05|X)"', front)) > 10
    record = json.loads((site.parent / pages.RECORD).read_text())
    assert record["commit"] is None or record["commit"] in front
    for name, facts in record["notebooks"].items():
        assert name in front
        assert facts["images"] > 0
        assert facts["minutes"] >= 0
    assert record["of which making"] > 0
    assert record["peak memory of a process, GiB"] > 0.3
    for title in ("Hardware", "Software and models"):
        assert f"<h3>{title}</h3>" in front


def test_a_gallery_has_every_pool_with_its_seeds(site):
    pools = json.loads((site / "pools.js").read_text().split("=", 1)[1].rstrip(";\n"))
    used = json.loads((site.parent / pages.RECORD).read_text())["notebooks"].values()
    assert len(pools) == len({pool for facts in used for pool in facts["pools"]})
    assert {pool["technique"] for pool in pools} >= {"DreamBooth", "Textual inversion"}
    for pool in pools:
        assert (site / pool["sheet"]).exists()
        for image in pool["images"]:
            assert image["attempts"] >= 1
            is_real = pool["technique"] == "Copies (placebo)"  # nothing was sampled
            assert image["seed"] == "" if is_real else int(image["seed"]) > 0
            assert -1 <= image["similarity"] <= 1


def test_without_an_executed_notebook_there_is_nothing_to_report(tmp_path):
    with pytest.raises(pages.InputError, match="no executed notebook"):
        pages.write_site(tmp_path)


def test_links_lead_to_pages_and_to_the_project(tmp_path):
    site = ROOT / "runs" / "any" / "report"
    html = '<a href="03-a.ipynb#One-run"></a><a href="10-b.ipynb"></a><a href="../params/x.yaml">'
    assert pages.with_links(html, ["03-a"], site) == (
        '<a href="03-a.html#One-run"></a><a href="../../../notebooks/10-b.ipynb"></a>'
        '<a href="../../../params/x.yaml">'
    )


@pytest.mark.parametrize("width", [390, 1400])
def test_every_page_opens_without_a_complaint(site, opened, width):
    page, complaints, asked = opened
    page.set_viewport_size({"width": width, "height": 900})
    for path in sorted(site.glob("*.html")):
        page.goto(path.as_uri())
        page.wait_for_load_state("load")
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert page.evaluate(broken) == 0, path.name
        assert page.evaluate("[...document.images].filter(i => !i.alt).length") == 0, path.name
        wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wider <= 0, f"{path.name} is wider than a screen of {width} pixels"
    assert complaints == []
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}


def test_filters_leave_what_is_chosen(site, opened):
    page, _, _ = opened
    page.goto((site / "index.html").as_uri())
    every = page.locator("#claims tbody tr")
    shown = page.locator("#claims tbody tr:visible")
    assert shown.count() == every.count() > 10
    page.uncheck("input[name=chapter][value='03']")
    left = page.locator("#claims tbody tr[data-chapter='05']")
    others = page.locator("#claims tbody tr[data-chapter='X']")
    assert shown.count() == left.count() + others.count() < every.count()
    assert page.inner_text("#shown") == f"{shown.count()} of {every.count()} claims"


def test_a_gallery_is_narrowed_down(site, opened):
    page, complaints, _ = opened
    page.goto((site / "gallery.html").as_uri())
    page.select_option("select[name=technique]", "DreamBooth")
    page.select_option("select[name=draw]", "1")
    titles = page.locator("#pools h2").all_inner_texts()
    assert titles
    assert all(title.startswith("DreamBooth") and title.endswith("draw 1") for title in titles)
    assert page.locator("#pools [role=img]").first.get_attribute("aria-label")
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(site, browser, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = browser.new_context(color_scheme=scheme).new_page()
    for path in sorted(site.glob("*.html")):
        page.goto(path.as_uri())
        found = axe.run(page).response["violations"]
        serious = {one["id"] for one in found if one["impact"] in ("serious", "critical")}
        assert not serious, f"{path.name}: {found}"
