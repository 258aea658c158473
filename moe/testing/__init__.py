"""What a test of a router or a transport needs: meshes, contract checks, an oracle.

Importable by users who write their own router. The oracle is plain NumPy in float64,
one token at a time; it imports no router, no transport and no expert.
"""

from moe.testing.contract import MESHES, broken_rule, check_assignment
from moe.testing.decisions import Decision, Told, decide, router_sums
from moe.testing.one_token import OracleResult, one_token_at_a_time

__all__ = [
    "MESHES",
    "Decision",
    "OracleResult",
    "Told",
    "broken_rule",
    "check_assignment",
    "decide",
    "one_token_at_a_time",
    "router_sums",
]
