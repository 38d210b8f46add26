"""Training one model: the steps of transformers' Trainer, the same weights after any interruption, mistakes in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.training.backbone import Backbone
from embeddings.training.config import TrainingConfig
from embeddings.training.data import TrainingSet
from embeddings.training.optimizer import adamw, rate
from embeddings.training.train import Job, Trained, schedule_of, train
from merging.errors import CuveeError
from tests.embeddings.runs import (
    config_of,
    metrics,
    opened,
    rows_of,
    same_weights,
    sets_of,
    still,
    weights,
)

STEPS = "steps: 7\nsave_every: 3\n"


@dataclass(frozen=True)
class Run:
    """A training that nobody disturbed, and what it takes to do it again."""

    config: TrainingConfig
    sets: list[TrainingSet]
    job: Job
    done: Trained

    def again(self, folder: Path, **options: Any) -> tuple[Job, Callable[..., Trained]]:
        job = replace(self.job, work=folder / "work", out=folder / "out")
        return job, lambda **more: train(self.config, self.sets, job, lambda: opened(self.config), **options, **more)


def job_of(sets: Sequence[TrainingSet], folder: Path, seed: int = 0) -> Job:
    rows = {each.name: np.arange(len(each), dtype=np.int64) for each in sets}
    return Job("one", rows, 1.0, seed, folder / "work", folder / "out")


@pytest.fixture(scope="module")
def run(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("train")
    config = config_of(folder, minilm, STEPS)
    sets = sets_of(config, folder / "cache")
    job = job_of(sets, folder)
    yield Run(config, sets, job, train(config, sets, job, lambda: opened(config)))
    shutil.rmtree(folder)


# ---- as transformers' Trainer ----


@pytest.mark.parametrize("steps", [1, 3, 10, 37, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.07, 0.1, 0.5, 1.0])
def test_the_learning_rate_is_transformers_linear_schedule(steps: int, warmup: float) -> None:
    from transformers import TrainingArguments, get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    arguments = TrainingArguments(output_dir="unused", warmup_steps=warmup, use_cpu=True, report_to=[])
    rising = arguments.get_warmup_steps(steps)
    theirs = get_linear_schedule_with_warmup(optimizer, rising, steps)
    for number in range(steps):
        expected = theirs.get_last_lr()[0]
        got = rate(number, steps, 0.3, warmup)
        if warmup > 0 and warmup != 1.0:  # there a whole number of steps means just that
            assert got == pytest.approx(expected, abs=1e-12), number
        optimizer.step()
        theirs.step()
    if not warmup:
        assert rate(0, steps, 0.3, 0.0) == 0.3


def trainer(config: TrainingConfig, folder: Path, batches: Sequence[Sequence[int]]) -> Any:
    """SentenceTransformerTrainer with our settings, on batches given."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(config.model.path, device="cpu")
    model.max_seq_length = config.max_length["query"]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "theirs"),
        num_train_epochs=1,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.gradient_clip,
        batch_sampler=lambda dataset, **_: [list(batch) for batch in batches],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"query": row["query"], "positive": row["positive"]} for row in rows_of("word", 16)]
    loss = MultipleNegativesRankingLoss(model, scale=50.0)
    return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=loss)


