"""Measure, explain and compose optimisations of language models. The package is exported from the notebooks in `nbs/`."""

__version__ = "0.1.0"
