"""Policies that go with any method; ``--policies`` chooses from ``POLICIES``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cure_fast.config import Config
from cure_fast.config.checks import find_any
from cure_fast.errors import InputError
from cure_fast.policies.average import EMA
from cure_fast.policies.awp import AWP
from cure_fast.policies.blocks import BLOCKS
from cure_fast.policies.conserve import RGP
from cure_fast.policies.fawa import FAWA
from cure_fast.policies.piat import PIAT
from cure_fast.policies.revision import REVISION
from cure_fast.policies.swa import SWA
from cure_fast.step.policy import PolicyInfo

POLICIES: dict[str, PolicyInfo] = {
    info.name: info for info in (PIAT, AWP, EMA, SWA, FAWA, RGP, REVISION, BLOCKS)
}


def find_policy(name: str) -> PolicyInfo:
    """Return a policy by its name, a plug-in's, or ``package.module:POLICY``; refuse others."""
    expected = "none alone, or some of"
    return find_any("--policies", POLICIES, name, plugins="policies", expected=expected)


def select_policies(config: Config, names: Sequence[str]) -> Config:
    """Return ``config`` with these policies, in this order; those it has keep their settings.

    Raises:
        InputError: for an unknown policy, or one that comes twice.
    """
    chosen = {name: config.policies.get(name, find_policy(name).settings) for name in names}
    if len(chosen) < len(names):
        raise InputError(
            f"--policies: expected each policy once, got {','.join(names)}. Write "
            f"--policies {','.join(chosen)}."
        )
    return replace(config, policies=chosen)
