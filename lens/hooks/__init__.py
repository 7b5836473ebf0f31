"""The hook inside a training process: it notes what happens into a ring, and does nothing else.

No thread, no socket, no lock, no device synchronisation; nothing that training computes is changed. `api` is what
``import lens`` calls; a `session` is one watched process, made of `guard.Part`s that switch off one by one when
something is wrong with them.
"""
