"""Studies that train: lists of runs under one budget, each with a figure; see :mod:`.shape`."""

from __future__ import annotations

from cure_fast.training.studies.ablation import ABLATION
from cure_fast.training.studies.layerwise import LAYERWISE
from cure_fast.training.studies.pretraining import PRETRAINING
from cure_fast.training.studies.rgp_rule import RGP_RULE
from cure_fast.training.studies.sensitivity import SENSITIVITY
from cure_fast.training.studies.shape import Study
from cure_fast.training.studies.toy import TOY

STUDIES: dict[str, Study] = {
    study.name: study for study in (ABLATION, LAYERWISE, PRETRAINING, RGP_RULE, SENSITIVITY, TOY)
}
