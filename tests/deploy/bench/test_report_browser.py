"""The page in a real browser: nothing scrolls sideways, nothing is fetched, nothing complains, on a desk and on a phone."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from tests.deploy.bench.samples import result_of, rows_of
from txl_deploy.bench.published import published_tables
from txl_deploy.bench.report import Findings, write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
        try:
            opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser starts here: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    rows = rows_of((1, 2, 32))
    rows[1] = dataclasses.replace(rows[1], valid=False, invalid_reasons=("it drifts by 9 %",))
    found = Findings(benches=[("benchmark.json", dataclasses.replace(result_of(rows), unvalidated=True))])
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report(found, out, published=published_tables("t4"))
    return out


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_loads_nothing_and_does_not_complain(browser, page_file, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints, fetched = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(page_file.as_uri())
    assert complaints == []
    assert [address for address in fetched if not address.startswith("data:")] == [page_file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    for section in ("In short", "Speed", "Proof", "How it was measured", "Published by NVIDIA, not measured here"):
        assert page.get_by_role("heading", name=section).first.is_visible(), section
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    dark = sum(int(part) for part in paper[4:-1].split(",")) < sum(int(part) for part in ink[4:-1].split(","))
    assert dark == (scheme == "dark")
    page.close()
