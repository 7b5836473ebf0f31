"""A simulated cluster: 8 to 16,384 ranks that compute, meet in collectives, wait for each other, and break.

Only physics is simulated, and what sensors and hooks would read of it; the records are the public ones, so that
`lens diagnose` and a server take them like a real run's. Read `layout`, `condition`, `simulation`, then `faults`.

    python -m sample_runs.cluster --ranks 64 --steps 120 --fault slow_link@40:3 --seed 1 --out DIR
"""

from sample_runs.cluster.cases import Case, Pair, draw_cases, draw_healthy, draw_pairs
from sample_runs.cluster.faults import FAULTS, Fault
from sample_runs.cluster.layout import Layout
from sample_runs.cluster.noise import NOISE
from sample_runs.cluster.services import ServiceCase, draw_served, draw_services
from sample_runs.cluster.serving import Service, serve
from sample_runs.cluster.simulation import Cluster, Outcome, simulate

__all__ = [
    "FAULTS", "NOISE", "Case", "Cluster", "Fault", "Layout", "Outcome", "Pair", "Service", "ServiceCase", "draw_cases",
    "draw_healthy", "draw_pairs", "draw_served", "draw_services", "serve", "simulate",
]  # fmt: skip
