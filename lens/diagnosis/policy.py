"""The numbers the engine judges by, in one place, each with its reason. Shares are of the step's usual duration."""

from __future__ import annotations

WARM_UP_STEPS = 2
"""First steps of a run or attempt that are never judged: allocation, autotuning, first batches."""
FIRST_JUDGED_STEPS = 8
"""Steps after warm-up before a rank has a past that one can compare with."""
ENOUGH_STEPS = WARM_UP_STEPS + FIRST_JUDGED_STEPS
"""Fewer finished steps than this and no other finding: `insufficient`."""
REFERENCE_STEPS = 512
"""The past a rank is compared with is never longer than this, so that slow drift does not count as a change."""

SMALLEST_EFFECT = 0.05
"""A cause that costs less of the step need not be named."""
WORTH_KEEPING = 0.03
"""A change that is over stays in the reply while it cost at least this share of all time so far."""
CONFIRMED_BAR = 0.45
UNCONFIRMED_BAR = 1.8
PENDING_BAR = 2.5
"""Shares of what noise could reach that an excess must exceed: low where another signal (a clock that fell, a throttle
bit) says the same, high where the self time stands alone, higher still while the card's next sample is to come."""
UNCONFIRMED_COST = 0.05
"""An excess that stands alone and is over must have cost this share of all time so far."""

SHORTEST_CHANGE_STEPS = 5
"""A shorter burst is noise until it is longer."""
SHORTEST_ENDED_STEPS = 10
CALM_STEPS, CALM_STEPS_MOST = 16, 64
"""A change is over when its last steps together, half as many as it has lasted within these bounds, show less than
CALM_SHARE of it: what comes and goes (a loader that is slow for some batches) is one change."""
CALM_SHARE = 0.4

CUSUM_DRIFT = 0.5
CUSUM_CLIP = 5.0
CUSUM_ALARM = 12.0
"""In robust standard deviations. The clip lets no single stall raise an alarm; drift and alarm level give one false
alarm in about 1e5 steps of independent noise, and the verification stands behind it for noise that is not."""
SMALLEST_SIGMA = 0.01
"""Steps are not known to better than 1 %: a quieter baseline is luck."""
NOISE_WINDOWS = (2, 4, 8, 16, 32, 64)
"""Lengths of moving means whose spread is the run's own noise floor; noise on shared machines is correlated over
tens of steps, so the spread of single steps says little about the spread of means."""

SHORT_PAST_STEPS = 16
"""Noise measured over n steps is taken to be 1 + 16/n times what was seen."""

STANDING_STEPS = 38
STANDING_STEPS_CONFIRMED = 18
"""Equal ranks on a shared machine differ by 15 % over 20 steps in every second window, and in none of 40."""
STANDING_EFFECT = 0.20
"""A rank that was slower than its like since the first step: no past to compare with, so the bar is higher …"""
STANDING_EFFECT_CONFIRMED = 0.08
"""… unless its own card says the same (clock)."""

HANG_STEPS = 10.0
HANG_SECONDS = 5.0
"""`hung` needs no progress for the larger of 10 × p99 step and 5 s; twice that inside slow phases."""
HANG_SECONDS_AT_START = 30.0
"""The first steps compile, connect and load for longer than any later one: nothing is known of their length."""
HANG_SLOW_PHASES = 3.0
"""Inside a slow phase, also three times the longest such phase so far is waited for …"""
HANG_AT_WORK = 10.0
"""… and this many times as long while the process inside it uses a processor."""
SLOW_PHASES = ("checkpoint", "eval", "compile", "recompile")

REPLAY_PIECES = 300_000
REPLAY_STEPS = 64
"""The what-if replays at most this much: its answer is a mean, and more steps do not change it."""

RIVAL_SHARE = 0.2
"""A rival explanation is listed from this probability on."""
