"""Configuration: checks, fractions, the way to JSON and back, recipes and presets."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cure_fast.cli.configure import read_config
from cure_fast.config import (
    AttackConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
)
from cure_fast.config.checks import format_pixel, parse_fraction
from cure_fast.config.values import digest, from_dict, to_dict
from cure_fast.errors import InputError
from cure_fast.loaders import DATASETS
from cure_fast.methods import METHODS, check_config, labels, paper_row, select_method
from cure_fast.methods.cure import CureSettings
from cure_fast.methods.trades import TradesSettings
from cure_fast.models import MODELS
from cure_fast.policies import POLICIES, select_policies
from cure_fast.recipes import RECIPES, find_recipe
from cure_fast.runs.folder import config_from_dict
from cure_fast.training.choices import CHOICES

SECTIONS = (
    DataConfig,
    ModelConfig,
    PretrainConfig,
    AttackConfig,
    OptimConfig,
    EvalConfig,
    RunConfig,
)


def test_no_two_fields_share_a_flag():
    for method in METHODS.values():
        kind = type(method.settings)
        policies = [policy for name, policy in POLICIES.items() if goes_with(method, name)]
        assert len(policies) >= len(POLICIES) - 2
        kinds = (*SECTIONS, kind, *(type(policy.settings) for policy in policies))
        names = [f.name for s in kinds for f in dataclasses.fields(s)]
        names += [*CHOICES, "resume", "override"]
        assert len(names) == len(set(names))


def goes_with(method, policy):
    """Whether the policy is none that the method has itself, with flags of the same names."""
    config = Config(
        method=method.name, settings=method.settings, policies={policy: POLICIES[policy].settings}
    )
    try:
        method.check(method.preset(config))
    except InputError as error:
        return "has not itself" not in str(error)
    return True


@pytest.mark.parametrize("name", POLICIES)
def test_a_policys_flags_begin_with_its_name(name):
    assert all(field.startswith(f"{name}_") for field in vars(POLICIES[name].settings))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_with_every_method_survives_json(recipe, method):
    config = select_method(find_recipe(recipe), method)
    again = config_from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config and type(again.settings) is type(config.settings)


def test_a_configuration_without_settings_has_the_methods_own():
    values = to_dict(with_words("quickstart", "--method trades"))
    del values["settings"]
    assert config_from_dict(values).settings == METHODS["trades"].settings


def test_policies_survive_json_in_their_order_with_their_settings():
    config = select_policies(find_recipe("quickstart"), ["piat", "ema", "awp"])
    settings = dataclasses.replace(config.policies["awp"], awp_gamma=0.25)
    config = dataclasses.replace(config, policies={**config.policies, "awp": settings})
    again = config_from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config and list(again.policies) == ["piat", "ema", "awp"]
    # Choosing anew keeps the settings of those that were there.
    assert select_policies(again, ["awp"]).policies == {"awp": settings}


@pytest.mark.parametrize(
    ("recipe", "percentile", "alpha", "gamma"),
    [
        ("cifar10-resnet18", 30, 0.1, 1),
        ("cifar100-resnet18", 30, 0.1, 1),
        ("svhn-resnet18", 30, 0.2, 1),
        ("cifar10-wrn34-10", 50, 0.3, 0.5),
        ("cifar100-wrn34-10", 50, 0.3, 0.5),
        ("cifar10-preactresnet18", 20, 0.2, 1),
    ],
)
def test_recipes_are_the_rows_of_table_9(recipe, percentile, alpha, gamma):
    config = find_recipe(recipe)
    s = config.settings
    assert (s.percentile, s.alpha, s.gamma) == (percentile, alpha, gamma)
    assert (config.optim.lr, config.optim.epochs, config.optim.milestones) == (
        0.1,
        200,
        (0.5, 0.75),
    )
    assert (s.revision_rate, s.revision_decay) == (0.2, 0.999)
    assert (config.attack.eps, config.attack.step_length) == (8 / 255, 2 / 255)
    assert recipe == f"{config.data.data}-{config.model.model}"
    row = paper_row(config)
    about = RECIPES[recipe].about
    if row:
        published = [v for v in (row.natural, row.pgd20, row.cw20, row.aa) if v is not None]
        assert all(f"{value:.2f}" in about for value in published)


def test_choosing_a_method_keeps_the_recipes_settings_where_it_has_them():
    svhn = find_recipe("svhn-resnet18")
    assert select_method(svhn, "cure_official").settings.alpha == 0.2
    assert select_method(svhn, "trades").settings == TradesSettings()
    eff = select_method(svhn, "cure_eff")
    assert eff.settings.natural_share == 0.4 and eff.pretrain.pretrain_epochs == 0


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.031", 0.031), ("1e-3", 1e-3), ("2", 2.0)]
)
def test_fractions_and_decimals(text, value):
    assert parse_fraction(text) == value


@pytest.mark.parametrize("text", ["8/0", "", "a", "1/2/3", "nan", "inf", "-inf", "8/nan", "/3"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError):
        parse_fraction(text)


@given(st.integers(1, 254))
def test_whole_255ths_are_shown_as_fractions(steps):
    assert format_pixel(steps / 255) == f"{steps}/255"
    assert parse_fraction(format_pixel(steps / 255)) == steps / 255


BAD = [
    (OptimConfig, "batch_size", 0),
    (OptimConfig, "batch_size", -3),
    (OptimConfig, "lr", 0.0),
    (OptimConfig, "lr", float("nan")),
    (OptimConfig, "momentum", 1.0),
    (OptimConfig, "weight_decay", -1e-4),
    (OptimConfig, "milestones", (0.75, 0.5)),
    (OptimConfig, "milestones", (0.5, 100.0)),
    (OptimConfig, "lr_factors", (0.1,)),
    (OptimConfig, "lr_factors", (0.1, 1.5)),
    (OptimConfig, "lr_factors", (0.1, float("nan"))),
    (OptimConfig, "clip_grad", 0.0),
    (OptimConfig, "schedule", "exponential"),
    (AttackConfig, "eps", 8.0),
    (AttackConfig, "eps", -0.1),
    (AttackConfig, "attack_steps", -1),
    (AttackConfig, "start", "gauss"),
    (DataConfig, "data", " "),
    (DataConfig, "val_images", 0),
    (DataConfig, "loader", "gpu"),
    (DataConfig, "augment", "idbh"),
    (DataConfig, "crop_mode", "edge"),
    (ModelConfig, "width", 0),
    (PretrainConfig, "pretrain_epochs", -1),
    (EvalConfig, "limit", 0),
    (EvalConfig, "eval_eps", float("inf")),
    (RunConfig, "seed", -1),
    (RunConfig, "amp", "fp8"),
    (CureSettings, "percentile", 101.0),
    (CureSettings, "alpha", -0.1),
    (CureSettings, "revision_rate", 1.5),
    (CureSettings, "score", "norm"),
    (TradesSettings, "beta", float("nan")),
]


@pytest.mark.parametrize(("kind", "name", "value"), BAD, ids=str)
def test_a_bad_value_names_its_flag_and_itself(kind, name, value):
    with pytest.raises(InputError) as caught:
        kind(**{name: value})
    assert f"--{name.replace('_', '-')}" in str(caught.value) and repr(value) in str(caught.value)


def test_nesterov_needs_momentum_and_rgp_needs_its_own_gradient():
    with pytest.raises(InputError, match="nesterov"):
        OptimConfig(nesterov=True, momentum=0)
    with pytest.raises(InputError, match="update"):
        CureSettings(objective="rgp", update="prominence")


@pytest.mark.parametrize(
    "change",
    [
        {"colour": 1},
        {"data": {"dta": "x"}},
        {"data": 3},
        {"optim": {"epochs": "many"}},
        {"optim": {"epochs": True}},
        {"optim": {"milestones": 0.5}},
        {"data": {"flip": 1}},
        {"eval": {"limit": "all"}},
        {"method": "curee"},
        {"policies": ["piat"]},
        {"policies": {"pait": {}}},
        {"policies": {"piat": {"piat_share": 2}}},
        {"policies": {"piat": {"awp_gamma": 1}}},
    ],
    ids=str,
)
def test_a_stored_configuration_with_wrong_entries_is_refused(change):
    values = to_dict(find_recipe("quickstart"))
    for name, value in change.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    with pytest.raises(InputError):
        config_from_dict(values)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(field=st.sampled_from([f.name for f in dataclasses.fields(Config)]), value=json_values)
def test_any_json_gives_a_configuration_or_an_input_error(field, value):
    values = to_dict(find_recipe("quickstart")) | {field: value}
    try:
        config = config_from_dict(values)
    except InputError:
        return
    assert to_dict(config)[field] is not None


def test_missing_entries_take_their_defaults():
    assert from_dict(OptimConfig, {"epochs": 3}) == OptimConfig(epochs=3)


def test_digest_ignores_order_and_sees_every_value():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_unknown_recipes_and_methods_list_the_valid_ones():
    with pytest.raises(InputError, match=r"quickstart, cifar10-small.*you meant quickstart"):
        find_recipe("quikstart")
    with pytest.raises(InputError, match=r"cure_paper.*you meant trades"):
        select_method(find_recipe("quickstart"), "trade")


def with_words(recipe, words):
    return read_config(recipe, words.split(), "x", {})[0]


def test_the_label_is_the_method_with_its_policies():
    told = {
        "--method trades": "TRADES",
        "--method trades --policies piat,awp": "TRADES + PIAT + AWP",
        "--method piat_nmse": "NMSE + PIAT",
        "--method piat_nmse --policies piat,awp": "NMSE + PIAT + AWP",
        "--policies ema": "CURE + EMA",
    }
    configs = {words: with_words("quickstart", words) for words in told}
    assert {w: labels(c.method, c.policies) for w, c in configs.items()} == told


def test_a_paper_row_is_of_the_same_method_with_the_same_policies():
    def row(words):
        found = paper_row(with_words("cifar10-resnet18", words))
        return found and found.row

    assert row("") == "CURE, ResNet-18, CIFAR-10 (Table 1)" == row("--method cure_official")
    assert row("--policies awp") is None and row("--method natural") is None
    assert row("--data digits") is None and row("--model resnet34") is None
    assert row("--no-rgp") is None and row("--no-revision") is None
    assert row("--alpha 0.5") == row("")
    assert row("--method trades").startswith("TRADES, ") and "CURE's" in row("--method trades")
    assert row("--method cure_eff").startswith("CURE_Eff, ")
    assert row("--method piat_nmse").startswith("PIAT + NMSE, ")
    assert row("--method piat_nmse --policies piat,awp") is None
    assert (
        row("--method nmse").startswith("NMSE, ") and row("--method nmse --policies piat") is None
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_published_row_names_its_table_and_method(name):
    method = METHODS[name]
    for (data, model), row in method.rows.items():
        assert data in DATASETS and model in MODELS
        assert "Table" in row.row or "README" in row.row
        assert row.row.split(",")[0].split()[-1] in method.label
        figures = [v for v in (row.natural, row.pgd20, row.cw20, row.aa) if v is not None]
        # A stronger attack leaves less; in a row that is copied wrongly it often would not.
        assert len(figures) > 1 and figures == sorted(figures, reverse=True)


def test_the_published_regime_depends_on_data_and_model_and_gives_way_to_flags():
    def optim(words):
        config = with_words("cifar10-resnet18", f"--regime published {words}")
        assert config.pretrain.pretrain_epochs == 0
        o = config.optim
        return o.lr, o.epochs, o.weight_decay

    assert optim("--method piat_nmse") == (0.01, 120, 3.5e-3)
    assert optim("--method piat_nmse --model wrn34-10") == (0.1, 180, 7e-4)
    assert optim("--method trades") == (0.1, 200, 5e-4)
    assert optim("--method trades --model wrn34-10 --epochs 3") == (0.1, 3, 2e-4)
    assert optim("--method pgd_at --data svhn") == (0.01, 200, 5e-4)
    published = with_words("quickstart", "--method trades --regime published")
    assert (published.attack.eps, published.eval.eval_eps) == (0.031, 8 / 255)
    assert published.data == find_recipe("quickstart").data
    rice = with_words("cifar10-resnet18", "--method pgd_at --regime published")
    assert (rice.attack.start, rice.attack.attack_mode) == ("uniform", "train")
    assert (rice.data.crop_mode, rice.model.normalize) == ("reflect", "dataset")
    # The controlled comparison keeps the recipe's schedule.
    recipe = find_recipe("cifar10-resnet18")
    for words in ("--method pgd_at", "--method trades --regime recipe"):
        assert with_words("cifar10-resnet18", words).optim == recipe.optim


def test_presets_may_set_policies_and_the_command_line_replaces_them():
    def policies(words):
        return list(with_words("quickstart", words).policies)

    assert policies("") == [] and policies("--method piat_nmse") == ["piat"]
    assert policies("--method piat_nmse --policies awp,piat") == ["awp", "piat"]
    assert policies("--policies awp,piat --awp-gamma 0.5") == ["awp", "piat"]
    assert policies("--method nmse --policies none") == []
    config = with_words("quickstart", "--policies awp,piat --awp-gamma=1/2 --piat-share 0.25")
    assert config.policies["awp"].awp_gamma == 0.5 and config.policies["piat"].piat_share == 0.25


def test_policies_that_contradict_are_refused(monkeypatch):
    config = select_policies(find_recipe("quickstart"), ["ema", "piat", "swa"])
    with pytest.raises(InputError, match=r"--policies: expected one .* got ema,swa\. Leave out"):
        check_config(config)
    check_config(select_policies(config, ["piat", "swa"]))
    averaging = dataclasses.replace(METHODS["natural"], name="averaging", result="ema")
    monkeypatch.setitem(METHODS, "averaging", averaging)
    config = dataclasses.replace(select_policies(config, ["ema"]), method="averaging")
    with pytest.raises(InputError, match=r"that --method averaging has not itself, got ema"):
        check_config(config)
