"""What frameworks know and hooks cannot: their own steps, evaluations, checkpoints, rollouts and numbers.

`places` and `timers` find it in frameworks that are loaded already, and import none. ``transformers``, ``lightning`` and
``accelerate`` are callbacks; importing one of them imports its framework.
"""
