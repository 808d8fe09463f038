"""Notebooks on committed evidence: percent-format sources, executed by ``analysis.notebooks.build``."""
