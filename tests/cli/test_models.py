"""The models that arguments name: what is not there is said by its name, before anything is loaded."""

from types import SimpleNamespace

import pytest
from huggingface_hub import errors
from trl import ModelConfig

from trl_qtarget.cli import models
from trl_qtarget.cli.models import ReferenceArguments, check_named


def _answer(kind: type[Exception]) -> Exception:
    """What the hub's client raises."""
    if issubclass(kind, errors.HfHubHTTPError):
        return kind("no", response=SimpleNamespace(headers={}, request=None))
    return kind("no")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (errors.LocalEntryNotFoundError, "there is no folder `a/b` here, and the hub cannot be reached"),
        (errors.RepositoryNotFoundError, "there is no folder `a/b` here, and no such model on the hub"),
        (errors.HFValidationError, "there is no folder `a/b` here, and no such model on the hub"),
        (errors.RevisionNotFoundError, "`a/b` has no revision `old` on the hub"),
        (errors.GatedRepoError, "`a/b` is gated"),
        (errors.RemoteEntryNotFoundError, None),  # adapters have no configuration of a model
        (OSError, None),
    ],
)
def test_what_the_hub_answers(monkeypatch, tmp_path, kind, why):
    def download(name: str, file: str, revision: str | None) -> None:
        assert (name, revision) == ("a/b", "old")
        raise _answer(kind)

    monkeypatch.setattr(models, "hf_hub_download", download)
    policy = ModelConfig(model_name_or_path=str(tmp_path))
    for arguments in (
        (ModelConfig(model_name_or_path="a/b", model_revision="old"), ReferenceArguments()),
        (policy, ReferenceArguments(ref_model_name_or_path="a/b", ref_model_revision="old")),
    ):
        if why is None:
            check_named(*arguments)
        else:
            with pytest.raises(ValueError, match=why):
                check_named(*arguments)
    with pytest.raises(ValueError, match="`model_name_or_path` is missing: name the model to inspect"):
        check_named(ModelConfig(), ReferenceArguments(), verb="inspect")
