"""A real browser for tests of pages: headless Chromium, and what it found on a page."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")

# Runs on the page itself: opens every table as a keyboard user would, and writes what it found into
# the document. The page's own policy allows no script: it is taken out of the copy.
PROBE = """
<script>
(() => {
  const pixels = (text) => {
    const scale = text.ownerSVGElement.getScreenCTM().a;
    return parseFloat(getComputedStyle(text).fontSize) * scale;
  };
  const figures = [...document.querySelectorAll("figure")].map((figure) => {
    const drawing = figure.querySelector(".drawing");
    const summary = figure.querySelector("summary");
    if (summary) {
      summary.focus();
      summary.click();
    }
    const svg = drawing.querySelector("svg").getBoundingClientRect();
    return {
      title: figure.querySelector("figcaption strong").textContent,
      label: drawing.getAttribute("aria-label"),
      width: svg.width, height: svg.height,
      focused: !summary || document.activeElement === summary,
      open: !summary || figure.querySelector("table").offsetHeight > 0,
      text: Math.min(...[...drawing.querySelectorAll("text")].map(pixels)),
    };
  });
  const page = document.documentElement;
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  parent.postMessage(JSON.stringify({
    figures, width: innerWidth, scroll: page.scrollWidth, lang: page.lang,
    loaded: performance.getEntriesByType("resource").length,
    twice: ids.filter((id, place) => ids.indexOf(id) !== place),
    anchors: [...document.querySelectorAll("nav a")].filter(
      (a) => document.querySelector(a.getAttribute("href")) === null).length,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    colours: ["color", "backgroundColor"].map((key) => getComputedStyle(document.body)[key]),
  }), "*");
})();
</script>
"""

# A window cannot be as narrow as a phone, a frame can. It has the colour scheme of its document.
FRAME = """<!DOCTYPE html>
<html style="color-scheme: light dark"><body><pre id="probe"></pre>
<script>
addEventListener("message", (event) => {
  document.getElementById("probe").textContent = event.data;
});
</script>
<iframe src="%s" width="%d" height="900" style="border: 0"></iframe>
</body></html>
"""


@dataclass
class Seen:
    """What the browser found, and what it wrote to its console."""

    found: dict[str, Any]
    console: list[str]


def chromium() -> str:
    """The browser's path; skips where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser ({', '.join(NAMES)})")
    return found


def look(page: Path, folder: Path, *, width: int, dark: bool) -> Seen:
    """Open a page from disk in a window of some width, in light or dark."""
    copy = folder / f"{page.stem}-probed.html"
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    copy.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME % (copy.name, width), encoding="utf-8")
    done = subprocess.run(
        [
            chromium(),
            "--headless=new",
            "--no-sandbox",  # as root there is none; the page is our own
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,1000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",  # milliseconds of the page's own clock
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (written,) = re.findall(r'<pre id="probe">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert written, f"the page's scripts did not run: {console}"
    return Seen(json.loads(html.unescape(written)), console)
