"""The configuration's door: valid sections pass unchanged, bad ones are refused with all their problems."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedgmr_plugin.config import ConfigRefused, FedGMRConfig, effective, json_schema, parse
from fedgmr_plugin.errors import CATALOGUE, ConfigError
from fedgmr_plugin.methods import options_of

WHERE = "fedml_config.yaml: fedgmr_args"
PROPERTIES = json_schema()["properties"]


def refusal(text: str) -> ConfigRefused:
    """The error that a YAML section raises."""
    with pytest.raises(ConfigError) as caught:
        parse(yaml.safe_load(text), where=WHERE)
    assert isinstance(caught.value, ConfigRefused)
    return caught.value


# -- good input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [None, {}, yaml.safe_load("fedgmr_args:")["fedgmr_args"]])
def test_an_empty_section_means_the_defaults(section: object) -> None:
    assert parse(section, where=WHERE) == FedGMRConfig()


def test_yaml_types() -> None:
    config = parse(
        yaml.safe_load(
            """
            density_min: 1              # a whole number where a fraction is asked
            densities: [1, .5, 5.0e-2]
            local_steps: epochs
            heterogeneity: none         # a word in YAML, not null
            time_budget:                # null
            shuffle: no
            dense_layers: ["encoder.*"]
            trigger: none
            """
        ),
        where=WHERE,
    )
    assert config.density_min == 1.0 and type(config.density_min) is float
    assert config.densities == (1.0, 0.5, 0.05)
    assert config.local_steps == "epochs"
    assert config.heterogeneity == "none" and config.trigger == "none"
    assert config.time_budget is None
    assert config.shuffle is False
    assert config.dense_layers == ("encoder.*",)


# -- bad input, one problem ------------------------------------------------------------------------

BAD = [
    # unknown keys
    ("density_mn: 0.1", "GMR-101", "density_mn", "Did you mean `density_min`?"),
    ("Interval: 3", "GMR-101", "Interval", "Did you mean `interval`?"),
    ("comm_round: 3", "GMR-101", "comm_round", "delete the key"),
    ("1: 2", "GMR-101", "1", "1 is not a key"),
    ("true: 2", "GMR-101", "True", "true is not a key"),
    # types
    ("density_min: true", "GMR-102", "density_min", "density_min=true is a boolean"),
    ("interval: true", "GMR-102", "interval", "a whole number in [1, inf)"),
    ("local_steps: true", "GMR-102", "local_steps", "or `epochs`"),
    ('density_min: "0.5"', "GMR-102", "density_min", "Write 0.5 without quotes"),
    ('interval: "5"', "GMR-102", "interval", "Write 5 without quotes"),
    ("density_min: 1e-3", "GMR-102", "density_min", "write 1.0e-3"),
    ("server_upload: 1.5e3", "GMR-102", "server_upload", "write 1.5e+3"),
    ("interval: 1e3", "GMR-102", "interval", "write 1000"),
    ("density_min: ten", "GMR-102", "density_min", "is text; it must be a number in (0, 1]"),
    ("interval: 5.0", "GMR-102", "interval", "Write 5."),
    ("interval: 5.5", "GMR-102", "interval", "interval=5.5 is a fraction"),
    ("local_steps: 5.0", "GMR-102", "local_steps", "Write 5."),
    ("density_min:", "GMR-102", "density_min", "density_min=null is empty"),
    ("density_min: [0.5]", "GMR-102", "density_min", "is a list"),
    ("density_min: {a: 1}", "GMR-102", "density_min", "is a section"),
    ("densities: 0.5", "GMR-102", "densities", "Write a list: [0.5]."),
    ("densities: [1, true, 0.5]", "GMR-102", "densities[1]", "densities[1]=true is a boolean"),
    ("densities: [[1]]", "GMR-102", "densities[0]", "is a list"),
    ("dense_layers: encoder.*", "GMR-102", "dense_layers", 'Write a list: ["encoder.*"].'),
    ("shuffle: 1", "GMR-102", "shuffle", "`true` or `false`"),
    ('shuffle: "no"', "GMR-102", "shuffle", 'shuffle="no" is text'),
    ("run_name: 2024-01-01", "GMR-102", "run_name", 'Write it in quotes: "2024-01-01".'),
    ("run_name: 7", "GMR-102", "run_name", 'Write it in quotes: "7".'),
    (
        "device_authentication: off",
        "GMR-102",
        "device_authentication",
        'YAML reads off as false: write it in quotes, "off".',
    ),
    ("heterogeneity:", "GMR-102", "heterogeneity", "one of `high`, `medium`, `low`, `none`"),
    ("score: 3", "GMR-102", "score", "score=3 is a whole number"),
    ("density_ladder: [true]", "GMR-102", "density_ladder[0]", "is a boolean"),
    ("density_ladder: []", "GMR-104", "density_ladder", "at least 1 element"),
    # choices
    ("score: magnitud", "GMR-103", "score", "Did you mean `magnitude`?"),
    ("score: wg", "GMR-103", "score", "one of `magnitude`, `weight_change`, `per_cost`, `random`"),
    ("trigger: tiem", "GMR-103", "trigger", "Did you mean `time`?"),
    ("local_steps: epoch", "GMR-103", "local_steps", "Did you mean `epochs`?"),
    # ranges
    ("density_min: 0", "GMR-104", "density_min", "density_min=0 is outside (0, 1]"),
    ("density_min: 1.3", "GMR-104", "density_min", "density_min=1.3 is outside (0, 1]"),
    ("density_min: -0.5", "GMR-104", "density_min", "outside (0, 1]"),
    ("density_min: 50", "GMR-104", "density_min", "It is a share, not per cent: 0.5?"),
    ("density_min: .nan", "GMR-104", "density_min", "density_min=nan is not finite"),
    ("density_min: .inf", "GMR-104", "density_min", "density_min=inf is not finite"),
    ("time_budget: .inf", "GMR-104", "time_budget", "a number in (0, inf), or null"),
    ("interval: .nan", "GMR-104", "interval", "is not finite"),
    ("validation_fraction: 1", "GMR-104", "validation_fraction", "outside [0, 1)"),
    ("validation_fraction: .nan", "GMR-104", "validation_fraction", "is not finite"),
    ("interval: 0", "GMR-104", "interval", "outside [1, inf)"),
    ("local_steps: 0", "GMR-104", "local_steps", "outside [1, inf)"),
    ("probe_interval: 0", "GMR-104", "probe_interval", "outside [1, inf)"),
    ("densities: [1, 0.5, 2]", "GMR-104", "densities[2]", "densities[2]=2 is outside (0, 1]"),
    ("compute_slowdown: [1, -.inf]", "GMR-104", "compute_slowdown[1]", "is not finite"),
    ("density_ladder: []", "GMR-104", "density_ladder", "at least 1 element"),
    (f"server_upload: 1{'0' * 400}", "GMR-104", "server_upload", "outside (0, inf)"),
    # contradictions
    ("density_ladder: [0.5, 0.2, 1]", "GMR-105", "density_ladder", "is not increasing to 1"),
    ("density_ladder: [0.5, 0.5, 1]", "GMR-105", "density_ladder", "is not increasing to 1"),
    ("density_ladder: [0.1, 0.5]", "GMR-105", "density_ladder", "is not increasing to 1"),
    ("{payload_rule: encoded, model_megabytes: 10}", "GMR-106", "model_megabytes", "payload_rule=encoded"),
    ("run_name: ../escape", "GMR-104", "run_name", "no name of a directory"),
    ("run_name: ''", "GMR-104", "run_name", "no name of a directory"),
    ("time_floors: [1]", "GMR-106", "time_floors", "time_fractions has 4"),
    ("time_fractions: [0.2, 0.2, 0.6, 0.8]", "GMR-106", "time_fractions", "must be increasing"),
    ("validation_fraction: 0", "GMR-106", "trigger", "needs a validation split"),
    (
        "{trigger: none, evaluate: validation, validation_fraction: 0}",
        "GMR-106",
        "evaluate",
        "validation_fraction=0",
    ),
    ("aggregation: plain_average", "GMR-106", "update_form", "update_form=replacement"),
]


@pytest.mark.parametrize(("text", "code", "key", "said"), BAD, ids=[f"{b[1]}-{b[0][:30]}" for b in BAD])
def test_one_problem(text: str, code: str, key: str, said: str) -> None:
    error = refusal(text)
    assert error.code == code
    assert [problem.code for problem in error.problems] == [code]
    assert error.where == f"{WHERE}.{key}"
    message = str(error)
    assert f"in {WHERE}.{key}\n" in message
    assert said in message
    assert message.startswith(f"{code} ") and message.endswith(f"See docs/errors.md#{code.lower()}")


@pytest.mark.parametrize("text", ["1e-3", "1e3", "1.5e3", "+2e-1", "1E5", "-1e2", "2.e1", ".5e1", "1_0e2"])
def test_what_is_suggested_for_an_exponent_is_read_as_that_number(text: str) -> None:
    suggested = re.fullmatch(r"YAML reads .* as text: write (\S+)\.", refusal(f"server_upload: {text}").hint)
    assert suggested
    read = yaml.safe_load(suggested[1])
    assert isinstance(read, float) and read == float(text)


@pytest.mark.parametrize("section", [[], "density_min", 3, True])
def test_the_section_must_be_a_mapping(section: object) -> None:
    with pytest.raises(ConfigRefused) as caught:
        parse(section, where=WHERE)
    assert (caught.value.code, caught.value.where) == ("GMR-102", WHERE)


# -- bad input, several problems -------------------------------------------------------------------


def test_all_problems_at_once_in_the_order_of_the_section() -> None:
    error = refusal(
        """
        interval: 5.0
        densty_min: 0.1
        score: size
        densities: [2, 0.5, true]
        density_ladder: [0.5, 0.2, 1]
        trigger: none
        evaluate: validation
        validation_fraction: 0
        """
    )
    found = [(problem.code, problem.where.removeprefix(f"{WHERE}.")) for problem in error.problems]
    assert found == [
        ("GMR-102", "interval"),
        ("GMR-101", "densty_min"),
        ("GMR-103", "score"),
        ("GMR-104", "densities[0]"),
        ("GMR-102", "densities[2]"),
        ("GMR-105", "density_ladder"),
        ("GMR-106", "evaluate"),
    ]
    assert error.code == "GMR-100" and error.where == WHERE
    message = str(error)
    assert message.startswith("GMR-100 7 problems in the configuration\n")
    for problem in error.problems:
        assert str(problem) in message


@pytest.mark.parametrize(
    "text",
    [
        # the wrong key itself takes part in what would be a contradiction
        "{trigger: tiem, validation_fraction: 0}",
        "{validation_fraction: -1, evaluate: validation}",
        "{time_floors: [2], time_fractions: [0.5]}",
        # a misspelt key is probably the one that is missed
        "{validation_fraction: 0, triger: none}",
    ],
)
def test_no_contradiction_is_invented_for_keys_that_are_wrong_already(text: str) -> None:
    error = refusal(text)
    assert len(error.problems) == 1
    assert error.code in ("GMR-101", "GMR-103", "GMR-104")


@given(
    st.lists(
        st.sampled_from(BAD[:3] + BAD[5:]), min_size=2, max_size=6, unique_by=lambda b: b[2].split("[")[0]
    )
)
def test_any_mixture_is_refused_with_every_wrong_value(bad: list[tuple[str, str, str, str]]) -> None:
    section: dict[Any, Any] = {}
    for text, *_ in bad:
        section |= yaml.safe_load(text)
    with pytest.raises(ConfigRefused) as caught:
        parse(section, where=WHERE)
    found = {(problem.code, problem.where) for problem in caught.value.problems}
    for text, code, key, _ in bad:
        own = yaml.safe_load(text)
        if code not in ("GMR-105", "GMR-106") and all(
            section[k] is own[k] or section[k] == own[k] for k in own
        ):
            assert (code, f"{WHERE}.{key}") in found


# -- round trip ------------------------------------------------------------------------------------


def _values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that one key's JSON schema allows."""
    if "anyOf" in schema:
        return st.one_of([_values(form) for form in schema["anyOf"]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema["type"]
    if kind == "array":
        return st.lists(_values(schema["items"]), min_size=schema.get("minItems", 0), max_size=5)
    if kind == "integer":
        return st.integers(schema["minimum"], schema.get("maximum", 10**6))
    if kind == "number":
        return st.floats(
            schema.get("minimum", schema.get("exclusiveMinimum")),
            schema.get("maximum", schema.get("exclusiveMaximum")),
            exclude_min="exclusiveMinimum" in schema,
            exclude_max="exclusiveMaximum" in schema,
            allow_infinity=False,
        )
    return {"boolean": st.booleans(), "string": st.text(max_size=6), "null": st.none()}[kind]


def _increasing(low: float, high: float, count: int) -> st.SearchStrategy[list[float]]:
    return st.lists(
        st.floats(low, high, exclude_min=True, exclude_max=True), min_size=count, max_size=count, unique=True
    ).map(sorted)


@st.composite
def sections(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid section: each key within its schema, and the contradictions repaired."""
    chosen = draw(st.sets(st.sampled_from(sorted(PROPERTIES))))
    section = {key: draw(_values(PROPERTIES[key])) for key in sorted(chosen)}
    if "density_ladder" in section:
        section["density_ladder"] = [*draw(_increasing(0, 1, 3)), 1.0]
    if {"time_floors", "time_fractions"} & set(section):
        count = draw(st.integers(0, 4))
        section["time_fractions"], section["time_floors"] = (draw(_increasing(0, 1, count)) for _ in range(2))
    if section.get("validation_fraction") == 0:
        section |= {"trigger": "time", "evaluate": "global"}
    if section.get("aggregation") == "plain_average":
        section["update_form"] = "replacement"
    if section.get("payload_rule") == "encoded":
        section["model_megabytes"] = None
    if section.get("probe"):
        section |= {"payload_dtype": "model", "upload": "full", "download": "full"}
        section |= {"local_objective": "plain", "proximal": 0.0, "label_masks": False}
    if section.get("device_submodel", "wire") != "wire":
        section |= {"device_authentication": "off", "payload_dtype": "model"}
    if section.get("device_submodel") == "width":
        section |= {"score": "width", "local_objective": "plain"}
    given_ = {**options_of(section.get("method", "fedgmr")), **section}
    objective = given_.get("local_objective", "plain")
    if objective == "straight_through":
        section["score"] = "magnitude"
    if objective != "plain":
        section["dense_start"] = False
    if section.get("payload_rule") == "encoded" or section.get("payload_dtype", "model") != "model":
        section |= {"upload": "full", "download": "full"}
    if section.get("bandwidth_traces") is None:
        section["trace_family"] = None
    if section.get("lost_after") is not None:
        section["answer_deadline"] = min(section.get("answer_deadline", 600.0), section["lost_after"])
    if section.get("run_name") is not None:
        section["run_name"] = draw(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,5}", fullmatch=True))
    return section


@given(sections())
def test_any_valid_configuration_round_trips(section: dict[str, Any]) -> None:
    config = parse(section, where=WHERE)
    shown = effective(config)
    assert set(shown) == set(FedGMRConfig.model_fields)
    for key, value in section.items():
        assert shown[key] == value
    as_text = json.loads(json.dumps(shown, allow_nan=False))
    assert parse(as_text, where=WHERE) == config
    assert parse(yaml.safe_load(yaml.safe_dump(shown)), where=WHERE) == config


def test_the_schema_names_every_key_with_its_meaning() -> None:
    schema = json_schema()
    json.dumps(schema, allow_nan=False)
    assert schema["additionalProperties"] is False
    assert list(schema["properties"]) == list(FedGMRConfig.model_fields)
    for key, entry in schema["properties"].items():
        assert entry["description"], key
        assert "title" not in entry
        assert json.loads(json.dumps(effective(FedGMRConfig())[key])) == entry["default"]
    assert schema["properties"]["density_min"]["exclusiveMinimum"] == 0
    assert schema["properties"]["interval"]["minimum"] == 1


def test_codes_are_in_the_catalogue() -> None:
    assert {code for _, code, _, _ in BAD} | {"GMR-100"} <= set(CATALOGUE)


# -- initial densities -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heterogeneity", "mean"),
    [
        ("high", Fraction(21, 100)),
        ("medium", Fraction(235, 1000)),
        ("low", Fraction(37, 100)),
        ("none", Fraction(1)),
    ],
)
def test_ten_clients_have_the_papers_mix(heterogeneity: str, mean: Fraction) -> None:
    densities = parse({"heterogeneity": heterogeneity}, where=WHERE).initial_densities(10)
    assert sum(Fraction(d).limit_denominator(100) for d in densities) / 10 == mean
    assert list(densities) == sorted(densities, reverse=True)


@given(st.sampled_from(["high", "medium", "low", "none"]), st.integers(1, 200))
def test_classes_are_cut_to_any_number_of_clients(heterogeneity: str, clients: int) -> None:
    densities = parse({"heterogeneity": heterogeneity}, where=WHERE).initial_densities(clients)
    assert len(densities) == clients
    ten = parse({"heterogeneity": heterogeneity}, where=WHERE).initial_densities(10)
    for density in set(ten):
        exact = clients * ten.count(density) / 10
        assert math.floor(exact) <= densities.count(density) <= math.ceil(exact)


def test_given_densities_must_fit_the_clients() -> None:
    config = parse({"densities": [1, 0.5]}, where=WHERE)
    assert config.initial_densities(2) == (1.0, 0.5)
    with pytest.raises(ConfigError) as caught:
        config.initial_densities(3)
    assert caught.value.code == "GMR-109"
