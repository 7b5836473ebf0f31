"""Attaching to a Python process that is already running and was not prepared for it.

`facts` reads what is so; `preflight` says by it what will work and which rule refuses. `inject` lets the target's
own interpreter run one line at a moment when that is safe. That line loads `payload`, which installs the ordinary hooks.
`targets` finds the ranks below a launcher.
"""
