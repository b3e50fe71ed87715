"""Both pages in a real browser (make test-browser): wide and on a phone, by day and by night."""

import pages
import pytest
from browser import Browser, find

import report

pytestmark = pytest.mark.skipif(not find(), reason="no Chromium: apt-get install chromium")

WINDOW = ["--from", f"{pages.START:%F %T}", "--to", f"{pages.TODAY:%F %T}"]
SCREENS = [(width, dark) for width in (1280, 390) for dark in (False, True)]

# For every piece of text: the ratio of its colour to what is behind it, as WCAG 2 computes it.
CONTRAST_JS = """
(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92
      : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, n) => s + v * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = e => { for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walk.nextNode();) {
    const e = node.parentElement;
    if (!node.textContent.trim() || !e.getClientRects().length || e.closest("svg, script"))
      continue;
    const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent.slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
})()
"""


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def written(conn, dsn, tmp_path):
    """Write both pages of a park full of everything; return their paths."""
    pages.fill(conn)
    for name, args in (("jobs", []), ("alarms", WINDOW)):
        assert report.main([name, *args, "--out", str(tmp_path / f"{name}.html")]) == 0
    return {name: tmp_path / f"{name}.html" for name in ("jobs", "alarms")}


@pytest.mark.parametrize("name", ["jobs", "alarms"])
def test_a_page_fits_complains_of_nothing_fetches_nothing_and_can_be_read(browser, written, name):
    for width, dark in SCREENS:
        browser.open(written[name], width, dark=dark)
        root = "document.documentElement"
        assert browser.js(f"{root}.scrollWidth <= {root}.clientWidth"), (width, dark)
        assert browser.js("innerWidth") == width
        assert browser.complaints() == []
        assert {url for url in browser.requests() if url != "data:,"} == {written[name].as_uri()}
        contrasts = browser.js(CONTRAST_JS)
        assert len(contrasts) > 50
        assert contrasts[0][0] >= 4.5, contrasts[:3]


@pytest.mark.parametrize("name", ["jobs", "alarms"])
def test_every_picture_has_a_title_and_every_cell_a_tip(browser, written, name):
    browser.open(written[name], 1280)
    assert browser.js("[...document.querySelectorAll('svg')].length") > 5
    for bare in ("svg:not(:has(> title))", ".cells > b:not([title])", ".grid:not([aria-label])"):
        assert browser.js(f"document.querySelectorAll({bare!r}).length") == 0, bare
    assert browser.js("[...document.querySelectorAll('rect')].filter(r => r.closest('.grid') "
                      "&& !r.querySelector('title')).length") == 0


def test_the_numbers_on_the_page_are_the_tables(browser, written, conn):
    browser.open(written["jobs"], 1280)
    row = browser.js("""[...document.querySelectorAll('tr')].map(r => [...r.cells].map(c =>
        c.innerText)).find(r => r[0] === 'Alarm Calculation')""")
    ended, failed, waiting = conn.execute("""
        SELECT count(*) FILTER (WHERE is_new) AS ended,
               count(*) FILTER (WHERE is_new AND state = 'Failed') AS failed,
               count(*) FILTER (WHERE state = 'Created') AS waiting
          FROM job_instances, LATERAL (SELECT finished > now() - interval '1 day') AS f(is_new)
        """).fetchone().values()
    assert (row[1], row[3], row[4].split()[0]) == (str(waiting), str(ended), str(failed))
    bar = "document.querySelector('section:nth-of-type(3) rect.done')"
    assert browser.js(f"{bar}.getBoundingClientRect().width / {bar}.closest('svg')"
                      ".getBoundingClientRect().width") == pytest.approx(0.3, abs=0.01)

    browser.open(written["alarms"], 1280)
    bars = browser.js("document.querySelectorAll('section:first-of-type rect.mark').length")
    assert bars == conn.execute("SELECT count(*) FROM alarms_history").fetchone()["count"]


def test_a_page_that_is_not_made_again_says_that_it_is_stale(browser, written):
    page = written["jobs"]
    browser.open(page, 1280)
    assert browser.js("document.getElementById('stale').hidden") is True
    old = page.with_name("old.html")
    old.write_text(page.read_text().replace('data-due="', 'data-due="1'))  # far in the future
    browser.open(old, 1280)
    assert browser.js("document.getElementById('stale').hidden") is True
    old.write_text(page.read_text().replace(' data-due="1', ' data-due="0'))
    browser.open(old, 1280)
    assert browser.js("document.getElementById('stale').hidden") is False
    assert browser.js("document.getElementById('stale').getBoundingClientRect().height") > 20


def test_a_page_is_whole_without_a_script_and_prints(browser, written):
    try:
        browser.call("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(written["jobs"], 1280)
        tree = browser.call("DOMSnapshot.captureSnapshot", computedStyles=[])
        assert "Needs attention" in tree["strings"]
        assert "step 4 of 10" in tree["strings"]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert len(browser.call("Page.printToPDF", printBackground=True)["data"]) > 10_000
