"""The picture of a report that README.md shows: `python tools/picture.py [RUN]`. Needs a chromium."""
import argparse, io, os, shutil, tempfile
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
LIMIT = 300_000  # bytes


def picture(report, out, width=1180, height=1400):
    "Screenshot of the report's top, with as few colours as it takes to stay below the limit."
    from PIL import Image
    from playwright.sync_api import sync_playwright
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser: raise SystemExit("no chromium here (on Debian: apt install chromium)")
    with sync_playwright() as p, tempfile.TemporaryDirectory() as home:
        b = p.chromium.launch(executable_path=browser, env=dict(os.environ, HOME=home),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"])
        page = b.new_page(viewport=dict(width=width, height=height), color_scheme="light")
        page.goto(report.resolve().as_uri())
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        b.close()
    for colours in (256, 128, 64, 32):
        shot.quantize(colours).save(out, optimize=True)
        if out.stat().st_size <= LIMIT: return f"{out.relative_to(TOP)}: {out.stat().st_size/1000:.0f} kB, {colours} colours"
    raise SystemExit(f"{out} is larger than {LIMIT} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="a run folder; the latest one if none is named")
    runs = sorted((TOP/"_runs").glob("*-*/report.html"))
    report = (given := parser.parse_args().run) and given/"report.html" or (runs[-1] if runs else None)
    if not report or not report.is_file(): raise SystemExit(f"no report at {report or '_runs/'}. First: llmlab run")
    print(picture(report, TOP/"nbs"/"images"/"report.png"))
