"""Notebooks of this repository are saved clean: no outputs, no counters, no metadata of editors. `make install` copies this file into the environment."""
from pathlib import Path


def strip(
    nb,       # a notebook as a dict, changed in place
    allowed,  # keys of cell metadata that stay
):
    "Leave source, ids, allowed cell metadata and the kernel's name."
    from nbdev.clean import clean_nb
    for cell in nb["cells"]:
        if cell["cell_type"] == "code": cell["outputs"] = []
    clean_nb(nb, allowed_cell_metadata_keys=allowed)
    nb["metadata"] = {k: v for k, v in nb["metadata"].items() if k == "kernelspec"}


def save_clean(model, path, contents_manager=None, **_):
    "What JupyterLab calls before it saves a file; notebooks outside a repository with `jupyter_hooks = true` are left alone."
    if model["type"] != "notebook" or model["content"]["nbformat"] != 4: return
    from nbdev.config import get_config
    full = Path(contents_manager._get_os_path(path) if contents_manager else path)
    config = get_config(path=full.parent)
    if config.get("jupyter_hooks") and (config.config_path/config.nbs_path) in full.parents: strip(model["content"], config.allowed_cell_metadata_keys)


if "get_config" in globals(): get_config().ContentsManager.pre_save_hook = save_clean  # noqa: F821 (Jupyter reads this file)
