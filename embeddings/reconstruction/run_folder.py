"""The folder of a pre-training: what is in it, whose it is, and how it is claimed.

    stages/<name>/     the language model after a stage; what is there is not trained again
    language_model/    the last of them: AutoModelForCausalLM.from_pretrained
    model/             its embedding model: SentenceTransformer(…)
    contrastive/       with `contrastive:`, a run of `cuvee train` on model/
    metrics.jsonl      losses, and what was measured on held-out rows
    curves.svg         the same as a picture
    data/              token ids of all texts
    work/              of a stage that is not done
    cuvee.json         settings, stages, costs

The same command on it makes only what is missing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from embeddings.reconstruction.config import PretrainingConfig
from embeddings.training.curves import CURVES
from embeddings.training.run_folder import past_of
from merging import lineage
from merging.errors import CuveeError
from merging.output import write_whole

STAGES, LANGUAGE_MODEL, MODEL, CONTRASTIVE, WORK, DATA = (
    *("stages", "language_model", "model", "contrastive", "work", "data"),
)
METRICS, _CONFIG, COMMAND = "metrics.jsonl", "config.yml", "pretrain"
_MADE = (STAGES, LANGUAGE_MODEL, MODEL, CONTRASTIVE, WORK, METRICS, CURVES)  # `data` serves another configuration too


def check_claim(run: Path, config: PretrainingConfig, *, force: bool) -> bool:
    """Whether the folder holds a run of the same configuration; False: it is empty, missing, or `force` says it may go.

    Raises:
        CuveeError: it is something else.
    """
    past, mend = past_of(run), "choose another folder"
    if past is None:
        return False
    if past.get("command") != COMMAND:
        raise CuveeError(f"is an output of `cuvee {past.get('command')}`", where=str(run), mend=mend)
    if "state" not in past:
        raise CuveeError("is a model, no run's folder", where=str(run), mend=mend)
    if past["state"] == "begun" and not any((run / part).exists() for part in _MADE):
        return False  # its data or settings were refused: mended, they are another configuration
    if past.get("config") == config.plain():
        return True
    if not force:
        mend = "choose another folder, or add --force to train anew"
        raise CuveeError("holds a run of another configuration", where=str(run), mend=mend)
    return False


def claim(run: Path, config: PretrainingConfig, *, force: bool) -> None:
    """As `check_claim`; and the folder is of this configuration from now on, without what was made by another."""
    same = check_claim(run, config, force=force)
    if force or not same:
        for part in _MADE:
            _remove(run / part)
        begun = {"command": COMMAND, "state": "begun", "config": config.plain()}
        write_whole(run / lineage.FILE, lineage.text(begun))  # what holds it is ours, wherever we are killed
    write_whole(run / _CONFIG, config.text)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)
