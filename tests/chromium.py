"""Pages measured in headless Chromium, each in a frame of its own width and colour scheme."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

# Width in CSS pixels, and what is replaced in the page's style so that the frame is dark, or as on paper.
VIEWS: dict[str, tuple[int, dict[str, str]]] = {
    "desktop": (1280, {}),
    "phone": (390, {}),
    "dark": (1280, {"(prefers-color-scheme: dark)": "(min-width: 1px)"}),
    "letter": (725, {"@media print": "@media all", "@media screen and": "@media speech and"}),  # less margins of 12 mm
    "a4": (703, {"@media print": "@media all", "@media screen and": "@media speech and"}),
}

MEASURE = """
function rgb(text) { const n = text.match(/[\\d.]+/g); return n ? n.map(Number) : [0, 0, 0, 0]; }
function luminance(c) {
  const [r, g, b] = c.slice(0, 3).map(v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(element) {
  for (let e = element; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0.99) return c;
  }
  return [255, 255, 255];
}
function measure(frame) {
  const doc = frame.contentDocument, win = frame.contentWindow, width = doc.documentElement.clientWidth;
  const found = {small: [], pale: [], outside: [], empty: [], unnamed: [], resources: [], texts: 0};
  const root = doc.scrollingElement;
  if (root.scrollWidth > width) found.outside.push('page ' + root.scrollWidth);
  for (const e of doc.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect(), style = win.getComputedStyle(e);
    if (!box.width || style.visibility === 'hidden') continue;
    const inScroll = e.closest('.scroll, pre') && getComputedStyle(e.closest('.scroll, pre')).overflowX !== 'visible';
    const name = e.tagName + ' ' + (e.textContent || '').trim().slice(0, 40);
    if (!inScroll && (box.right > width + 1 || box.left < -1)) found.outside.push(name + ' ' + Math.round(box.right));
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || ['STYLE', 'style', 'TITLE', 'title'].includes(e.tagName)) continue;
    found.texts += 1;
    const svg = e.ownerSVGElement;
    const scale = svg && e.getScreenCTM ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1;
    const size = parseFloat(style.fontSize) * scale;
    if (size < 9) found.small.push(name + ' ' + size.toFixed(1));
    const ink = luminance(rgb(svg ? style.fill : style.color)), ground = luminance(background(svg ? svg.parentElement : e));
    const contrast = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    if (contrast < 4.5) found.pale.push(name + ' ' + contrast.toFixed(2));
  }
  for (const svg of doc.querySelectorAll('svg')) {
    if (!svg.closest('svg svg') && (svg.querySelectorAll('path, use').length < 8 || svg.getBoundingClientRect().height < 40))
      found.empty.push('svg ' + svg.getAttribute('aria-label'));
    if (svg.getAttribute('role') !== 'img' || !svg.getAttribute('aria-label')) found.unnamed.push('svg');
  }
  for (const image of doc.images) {
    if (!image.complete || !image.naturalWidth) found.empty.push('img ' + image.alt);
    if (!image.alt) found.unnamed.push('img');
  }
  for (const cell of doc.querySelectorAll('th')) if (!cell.getAttribute('scope')) found.unnamed.push('th ' + cell.textContent);
  for (const cell of doc.querySelectorAll('thead th')) if (!cell.textContent.trim()) found.unnamed.push('empty th');
  for (const entry of win.performance.getEntriesByType('resource'))
    if (!entry.name.startsWith('data:')) found.resources.push(entry.name);
  return found;
}
window.addEventListener('load', () => {
  const found = {};
  for (const frame of document.querySelectorAll('iframe')) found[frame.id] = measure(frame);
  document.getElementById('found').textContent = JSON.stringify(found);
});
"""


def find_chromium() -> str:
    """The browser's path; the test is skipped where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on the path: apt-get install chromium")
    return found


def measure(pages: Mapping[str, str], folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What a browser finds on each page in each of the :data:`VIEWS`, and what it wrote to its console.

    Returns:
        By ``"page view"`` the texts that are small or pale, elements outside the page, empty or unnamed figures, and what was
        fetched; and the lines of the console.
    """
    frames = []
    for name, page in pages.items():
        for view, (width, swaps) in VIEWS.items():
            changed = page
            for old, new in swaps.items():
                assert old in page, f"{name} has no {old}"
                changed = changed.replace(old, new)
            frames.append(
                f'<iframe id="{name} {view}" style="width: {width}px; height: 3000px; border: 0" '
                f'srcdoc="{html.escape(changed)}"></iframe>'
            )
    wrapper = folder / "wrapper.html"
    body = f'<pre id="found"></pre>{"".join(frames)}<script>{MEASURE}</script>'
    wrapper.write_text(f'<!doctype html><html><head><meta charset="utf-8"></head><body>{body}</body></html>', encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    options += [f"--user-data-dir={folder / 'profile'}", "--blink-settings=preferredColorScheme=1"]
    command = [find_chromium(), *options, f"file://{wrapper}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    text = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert text is not None, done.stderr[-2000:]
    assert text[1], done.stderr[-2000:]
    return json.loads(html.unescape(text[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]
