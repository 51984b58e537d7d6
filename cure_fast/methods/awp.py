"""AWP as its authors train (Wu et al., NeurIPS 2020, arXiv 2004.05884; code csdongxian/AWP).

AT-AWP and TRADES-AWP are PGD-AT and TRADES with the policy ``awp``, whose file has the algorithm.
Two differences from the official TRADES-AWP remain. It passes the natural images twice per loss,
for which ``--natural-twice`` is there, and the adversarial ones first: BatchNorm's running
statistics differ. And it counts epochs from 1, so that all that it does from an epoch on, AWP and
drops of the rate, begins one epoch earlier than here.
"""

from __future__ import annotations

from dataclasses import replace

from cure_fast.methods.pgd_at import PGD_AT
from cure_fast.methods.trades import TRADES
from cure_fast.policies.awp import AWP
from cure_fast.step.method import SetUp, rows, with_policies

CODE = "csdongxian/AWP"
# Their AT-AWP is built on the code of Rice et al.
RICE = {pattern: found.values for pattern, found in PGD_AT.published.items()}

AWP_AT = with_policies(
    PGD_AT,
    name="awp_at",
    title="AT-AWP: PGD-AT with --policies awp and its authors' length",
    arxiv="2004.05884",
    paper=AWP.paper,
    policies={"awp": replace(AWP.settings, awp_gamma=0.01)},
    published={
        "svhn/*": SetUp(CODE, **RICE["svhn/*"], awp_warmup=5),
        "*": SetUp(CODE, **RICE["*"]),
    },
    rows=rows(
        "AWP + PGD-AT",
        ("cifar10", "preactresnet18", ", best epoch (CURE's Table 3)", 83.33, None, None, 50.57),
        ("cifar10", "wrn34-10", ", best epoch (CURE's Table 3)", 85.57, None, None, 54.04),
    ),
)
AWP_TRADES = with_policies(
    TRADES,
    name="awp_trades",
    title="TRADES-AWP: TRADES with --policies awp and its authors' length",
    arxiv="2004.05884",
    paper=AWP.paper,
    policies={"awp": replace(AWP.settings, awp_gamma=0.005, awp_warmup=10)},
    published={"*": SetUp(CODE, clamp_start=False)},
)
