"""`QTargetConfig` from files and dicts that hold anything at all: a configuration, or a ValueError that says why."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_qtarget import METHODS, QTargetConfig
from trl_qtarget.target.config_file import CONFIG_NAME


FIELDS = [field.name for field in fields(QTargetConfig)]
NUMBERS = ["eta", "alpha", "tau", "lam", "beta", "epsilon", "top_k", "temperature", "clip_max"]
NUMBERS += ["prior_sync_steps", "prior_sync_decay", "chunk_tokens"]
# A target that uses the field, so that nothing but its value can be wrong.
USES = {
    "alpha": {"method": "beyond_log"},
    "tau": {"method": "profit"},
    "lam": {"method": "asft"},
    "beta": {"method": "gem"},
    "epsilon": {"method": "psft"},
    "top_k": {"method": "eaft"},
    "temperature": {"method": "distill"},
    "clip_max": {"method": "iw_sft"},
    "prior_sync_steps": {"method": "psft"},
    "prior_sync_decay": {"method": "psft"},
    "token_weight_column": {"method": "cft"},
    "trust": {"method": None, "residual": "policy"},
    "residual": {"method": None, "trust": "one"},
    "scale": {"method": None, "trust": "one", "residual": "policy"},
}


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def bomb() -> list:
    """Ten lists of ten: small in memory, and endless when written."""
    value: list = ["x"]
    for _ in range(30):
        value = [value] * 10
    return value


# Not for any field; those that JSON can hold, and others.
OF_JSON = {
    "list": ["sft"],
    "empty list": [],
    "dict": {"sft": 1},
    "empty dict": {},
    "true": True,
    "false": False,
    "huge integer": 10**400,
    "most negative": -(10**400),
    "infinity": math.inf,
    "nan": math.nan,
    "deep list": nested(400),
}
OTHERS = {
    "endless integer": 10**5000,
    "bytes": b"sft",
    "set": {1},
    "object": object(),
    "array": np.zeros(3),
    "tensor": torch.zeros(3),
    "complex": 1j,
    "type": str,
    "deeper list": nested(100_000),
    "bomb": bomb(),
}


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(ValueError, match="`") as error:
        call(*arguments, **options)
    assert type(error.value) is ValueError, "no mistake of a decoder"
    return str(error.value)


def written(folder, text: str | bytes):
    (folder / CONFIG_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize("kind", [*OF_JSON, *OTHERS])
@pytest.mark.parametrize("name", FIELDS)
def test_value_of_no_field(name, kind, tmp_path):
    value = (OF_JSON | OTHERS)[kind]
    values = USES.get(name, {}) | {name: value}
    message = refusal(QTargetConfig, **values)
    assert f"`{name}=" in message and len(message) < 1000
    assert f"`{name}=" in refusal(QTargetConfig.coerce, values)
    if kind in OF_JSON:
        assert f"`{name}=" in refusal(QTargetConfig.from_pretrained, written(tmp_path, json.dumps(values)))


@pytest.mark.parametrize("value", ["0.5", "", "\ud800", "x" * 10_000], ids=["number", "empty", "surrogate", "long"])
@pytest.mark.parametrize("name", NUMBERS)
def test_string_for_a_number(name, value):
    if (name, value) == ("alpha", "0.5"):  # which may be a word, so a command line's parser leaves the numbers to us
        assert QTargetConfig(**USES["alpha"], alpha=value).alpha == 0.5
    else:
        assert f"`{name}=" in refusal(QTargetConfig, **USES.get(name, {}), **{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_number_that_only_python_can_hold(name):
    """Of the right sign and kind, but none that torch takes."""
    whole = name in ("top_k", "prior_sync_steps", "chunk_tokens")
    for value in (2**63, 10**400) if whole else (1e39, 1e308, 10**39, 10**400):
        message = refusal(QTargetConfig, **USES.get(name, {}), **{name: value})
        assert f"`{name}=" in message and "is out of range: it must be" in message
        assert name in ("eta", "tau", "prior_sync_decay") or "in size" in message
    largest = 2**63 - 1 if whole else 3.4e38
    if name not in ("eta", "tau", "prior_sync_decay"):
        assert getattr(QTargetConfig(**USES.get(name, {}), **{name: largest}), name) == largest


@pytest.mark.parametrize("column", ["", 3, 1.5, ["w"], {"w": 1}, True, b"w"])
def test_token_weight_column_is_a_name(column):
    message = refusal(QTargetConfig, "cft", token_weight_column=column)
    assert message.startswith("`token_weight_column=") and "non-empty string" in message


def test_keys_of_a_dict():
    assert "unknown fields ['zeta', 3, None]" in refusal(QTargetConfig.coerce, {"zeta": 1, None: 2, 3: 4})
    message = refusal(QTargetConfig.coerce, {("x",) * 1000: 1, "y" * 10_000: 2})
    assert "unknown fields" in message and len(message) < 1000


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"method": "asft", "lam": 0.1, "lam": 0.2}', "'lam' twice"),
        ('{"method": "asft", "method": "sft"}', "'method' twice"),
        ('[{"method": "asft"}]', "does not hold a JSON object"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"method": ' * 100_000, "is not valid JSON"),
        ('{"lam": ' + "1" * 5000 + "}", "is not valid JSON"),
        (b'{"method": "\xff\xfe"}', "is not valid JSON"),
        ('{"method": "asft"}'.encode("utf-16"), "is not valid JSON"),
        (b'\xef\xbb\xbf{"method": "asft"}', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\x00" * 100, "is not valid JSON"),
    ],
    ids=range(11),
)
def test_files_that_mean_nothing_or_two_things(text, why, tmp_path):
    message = refusal(QTargetConfig.from_pretrained, written(tmp_path, text))
    assert why in message and CONFIG_NAME in message


def test_number_beyond_floats_in_a_file(tmp_path):
    text = '{"method": "asft", "lam": 1e400}'
    assert "`lam=inf` is out of range" in refusal(QTargetConfig.from_pretrained, written(tmp_path, text))


def test_paths_that_no_system_has():
    for path in ("x" * 5000, "a\0b"):
        assert "`directory` has no" in refusal(QTargetConfig.from_pretrained, path)


# --- anything at all ---

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63 - 1, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*METHODS, "one", "policy", "prior", "guided", "entropy", "base", "model", "lagged", "torch"])
)
KEYS = st.sampled_from(FIELDS) | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2), max_leaves=4
)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def config_or_refusal(call, *arguments) -> None:
    try:
        config = call(*arguments)
    except ValueError as error:
        assert type(error) is ValueError and "`" in str(error)
    else:
        assert QTargetConfig.coerce(config.to_dict()) == config
        assert config.knobs.keys() <= set(NUMBERS) and config.target


@FUZZ
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_dict(values):
    config_or_refusal(QTargetConfig.coerce, values)


@FUZZ
@given(st.sampled_from(FIELDS), VALUES)
def test_any_value_of_one_field(name, value):
    config_or_refusal(QTargetConfig.coerce, USES.get(name, {}) | {name: value})


@FUZZ
@given(VALUES | st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_json(tmp_path, values):
    config_or_refusal(QTargetConfig.from_pretrained, written(tmp_path, json.dumps(values)))


@FUZZ
@given(st.binary(max_size=40) | st.text('{}[]",:0e9\\u"methodsft ', max_size=40).map(str.encode))
def test_any_bytes(tmp_path, content):
    config_or_refusal(QTargetConfig.from_pretrained, written(tmp_path, content))
