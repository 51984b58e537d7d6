"""All training methods, one file per paper; ``--method`` chooses from ``METHODS``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatch

from cure_fast.config import Config
from cure_fast.config.checks import check, find_any, flag_of
from cure_fast.config.values import sections
from cure_fast.errors import InputError
from cure_fast.methods.act import ACT
from cure_fast.methods.alp import ALP, ALP_MIX
from cure_fast.methods.ap import AP_AT, AP_MART, AP_TRADES
from cure_fast.methods.ard import ARD
from cure_fast.methods.awp import AWP_AT, AWP_TRADES
from cure_fast.methods.cfa import CFA_AT, CFA_TRADES
from cure_fast.methods.cure import CURE, CURE_EFF, CURE_EFF_OFFICIAL, CURE_OFFICIAL, CURE_PAPER
from cure_fast.methods.fat import FAT, FAT_MART, FAT_TRADES
from cure_fast.methods.fgsm_pgi import FGSM_PGI
from cure_fast.methods.fgsm_rs import FGSM_RS
from cure_fast.methods.gairat import GAIRAT
from cure_fast.methods.hat import HAT
from cure_fast.methods.iad import IAD, IAD2
from cure_fast.methods.idbh import IDBH
from cure_fast.methods.kd_swa import KD_SWA
from cure_fast.methods.las_at import LAS_AT
from cure_fast.methods.lbgat import LBGAT
from cure_fast.methods.mail import MAIL_AT, MAIL_TRADES
from cure_fast.methods.mart import MART
from cure_fast.methods.n_fgsm import N_FGSM
from cure_fast.methods.natural import NATURAL
from cure_fast.methods.nmse import NMSE, PIAT_NMSE
from cure_fast.methods.pgd_at import PGD_AT
from cure_fast.methods.rat import RAT
from cure_fast.methods.seat import SEAT
from cure_fast.methods.st_at import ST_AT
from cure_fast.methods.te import TE, TE_TRADES
from cure_fast.methods.trades import TRADES
from cure_fast.plugins.lookup import loaded, short
from cure_fast.policies import POLICIES, find_policy
from cure_fast.step.method import Method, PaperRow, SetUp

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        CURE,
        CURE_PAPER,
        CURE_OFFICIAL,
        CURE_EFF,
        CURE_EFF_OFFICIAL,
        TRADES,
        MART,
        PGD_AT,
        NATURAL,
        NMSE,
        PIAT_NMSE,
        IDBH,
        AWP_AT,
        AWP_TRADES,
        SEAT,
        HAT,
        KD_SWA,
        ARD,
        IAD,
        IAD2,
        TE,
        TE_TRADES,
        ST_AT,
        RAT,
        CFA_AT,
        CFA_TRADES,
        AP_AT,
        AP_TRADES,
        AP_MART,
        ALP,
        ALP_MIX,
        FAT,
        FAT_TRADES,
        FAT_MART,
        MAIL_AT,
        MAIL_TRADES,
        GAIRAT,
        FGSM_RS,
        N_FGSM,
        FGSM_PGI,
        ACT,
        LBGAT,
        LAS_AT,
    )
}


def find_method(name: str) -> Method:
    """Return a method by its name, a plug-in's, or ``package.module:METHOD``; refuse others."""
    return find_any("--method", METHODS, name, plugins="methods")


def select_method(config: Config, name: str) -> Config:
    """Return ``config`` with the method ``name`` and its preset.

    Settings that the recipe chose stay where the method has the same ones; a method with other
    settings starts from its own defaults, and may lack the networks that the recipe evaluates.
    """
    method = find_method(name)
    same = type(method.settings) is type(config.settings)
    if not same:
        evaluation = replace(config.eval, networks=())
        config = replace(config, settings=method.settings, eval=evaluation)
    return method.preset(replace(config, method=name))


