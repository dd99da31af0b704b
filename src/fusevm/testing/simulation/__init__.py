"""A whole cluster on virtual time: the real control plane on several replicas over one database, simulated hosts, users
and bad luck; one seed decides everything, and the same seed gives the same trace.

    verdict = simulate(seed=7)
    python -m fusevm.testing.simulation --seed 7 --hosts 50 --environments 2000 --replicas 3
"""

from fusevm.testing.simulation.cluster import Verdict, simulate
from fusevm.testing.simulation.scale import FULL, NO_FAULTS, SMALL, Luck, Safeguards, Scale

__all__ = ["FULL", "NO_FAULTS", "SMALL", "Luck", "Safeguards", "Scale", "Verdict", "simulate"]
