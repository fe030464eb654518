"""A cached prior trains as the live one does, whatever is done with the dataset, and no half or foreign cache does."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from datasets import concatenate_datasets
from peft import LoraConfig
from training import make_trainer, other_model, warm_model

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.priors.record import PriorRecord
from trl_qtarget.priors.store import PriorCache, key_of
from trl_qtarget.target.config import prior_itself
from trl_qtarget.training.caching import Writer, write_cache


TEACHER = prior_itself()
V = len(tiny.tokenizer())


def cache_of(dataset, directory: Path, form: str = "top_k", k: int = V, **options) -> Path:
    """A cache of `other_model`."""
    write_cache(Writer(teacher_on(dataset), form, k), directory, **options)
    return directory


def teacher_on(dataset, teacher=None, **arguments):
    return make_trainer(
        QTargetSFTTrainer,
        dataset,
        warm_model(),
        options={"max_length": None},
        qtarget_config=TEACHER,
        ref_model=teacher or other_model(),
        **arguments,
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Caches of the prompt dataset by form, of everything that the teacher says."""
    folder = tmp_path_factory.mktemp("caches")
    return {form: cache_of(tiny.prompt_dataset(), folder / form, form) for form in ("hidden", "top_k")}


def run(config, options=None, dataset=None, **prior):
    trainer = make_trainer(
        QTargetSFTTrainer,
        dataset or tiny.prompt_dataset(),
        warm_model(),
        options=options,
        qtarget_config=config,
        **prior,
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], {
        name: value.detach() for name, value in trainer.model.named_parameters()
    }


