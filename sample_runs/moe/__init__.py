"""A small mixture-of-experts language model, trained by several processes on the Python library's own sources.

Read `train.py` first; `model.py`, `data.py` and `parallel.py` are what it trains, on what, and over whom;
`faults.py` breaks it on purpose; `volume.py` says how many bytes each step must send.
"""
