"""Look at the built site in headless Chromium: `python docs/browse.py docs/_build/html` lists what is wrong with it.

Every page is opened at the width of a desktop and of a phone. Reported are messages on the console, links inside the
site that lead nowhere, images that do not load or have no alternative text, formulas without a size, pages and lines of
code wider than the screen, and a search that finds nothing. With `--shots FOLDER`, a picture of every page at every
width is left there. The exit code is 0 if nothing is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WIDTHS = {"desktop": 1280, "phone": 360}
MOST = 16000  # the highest picture that Chromium makes
PATIENCE = 600  # seconds, for all pages
NAMES = ("chromium", "chromium-browser", "google-chrome")

LOOK = """<!doctype html><meta charset="utf-8"><title>look</title><script>
const pages = PAGES, widths = WIDTHS, found = [], heights = {};
const fetched = new Map();
const settle = () => new Promise(done => setTimeout(done, 50));

async function page(url) {  // the document behind a link, fetched once
  if (!fetched.has(url)) fetched.set(url, fetch(url).then(async r =>
    r.ok ? (r.headers.get("content-type").includes("html")
      ? new DOMParser().parseFromString(await r.text(), "text/html") : true) : null));
  return fetched.get(url);
}

async function links(doc, where) {
  for (const href of new Set([...doc.querySelectorAll("a[href]")].map(a => a.href))) {
    const url = new URL(href);
    if (url.origin !== location.origin) continue;
    const target = await page(url.origin + url.pathname);
    const id = decodeURIComponent(url.hash.slice(1));
    const there = target && (!id || target === true || target.getElementById(id) || target.getElementsByName(id)[0]);
    if (!there) found.push(`${where}: link to ${url.pathname}${url.hash} leads nowhere`);
  }
}

function scrolls(element) {
  for (let e = element.parentElement; e && e !== e.ownerDocument.body; e = e.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)) return true;
  return false;
}

async function look(path, name, width) {
  const frame = document.createElement("iframe"), where = `${path} (${name})`;
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  await new Promise(done => { frame.onload = done; frame.src = path; document.body.append(frame); });
  const doc = frame.contentDocument, root = doc.documentElement;
  const images = [...doc.images];
  for (const image of images) {
    image.loading = "eager";
    if (!image.alt.trim() || image.alt === image.getAttribute("src"))
      found.push(`${where}: image ${image.src} has no alternative text`);
  }
  await Promise.all(images.map(i => i.decode().catch(() => found.push(`${where}: image ${i.src} does not load`))));
  await doc.fonts.ready;
  await settle();
  for (const math of doc.querySelectorAll("math")) {
    const box = math.getBoundingClientRect();
    if (math.checkVisibility() && !(box.width > 1 && box.height > 1))
      found.push(`${where}: a formula has no size: ${math.textContent}`);
    if (math.querySelector("merror")) found.push(`${where}: a formula has an error: ${math.textContent}`);
  }
  if (root.scrollWidth > width) {
    const beyond = e => e.getBoundingClientRect().right > width + 1 && !scrolls(e);
    const wide = [...doc.body.querySelectorAll("*")].find(beyond);
    const what = wide ? wide.outerHTML.slice(0, 120) : "";
    found.push(`${where}: ${root.scrollWidth} pixels wide: ${what}`);
  }
  for (const code of doc.querySelectorAll("pre"))
    if (code.scrollWidth > code.clientWidth && (name === "desktop" || getComputedStyle(code).overflowX !== "auto"))
      found.push(`${where}: a line of code is cut off: ${code.textContent.slice(0, 60)}`);
  heights[where] = root.scrollHeight;
  if (name === "desktop") await links(doc, path);
  frame.remove();
}

async function search(word) {  // an entry of the reference must be among what is found
  const frame = document.createElement("iframe");
  frame.src = `/search.html?q=${word}`;
  document.body.append(frame);
  for (let i = 0; i < 200; i++) {
    if (frame.contentDocument.querySelector(`#search-results a[href*=".${word}"]`)) return;
    await settle();
  }
  found.push(`search: no entry of the reference for ${word}`);
}