def check_same(config, cache, options=None, tolerance=1e-5, dataset=None):
    lines, weights = run(config, options, dataset, prior_cache=str(cache))
    live, live_weights = run(config, options, dataset, ref_model=other_model())
    for line, other in zip(lines, live, strict=True):
        for name in ("loss", "grad_norm", "target/nll", "target/kl", "target/prior_agreement"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    for name, value in weights.items():
        torch.testing.assert_close(value, live_weights[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", ["hidden", "top_k"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("target_sft", {}),
        ("distill", {"max_length": 10, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
        ("asft", {"padding_free": True, "max_length": None}),
        ("iw_sft", {"packing": True, "packing_strategy": "bfd", "max_length": 30}),
        ("psft", {"dataloader_num_workers": 1}),
        ("adaptive_sft", {"max_steps": 1}),
    ],
)
def test_train_from_a_cache_is_training_with_the_model(caches, form, method, options):
    config = QTargetConfig(method, prior="model") if method == "psft" else method
    check_same(config, caches[form], options)


def test_train_from_a_cache_of_a_teacher_with_more_rows(tmp_path):
    """Of the form `top_k` it is conditioned on the policy's tokens when it is written, as the live one always is."""

    def teacher():
        torch.manual_seed(0)  # the new rows are random, and not improbable
        model = other_model()
        model.resize_token_embeddings(V + 8, mean_resizing=False)
        return model

    dataset = tiny.prompt_dataset()
    write_cache(Writer(teacher_on(dataset, teacher()), "top_k", V), tmp_path)
    lines, weights = run("target_sft", prior_cache=str(tmp_path))
    live, live_weights = run("target_sft", ref_model=teacher())
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in live], rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(value, live_weights[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=f"`k={V + 1}` must be from 1 to the vocabulary's {V}"):
        write_cache(Writer(teacher_on(dataset, teacher()), "top_k", V + 1), tmp_path / "other")


@pytest.mark.parametrize("completion", [True, False])
def test_train_packed_in_pieces(caches, tmp_path, completion):
    # A piece may begin within a document, of which the teacher has read the whole; and no first token is a label.
    dataset, folder = (tiny.prompt_dataset(), caches["top_k"]) if completion else (tiny.text_dataset(), tmp_path)
    if not completion:
        cache_of(dataset, folder)
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 16, "max_steps": 2}
    trainer = make_trainer(
        QTargetSFTTrainer,
        dataset,
        warm_model(),
        options=options,
        qtarget_config="distill",
        prior_cache=str(folder),
    )
    cache, labelled, without = PriorCache(folder), 0, 0
    for row in trainer.train_dataset:
        labels = trainer.data_collator([row])["labels"][0].tolist()
        for label, given, place in zip(labels, row["labels"], row["prior_places"], strict=True):
            assert label == (given if place >= 0 else -100)
            without += given != label
            if place >= 0:
                labelled += 1
                own = cache.read(torch.tensor([place]))[0]
                ids = own[: cache.manifest.k].tolist()
                numbers = own[cache.manifest.k :].view(torch.float32)
                assert numbers[ids.index(label)] == numbers[-2]  # the row speaks of this label, and of no other
    assert labelled > 50 and without == (0 if completion else 24)
    trainer.train()
    assert all(line["loss"] > 0 for line in trainer.state.log_history if "loss" in line)


def test_train_an_adapter_from_its_cached_base(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    dataset = tiny.prompt_dataset(8)

    def trainer(config, options=None, **prior):
        torch.manual_seed(0)
        return make_trainer(
            QTargetSFTTrainer, dataset, warm_model(), options=options, qtarget_config=config, peft_config=lora, **prior
        )

    base = prior_itself("base")
    write_cache(Writer(trainer(base, {"max_length": None}), "top_k", V), tmp_path / "cache")
    losses = []
    for prior in ({}, {"prior_cache": str(tmp_path / "cache")}):
        run = trainer("target_sft", **prior)
        run.train()
        losses.append([line["loss"] for line in run.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_evaluation_sets_come_from_the_cache(tmp_path):
    sets = {"first": tiny.prompt_dataset(6, seed=3), "second": tiny.prompt_dataset(6, seed=4)}
    dataset = tiny.prompt_dataset(8)
    write_cache(Writer(teacher_on(dataset, eval_dataset=sets), "top_k", V), tmp_path)
    found = []
    for prior in ({"ref_model": other_model()}, {"prior_cache": str(tmp_path)}):
        run = make_trainer(
            QTargetSFTTrainer, dataset, warm_model(), eval_dataset=sets, qtarget_config="sft_kl", **prior
        )
        found.append(run.evaluate())
    for name in ("eval_first_loss", "eval_second_loss"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def test_the_tail_is_a_choice(tmp_path):
    dataset = tiny.prompt_dataset(8)
    cache = cache_of(dataset, tmp_path, k=4)
    losses = {}
    for tail in (None, "policy", "uniform"):
        lines, _ = run(QTargetConfig("distill", prior_tail=tail), dataset=dataset, prior_cache=str(cache))
        losses[tail] = [line["loss"] for line in lines]
    assert losses[None] == losses["policy"] != losses["uniform"]


def test_a_resumed_run_notices_another_cache(caches, tmp_path):
    other = cache_of(tiny.prompt_dataset(), tmp_path / "other", k=8)
    options = {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 1}

    def trainer(cache, steps):
        return make_trainer(
            QTargetSFTTrainer,
            tiny.prompt_dataset(),
            warm_model(),
            steps=steps,
            options=options,
            qtarget_config="asft",
            prior_cache=str(cache),
        )

    trainer(caches["top_k"], 1).train()
    with pytest.raises(ValueError, match=r"the prior is not the one that .* was trained with"):
        trainer(other, 2).train(resume_from_checkpoint=True)
    assert PriorRecord.load(tmp_path / "run" / "checkpoint-1").kind == "cached"
    trainer(caches["top_k"], 2).train(resume_from_checkpoint=True)


# --- what is refused, before training ---


def refused(message, cache, config="target_sft", dataset=None, **arguments):
    with pytest.raises(ValueError, match=message):
        make_trainer(
            QTargetSFTTrainer,
            dataset or tiny.prompt_dataset(),
            arguments.pop("model", None) or warm_model(),
            qtarget_config=config,
            prior_cache=str(cache),
            **arguments,
        )


def test_examples_that_are_missing_are_counted_and_the_first_is_named(caches):
    both = tiny.prompt_dataset(30)  # of which 24 begin as those in the cache, and are not
    known = tiny.prompt_dataset()
    mixed = concatenate_datasets([known.select(range(5)), both.select([25, 26]), known.select(range(5, 9))])
    refused(
        "2 of 11 examples of the train dataset, the first of them number 5, are not in", caches["top_k"], dataset=mixed
    )
    # Labels that the cache has not, of tokens that it knows.
    texts = tiny.prompt_dataset().map(lambda row: {"text": row["prompt"] + row["completion"]})
    refused("24 of 24 examples", caches["top_k"], dataset=texts.select_columns("text"))
    # A stream is looked up as it is read.
    stream = make_trainer(
        QTargetSFTTrainer,
        mixed.to_iterable_dataset(),
        warm_model(),
        qtarget_config="target_sft",
        prior_cache=str(caches["top_k"]),
    )
    with pytest.raises(ValueError, match="example 5 of the train dataset is not in"):
        list(stream.train_dataset)


def test_longer_examples_than_the_cache_has_read_are_missing(tmp_path):
    cache = cache_of(tiny.prompt_dataset(8), tmp_path, kept=slice(None, 12))
    run("target_sft", {"max_length": 12}, tiny.prompt_dataset(8), prior_cache=str(cache))
    refused("examples of the train dataset", cache, dataset=tiny.prompt_dataset(8), options={"max_length": 13})
    # What is missing is added, and then read where there is more.
    cache_of(tiny.prompt_dataset(8), tmp_path)
    run("target_sft", {"max_length": 40, "max_steps": 1}, tiny.prompt_dataset(8), prior_cache=str(cache))


def test_caches_of_something_else_are_refused(caches, tmp_path):
    top_k = caches["top_k"]
    refused("is no cache, it has no manifest.json", tmp_path)
    with pytest.raises(ValueError, match="`prior_cache` must be the path of a folder, got `dict`"):
        PriorCache({})
    refused("`prior_cache` and `ref_model` are two priors", top_k, ref_model=other_model())
    refused(
        "is not enough for the residual 'prior', temperature=2.0", top_k, QTargetConfig("distill", temperature=2.0)
    )
    refused("`prior_tail` says how the rest", caches["hidden"], QTargetConfig("distill", prior_tail="uniform"))
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    refused("was made with other tokens", top_k, processing_class=tokenizer)
    model = warm_model()
    model.resize_token_embeddings(V + 8)
    refused(f"has a vocabulary of {V}, the policy one of {V + 8}", top_k, model=model)
    # A folder is of one prior, in one form.
    with pytest.raises(ValueError, match="holds another cache, whose `k` is"):
        cache_of(tiny.prompt_dataset(), top_k, k=5)
    with pytest.raises(ValueError, match="holds another cache, whose `weights` is"):
        write_cache(Writer(teacher_on(tiny.prompt_dataset(), warm_model(steps=5)), "top_k", V), top_k)


def test_a_shard_with_other_bytes_is_refused(caches, tmp_path):
    copy = Path(shutil.copytree(caches["top_k"], tmp_path / "copy"))
    shard = next(copy.glob("*-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    refused("has other bytes than it was written with", copy)
    shard.write_bytes(data[:-100])  # cut off
    refused("cannot be read", copy)
    hidden = Path(shutil.copytree(caches["hidden"], tmp_path / "hidden"))
    head = next(hidden.glob("head.*"))
    head.write_bytes(head.read_bytes()[:-1] + b"!")
    refused("the file head.* has other bytes", hidden)
    head.unlink()
    refused("has no head", hidden)


def test_a_method_without_a_prior_leaves_the_cache_alone(caches, logged):
    run("dft", {"max_steps": 1}, prior_cache=str(caches["top_k"]))
    assert any("`prior_cache` is not used by" in message for message in logged())


# --- writing ---


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*-*.safetensors")}


def test_what_is_missing_is_made_again_with_the_same_bytes(tmp_path):
    dataset = tiny.prompt_dataset(12)
    whole = bytes_of(cache_of(dataset, tmp_path / "whole", k=8, shard_bytes=2000))
    assert len(whole) > 3
    cache = cache_of(dataset, tmp_path / "again", k=8, shard_bytes=2000)
    times = {path.name: path.stat().st_mtime_ns for path in cache.glob("*-*.safetensors")}
    lost = sorted(times)[1]
    (cache / lost).unlink()
    cache_of(dataset, cache, k=8, shard_bytes=2000)
    assert bytes_of(cache) == whole
    kept = {path.name: path.stat().st_mtime_ns for path in cache.glob("*-*.safetensors")}
    assert [name for name in times if kept[name] != times[name]] == [lost]
    # A second dataset adds to it, and changes nothing.
    cache_of(tiny.prompt_dataset(6, seed=9), cache, k=8)
    assert len(PriorCache(cache)) == 18 and whole.items() <= bytes_of(cache).items()


def test_an_example_is_found_by_its_tokens(caches):
    cache = PriorCache(caches["top_k"])
    trainer = teacher_on(tiny.prompt_dataset())
    row = trainer.train_dataset[3]
    places = cache.places(row["input_ids"])
    assert [place >= 0 for place in places] == [label != -100 for label in row["labels"]]
    assert cache.places(row["input_ids"][:-1]) == [-1] * (len(places) - 1)
    assert key_of([1, 2]) != key_of([2, 1]) != key_of([258])