def publish(config: Config) -> Config:
    """Return ``config`` as the method's authors train on its data with its model.

    Raises:
        InputError: if that is not known of the method.
    """
    found = set_up_of(config)
    if found is None:
        known = find_method(config.method).published
        place = f"--method {config.method} on {config.data.data} with {config.model.model}"
        raise InputError(
            f"--regime: expected recipe for {place}, got 'published', which is known for "
            f"{', '.join(known) or 'none'} (DATA/MODEL). Leave it out."
        )
    return found(config)


def set_up_of(config: Config) -> SetUp | None:
    """Return the official set-up of the method for the data and model, None where none is known."""
    place = f"{config.data.data}/{config.model.model}"
    published = find_method(config.method).published
    return next((found for pattern, found in published.items() if fnmatch(place, pattern)), None)


def check_config(config: Config) -> None:
    """Raise ``InputError`` for a configuration whose method and policies contradict."""
    method = find_method(config.method)
    method.check(config)
    check_names(config)
    given_teachers(config)
    averages = [name for name in config.policies if find_policy(name).result is not None]
    if len(averages) > 1:
        raise InputError(
            f"--policies: expected one policy at most whose network is the run's result, got "
            f"{','.join(averages)}. Leave out all of them but one."
        )
    if averages and find_policy(averages[0]).result == method.result:
        raise InputError(
            f"--policies: expected policies that --method {method.name} has not itself, got "
            f"{averages[0]}. Leave it out."
        )


def check_names(config: Config) -> None:
    """Refuse a method or policy from outside with a setting that something else has too."""
    parts, owner = sections(config), {}
    # What may be from outside comes last.
    for section in sorted(parts, key=lambda s: s == "settings" or s in config.policies):
        whose = config.method if section == "settings" else section
        for name in vars(parts[section]):
            if name in owner:
                raise InputError(
                    f"{flag_of(name)}: expected the settings of {whose} to have other "
                    f"names than those of {owner[name]}, got {name} in both. Rename its own."
                )
            owner[name] = whose


def given_teachers(config: Config) -> dict[str, str]:
    """Return the run folder or file of each teacher that ``--teacher`` names.

    Raises:
        InputError: for another word than NAME:RUN, or a name that the method does not learn from.
    """
    method, given = find_method(config.method), {}
    learns = "" if method.teachers else f" (--method {method.name} has none)"
    for word in config.model.teacher:
        name, _, path = word.partition(":")
        known = bool(path) and name in method.teachers and name not in given
        names = ", ".join(method.teachers) or "the method's teachers"
        check(known, "teacher", word, f"NAME:RUN or NAME:FILE, one for each of {names}{learns}")
        given[name] = path
    return given


def labels(method: str, policies: Iterable[str] = ()) -> str:
    """Return what papers call a method with its policies, such as ``TRADES + PIAT + AWP``.

    Names may be from a record: unknown ones stand as they are, those from outside in short, where
    nothing has imported them.
    """
    known = [(method, METHODS.get(method)), *((name, POLICIES.get(name)) for name in policies)]
    return " + ".join(getattr(own or loaded(name), "label", short(name)) for name, own in known)


def result_of(config: Config) -> str:
    """Return the name of the network that is the run's result; ``model`` is the trained one.

    The first policy that names one decides, else the method.
    """
    named = [find_policy(name).result for name in config.policies]
    named.append(find_method(config.method).result)
    return next((name for name in named if name is not None), "model")


def paper_row(config: Config) -> PaperRow | None:
    """Return what is published of the method and its policies with this data set and model.

    A method without a part of its own, such as CURE with ``--no-rgp``, is not what was published;
    other numbers of its settings leave it the method.
    """
    method = find_method(config.method)
    usual = method.preset(replace(config, policies={}, settings=method.settings))
    if config.policies.keys() != usual.policies.keys():
        return None
    own, switches = vars(config.settings), vars(usual.settings)
    if any(own[name] != on for name, on in switches.items() if isinstance(on, bool)):
        return None
    return method.rows.get((config.data.data, config.model.model))
