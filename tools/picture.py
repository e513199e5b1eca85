"""The picture of a report that README.md shows: python tools/picture.py [RUN FOLDER]; the latest run if none is named. Needs a chromium."""
import io, os, shutil, sys, tempfile
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
    runs = [Path(o) for o in sys.argv[1:]] or sorted((TOP/"_runs").glob("*-*/report.html"))
    if not runs: raise SystemExit("no run here. First: llmlab run")
    report = runs[-1]/"report.html" if runs[-1].is_dir() else runs[-1]
    print(picture(report, TOP/"nbs"/"images"/"report.png"))
