"""README.md from nbs/index.ipynb: its text, its code and what the code is meant to show, without outputs.

    python tools/readme.py          write README.md
    python tools/readme.py --check  exit 1 if README.md is not what it would write
"""
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent


def readme(top=TOP):
    "The text of README.md."
    import nbformat
    from nbconvert.exporters import MarkdownExporter
    nb = nbformat.read(top/"nbs"/"index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if "hide" not in c.metadata.get("tags", []) and "parameters" not in c.metadata.get("tags", [])]
    text, _ = MarkdownExporter(exclude_input_prompt=True, exclude_output=True).from_notebook_node(nb)
    lines = [o.rstrip() for o in text.replace("](images/", "](nbs/images/").replace('src="images/', 'src="nbs/images/').splitlines()]
    lines = [o for i, o in enumerate(lines) if o or (i and lines[i - 1])]  # one empty line at most
    return "<!-- Made from nbs/index.ipynb by tools/readme.py: edit that. -->\n\n" + "\n".join(lines).strip() + "\n"


def main():
    "The command line."
    path, text = TOP/"README.md", readme()
    if "--check" not in sys.argv: path.write_text(text, "utf-8")
    elif not path.is_file() or path.read_text("utf-8") != text: raise SystemExit("README.md is not what nbs/index.ipynb makes. Run `python tools/readme.py`")


if __name__ == "__main__": main()
