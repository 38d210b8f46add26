"""Fixtures that several test files share: the real all-MiniLM-L6-v2, and a family of specialists fine-tuned from it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores already


@dataclass(frozen=True)
class MiniLMFamily:
    """Folders in the layout of sentence-transformers: the base, and specialists fine-tuned from it."""

    base: Path
    specialists: tuple[Path, ...]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2, inside its package (extra `demo`)."""
    from embeddings.quickstart import demo_model
    from merging import CuveeError

    try:
        return demo_model()
    except CuveeError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def minilm_family(
    minilm: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> MiniLMFamily:
    """all-MiniLM-L6-v2 and three specialists, each fine-tuned a little on one of the shipped suite's tasks.

    Few and large steps, so that the task vectors stand out of the rounding within seconds. Trained once: kept in
    pytest's cache, where the workers of a parallel run wait for the first of them.
    """
    filelock = pytest.importorskip("filelock")
    pytest.importorskip("sentence_transformers")
    import torch

    from embeddings.training import config as training_config
    from embeddings.training import draws, train
    from embeddings.training.bag import train_run
    from embeddings.training.run_folder import MODEL

    text = (
        "model: {model}\ndata: [{{suite: shipped, task: {task}, limit: 128, negatives: 1}}]\n"
        "steps: 8\nwarmup: 0\nbatch_size: 16\nlearning_rate: 5.0e-4\nmax_length: 32\ncore: 0\nloss: {{temperature: 0.05}}\n"
    )
    code = Path(train.__file__).read_bytes() + Path(draws.__file__).read_bytes()
    version = hashlib.sha256(code + f"{text} {torch.__version__}".encode()).hexdigest()[:12]
    cache = getattr(request.config, "cache", None)
    root = cache.mkdir("minilm-family") if cache else tmp_path_factory.getbasetemp().parent / "minilm-family"
    root.mkdir(parents=True, exist_ok=True)
    folders = []
    threads = torch.get_num_threads()
    with filelock.FileLock(root / "lock"):
        torch.set_num_threads(1)  # on busy cores the threads of one operation wait for each other
        for task in ("word", "phenotype", "intent"):
            config = training_config.parse(text.format(model=minilm, task=task), str(root / "config.yml"))
            train_run(config, root / version / task)
            folders.append(root / version / task / MODEL)
        torch.set_num_threads(threads)
    return MiniLMFamily(minilm, tuple(folders))