window.onload = async () => {
  for (const [name, width] of Object.entries(widths))
    for (const path of pages)
      await look(path, name, width).catch(error => found.push(`${path} (${name}): ${error}`));
  if (pages.includes("/search.html")) await search("multiplier");
  await fetch("/__found__", {method: "POST", body: JSON.stringify({found, heights})});
};
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the site, the page that looks at it, and takes what that has found."""

    def do_GET(self) -> None:
        if self.path != "/__look__":
            return super().do_GET()
        self._answer(self.server.look.encode())

    def do_POST(self) -> None:
        seen = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.found, self.server.heights = seen["found"], seen["heights"]
        self._answer(b"")
        self.server.done.set()

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing: a page that is missing is reported as a link."""


def browser() -> str | None:
    """Return the path of Chromium, or None where it is not installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def serve(site: Path) -> ThreadingHTTPServer:
    """Return a server of the site, running, at a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    pages = ["/" + p.relative_to(site).as_posix() for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]
    server.look = LOOK.replace("PAGES", json.dumps(pages), 1).replace("WIDTHS", json.dumps(WIDTHS), 1)
    server.found, server.done = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def close(server: ThreadingHTTPServer) -> None:
    """Stop a server."""
    server.shutdown()
    server.server_close()


def command(executable: str, profile: str, *options: str) -> list[str]:
    """Return the command line of a headless browser with an empty profile; no sandbox, since it sees our own pages."""
    return [
        executable, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--disable-background-networking", "--no-first-run", f"--user-data-dir={profile}", *options,
    ]  # fmt: skip


def look(site: Path, executable: str, patience: float = PATIENCE) -> tuple[list[str], dict[str, int]]:
    """Return what is wrong with the pages of a site, a line each, and the height of each page at each width."""
    server = serve(site)
    url = f"http://127.0.0.1:{server.server_port}/__look__"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command(executable, profile, "--enable-logging=stderr", "--remote-debugging-port=0", url), stderr=log
        )
        try:
            finished = server.done.wait(patience)
        finally:
            process.terminate()
            process.wait()
            close(server)
        log.seek(0)
        messages = re.findall(r"CONSOLE[:(\d)]*\] (.*)", log.read())
    if not finished:
        return [f"expected all pages to be seen within {patience} s: the browser did not finish"], {}
    found = [*server.found, *(f"console: {message}" for message in dict.fromkeys(messages))]
    return found, server.heights


def shoot(site: Path, executable: str, folder: Path, heights: dict[str, int]) -> None:
    """Leave a picture of every page at every width in a folder."""
    server = serve(site)
    folder.mkdir(parents=True, exist_ok=True)
    for where, whole in heights.items():
        page, name = where.removesuffix(")").split(" (")
        width, height = WIDTHS[name], min(whole, MOST)
        target = folder / f"{page.strip('/').replace('/', '_').removesuffix('.html')}-{name}.png"
        # in a frame, since the window of the browser is never narrower than 500 pixels
        style = f"border:0;width:{width}px;height:{height}px"
        server.look = f"<!doctype html><body style='margin:0'><iframe src='{page}' style='{style}'></iframe>"
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            options = (f"--screenshot={target}", f"--window-size={max(500, width)},{height}", "--timeout=20000")
            url = f"http://127.0.0.1:{server.server_port}/__look__"
            subprocess.run(command(executable, profile, *options, url), check=True, stderr=subprocess.DEVNULL)
    close(server)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--shots", type=Path, help="leave a picture of every page in this folder")
    options = parser.parse_args()
    executable = browser()
    if executable is None:
        print(f"expected one of {', '.join(NAMES)} on the path, found none: install Chromium")
        return 2
    found, heights = look(options.site, executable)
    if options.shots:
        shoot(options.site, executable, options.shots, heights)
    print("\n".join(found) or "nothing is wrong with the pages")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
