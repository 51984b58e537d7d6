"""Attacks on a finished model by name, as ``--attacks`` takes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cure_fast.config.checks import nearest, shown
from cure_fast.errors import InputError

# What `attacks` takes, for listings.
ATTACKS = {
    "natural": "no attack",
    "fgsm": "one step of length eps along the sign of the gradient of the cross-entropy",
    "pgdK": "K steps (1 to 1000) on the cross-entropy, uniform start, last iterate",
    "cwK": "K steps (1 to 1000) on the margin loss (Carlini, Wagner), uniform start, last iterate",
    "aa": "AutoAttack, version standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square",
}


NAMES = {
    "natural": "Natural",
    "fgsm": "FGSM",
    "aa": "AutoAttack",
    # The attacks that AutoAttack is made of.
    "apgd-ce": "APGD-CE",
    "apgd-t": "APGD-T",
    "fab-t": "FAB-T",
    "square": "Square",
}


def attack_name(attack: str) -> str:
    """Return what people read instead of an attack's word: ``PGD-20`` for ``pgd20``."""
    if steps := re.fullmatch(r"(pgd|cw)(\d+)", attack):
        return f"{'PGD' if steps[1] == 'pgd' else 'C&W'}-{steps[2]}"
    return NAMES.get(attack, attack)


@dataclass(frozen=True)
class AttackSpec:
    """An attack by name, as the user writes it, with its number of gradient steps if it has one."""

    name: str
    family: Literal["natural", "fgsm", "pgd", "cw", "aa"]
    steps: int = 0


def parse_attack(text: str) -> AttackSpec:
    """Return the attack that ``text`` names; raise ``InputError`` with the valid forms if none."""
    if text in ("natural", "fgsm", "aa"):
        return AttackSpec(text, text, 1 if text == "fgsm" else 0)
    if found := re.fullmatch(r"(pgd|cw)([1-9][0-9]{0,2}|1000)", text):
        return AttackSpec(text, "pgd" if found[1] == "pgd" else "cw", int(found[2]))
    examples = ("natural", "fgsm", "pgd20", "cw20", "aa")
    raise InputError(
        f"--attacks: expected {', '.join(ATTACKS)} with K from 1 to 1000 (such as pgd20), "
        f"with commas between, got {shown(text)}.{nearest(text, examples)}"
    )