@pytest.mark.filterwarnings("ignore")
def test_a_few_steps_are_those_of_sentence_transformers_trainer(minilm: Path, tmp_path: Path) -> None:
    """Without dropout and on the same batches: groups of the optimiser, learning rate, clipping, weights."""
    pytest.importorskip("accelerate", reason="their trainer needs it")
    model = still(minilm, tmp_path / "still")
    more = "epochs: 2\nweight_decay: 0.1\nwarmup: 0.3\n"
    config = config_of(tmp_path, model, more, "  - {file: word.jsonl}\n")
    config = replace(config, learning_rate=1e-4)
    sets = sets_of(config, tmp_path / "cache")
    job = job_of(sets, tmp_path)
    plan = schedule_of(config, sets, job)
    batches = [step[0].rows.tolist() for step in plan]
    assert len(batches) == 4
    theirs = trainer(config, tmp_path, batches)
    theirs.create_optimizer()
    names = {id(parameter): name for name, parameter in theirs.model.named_parameters()}
    expected = {
        names[id(parameter)]: group["weight_decay"]
        for group in theirs.optimizer.param_groups
        for parameter in group["params"]
    }
    backbone = opened(config)
    ours = adamw(backbone, config.learning_rate, config.weight_decay)
    own = {id(parameter): name for name, parameter in backbone.named_parameters()}
    decays = {own[id(parameter)]: group["weight_decay"] for group in ours.param_groups for parameter in group["params"]}
    pooled = {name for name in expected if "pooler" in name}  # BERT computes it, no one reads it
    assert decays == {name: decay for name, decay in expected.items() if name not in pooled}
    assert ours.defaults["betas"] == theirs.optimizer.defaults["betas"]
    assert ours.defaults["eps"] == theirs.optimizer.defaults["eps"]

    train(config, sets, job, lambda: opened(config))
    theirs.optimizer = None
    theirs.train()
    before, after = weights(model), weights(job.out)
    trained = {name.removeprefix("0.model."): value.detach().numpy() for name, value in theirs.model.named_parameters()}
    moved, gap = 0.0, 0.0
    for name in after:
        # A key's bias shifts all logits of a row alike: its gradient is rounding, which Adam blows up to full steps.
        if "pooler" not in name and "key.bias" not in name:
            moved += float(np.sum((trained[name] - before[name]) ** 2.0))
            gap += float(np.sum((trained[name] - after[name]) ** 2.0))
    assert moved > 0 and np.sqrt(gap / moved) < 0.02, np.sqrt(gap / moved)


# ---- interrupted ----


class _KilledError(Exception):
    pass


def kill_at(step: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if done == step:
            raise _KilledError

    return progress


@pytest.mark.parametrize("step", [2, 5, 7])
def test_interrupted_and_run_again_it_is_the_same_run(run: Run, tmp_path: Path, step: int) -> None:
    job, again = run.again(tmp_path)
    with pytest.raises(_KilledError):
        again(progress=kill_at(step))
    assert not job.out.exists()
    steps: list[int] = []
    done = again(progress=lambda what, done, total: steps.append(done))
    assert steps[0] == {2: 0, 5: 3, 7: 6}[step]
    assert same_weights(job.out, run.job.out)
    assert metrics(job.out) == metrics(run.job.out)
    assert (done.steps, done.rows, done.loss) == (run.done.steps, run.done.rows, run.done.loss)
    assert not job.work.exists()
    shutil.rmtree(tmp_path)


def test_what_is_done_is_known_without_opening_a_model(run: Run) -> None:
    def never() -> Backbone:
        raise AssertionError

    assert train(run.config, run.sets, run.job, never) == replace(run.done, seconds=round(run.done.seconds, 1))


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-5}, {"seed": 5}, {"weight_decay": 0.5}, {"max_length": {"query": 8, "document": 8}}]
)
def test_another_training_in_the_folder_is_refused(run: Run, change: dict[str, Any]) -> None:
    with pytest.raises(CuveeError, match=r"was trained on other data or with other settings; .*--force"):
        train(replace(run.config, **change), run.sets, run.job, lambda: opened(run.config))


def test_other_rows_prompts_or_losses_are_another_training(run: Run) -> None:
    fewer = replace(run.job, rows={**run.job.rows, "word": np.arange(15)})
    with pytest.raises(CuveeError, match="other data"):
        train(run.config, run.sets, fewer, lambda: opened(run.config))
    prompted = replace(run.sets[0], settings=replace(run.sets[0].settings, prompt={"query": "Q: ", "document": ""}))
    with pytest.raises(CuveeError, match="other data"):
        train(run.config, [prompted, run.sets[1]], run.job, lambda: opened(run.config))


