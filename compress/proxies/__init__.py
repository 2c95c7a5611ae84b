"""Proxies: formulas that rank mixed-precision choices unmeasured, hand-written or evolved (EMQ, arXiv 2307.10554)."""