def test_the_checkpoint_of_another_training_is_refused(run: Run, tmp_path: Path) -> None:
    job, again = run.again(tmp_path)
    with pytest.raises(_KilledError):
        again(progress=kill_at(5))
    other = replace(run.config, learning_rate=1e-5)
    with pytest.raises(CuveeError, match=r"holds the checkpoint of another training; .*--force"):
        train(other, run.sets, job, lambda: opened(run.config))
    (job.work / "checkpoint" / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(CuveeError, match=r"checkpoint: cannot be read: .*; remove it, to begin anew"):
        again()
    train(other, run.sets, job, lambda: opened(run.config), force=True)
    assert not same_weights(job.out, run.job.out)
    shutil.rmtree(tmp_path)


def test_evaluation_on_the_way_changes_nothing_but_the_metrics(run: Run, tmp_path: Path) -> None:
    from embeddings.training.config import EvaluationSettings

    seen = []

    def evaluate(backbone: Backbone) -> dict[str, float]:
        assert not backbone.transformer.training
        seen.append(torch.rand(1))  # whatever it does to the global generator
        return {"word": 0.5}

    config = replace(run.config, evaluate=EvaluationSettings(None, ("word",), every=3))
    job, _ = run.again(tmp_path)
    train(config, run.sets, job, lambda: opened(run.config), evaluate=evaluate)
    assert same_weights(job.out, run.job.out)
    scores = [line for line in metrics(job.out) if "scores" in line]
    assert [line["step"] for line in scores] == [3, 6, 7] and len(seen) == 3
    assert [line for line in metrics(job.out) if "loss" in line] == metrics(run.job.out)
    shown = [(out / "curves.svg").read_text("utf-8").count(">score<") for out in (job.out, run.job.out)]
    assert shown == [1, 0]
    shutil.rmtree(tmp_path)


# ---- what it leaves ----


def test_a_model_says_what_it_was_trained_on(run: Run) -> None:
    past = json.loads((run.job.out / "cuvee.json").read_text("utf-8"))
    assert past["command"] == "train" and past["training"]["steps"] == 7 == run.done.steps
    assert past["made_by"]["rows"] == run.job.digest
    rows = np.load(run.job.out / "rows.npz")
    assert {name: rows[name].tolist() for name in rows} == {name: own.tolist() for name, own in run.job.rows.items()}
    (line,) = metrics(run.job.out)
    assert line["step"] == 7 and set(line["losses"]) == {"word", "intent"} and line["learning_rate"] > 0
    assert run.done.loss == line["loss"] and run.done.rows == 7 * 8


def test_another_seed_gives_another_model(run: Run, tmp_path: Path) -> None:
    job = replace(run.job, seed=1, work=tmp_path / "work", out=tmp_path / "out")
    train(run.config, run.sets, job, lambda: opened(run.config))
    assert not same_weights(job.out, run.job.out)
    shutil.rmtree(tmp_path)


# ---- every schedule, loss and setting ----

ALL = """\
  - {file: word.jsonl}
  - {file: intent.jsonl, type: Classification, negatives: 2}
  - {file: pairs.jsonl, type: STS}
  - {file: taught.jsonl}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "model"),
    [
        ("steps: 4\nschedule: dataset_sequential\n", {}),
        ("steps: 6\nschedule: task_sequential\ngradient_cache: 128\n", {}),
        ("epochs: 1\nschedule: two_stage\nloss: {matryoshka: [384, 128]}\n", {}),
        ("epochs: 3\nschedule: mixed\n", {}),
        ("steps: 2\nschedule: mgs\n", {}),
        ("steps: 2\nschedule: mgs\ngradient_cache: 128\n", {"dtype": "bfloat16"}),
        ("epochs: 1\nschedule: batch_level\n", {"dtype": "bfloat16", "gradient_checkpointing": True}),
    ],
)
def test_every_schedule_trains_on_every_kind_of_rows(
    minilm: Path, tmp_path: Path, more: str, model: dict[str, Any]
) -> None:
    config = config_of(tmp_path, minilm, f"{more}warmup: 0.0\n", ALL)
    config = replace(config, learning_rate=1e-4, model=replace(config.model, **model))
    sets = sets_of(config, tmp_path / "cache")
    job = job_of(sets, tmp_path)
    done = train(config, sets, job, lambda: opened(config))
    assert np.isfinite(done.loss)
    before, after = weights(minilm), weights(job.out)
    assert all(np.isfinite(value).all() for value in after.values())
    assert any(not np.array_equal(after[name], before[name]) for name in after)
    assert {name for line in metrics(job.out) for name in line["losses"]} == {each.name for each in sets}
    lines = metrics(job.out)
    assert len(lines) == 1 or lines[-1]["loss"] < lines[0]["loss"]
    shutil.rmtree(tmp_path)


def test_a_loss_that_is_no_number_ends_it_in_one_line(minilm: Path, tmp_path: Path) -> None:
    config = replace(config_of(tmp_path, minilm, "steps: 20\nwarmup: 0.0\n"), learning_rate=1e6)
    sets = sets_of(config, tmp_path / "cache")
    job = job_of(sets, tmp_path)
    with pytest.raises(
        CuveeError, match=r"config.yml:\d+: the (loss|gradient) is not finite at step \d+, on \w+; lower"
    ):
        train(config, sets, job, lambda: opened(config))
    assert not job.out.exists()
