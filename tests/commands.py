"""The real command in a process of its own, forked from one that has imported everything: a run costs milliseconds.

`run("merge", recipe, out)` waits for its end; `start` returns at once, for tests that kill or disturb what runs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finished:
    """What a process left.

    code: its exit status, or minus the signal that ended it.
    anonymous: largest RssAnon seen, in bytes, where it was asked for.
    """

    code: int
    out: str
    err: str
    anonymous: int = 0

    @property
    def json(self) -> dict[str, Any]:
        """The object on the last line of standard output."""
        return dict(json.loads(self.out.splitlines()[-1]))


class Running:
    """A process at work. Only one at a time: `wait` before the next is started."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._server = _server()
        self._folder = tempfile.TemporaryDirectory()
        files = {stream: str(Path(self._folder.name, stream)) for stream in ("stdout", "stderr")}
        for file in files.values():
            Path(file).touch()  # it may be killed before it opens them
        self.pid = int(_ask(self._server, {**request, **files}))

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Finished:
        assert self._server.stdout is not None
        code, anonymous = json.loads(self._server.stdout.readline())
        out, err = (Path(self._folder.name, stream).read_text(encoding="utf-8") for stream in ("stdout", "stderr"))
        self._folder.cleanup()
        return Finished(code, out, err, anonymous)


def start(
    *arguments: object,
    cwd: Path | None = None,
    file_size: int | None = None,
    files: int | None = None,
    user: int | None = None,
    die_at: int | str | None = None,
    watch_memory: bool = False,
) -> Running:
    """Starts `cuvee ARGUMENTS`.

    Args:
        file_size: no file may grow larger than so many bytes (RLIMIT_FSIZE): writes fail as on a full disk.
        files: no more than so many open files (RLIMIT_NOFILE).
        user: the number of the user to run as; only root may.
        die_at: SIGKILL just before its n-th change of the file system: a file opened to write, made, renamed, removed; or
            before the first one of a path that has this in it.
        watch_memory: sample RssAnon every few milliseconds.
    """
    limits = {"file_size": file_size, "files": files, "user": user, "die_at": die_at}
    request = {"arguments": [str(a) for a in arguments], "cwd": str(cwd or Path.cwd()), "watch": watch_memory}
    return Running({**request, **limits})


def run(*arguments: object, **conditions: Any) -> Finished:
    """Runs `cuvee ARGUMENTS` to its end; conditions as in `start`."""
    return start(*arguments, **conditions).wait()


def environment() -> dict[str, str]:
    """For a process that imports the project as the tests do, and turns warnings into errors."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "HF_HUB_OFFLINE"), "1")
    return {**os.environ, **one, "PYTHONPATH": os.pathsep.join(paths)}


def code_blocks(page: Path, language: str) -> list[str]:
    """What a Markdown page shows in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.commands"]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment(), cwd=ROOT)
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    server.communicate()


def _ask(server: subprocess.Popen[str], request: Mapping[str, Any]) -> str:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return server.stdout.readline()


# The process that is forked: reads a request a line, answers with the child's number, then with how it ended.


def _serve() -> None:
    _warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        if request["arguments"][:1] in (["train"], ["update"], ["pretrain"], ["stats"]):
            _warm_up_training()
        child = os.fork()
        if child == 0:
            os._exit(_child(request))
        _say(child)
        anonymous = _watch(child) if request["watch"] else 0
        status = os.waitpid(child, 0)[1]
        _say(json.dumps([os.waitstatus_to_exitcode(status), anonymous]))


def _warm_up() -> None:
    """A merge, for all that is imported late."""
    import cuvee
    from tests.checkpoints import tiny, write_model, write_recipe

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        models = [write_model(folder / f"{seed}", tiny(seed)) for seed in range(2)]
        recipe = write_recipe(folder / "recipe.yml", "ties", models[1], base_model=models[0])
        cuvee.app(["merge", str(recipe), str(folder / "out")], standalone_mode=False)


def _warm_up_training() -> None:
    """What training imports late: seconds of each process. Nothing is computed: threads do not survive a fork."""
    late = (
        *("torch.optim", "sentence_transformers.sentence_transformer.losses", "peft"),
        *(
            "transformers.models.bert.modeling_bert",
            "embeddings.training.update",
            "embeddings.training.workers",
            "embeddings.training.backbone",
            "transformers.models.llama.modeling_llama",
            "embeddings.reconstruction.run",
            "embeddings.reconstruction.model",
            "matplotlib.backends.backend_svg",
        ),
    )
    for name in late:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _say(answer: object) -> None:
    sys.stdout.write(f"{answer}\n")
    sys.stdout.flush()


def _watch(child: int) -> int:
    """Largest RssAnon of a process until it ends."""
    largest = 0
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        try:
            status = Path(f"/proc/{child}/status").read_text()
        except OSError:
            break
        found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        largest = max([largest, *(int(kilobytes) << 10 for kilobytes in found)])
        signal.sigtimedwait([], 0.002)
    return largest


class _Mortal:
    """An audit hook that ends its own process before a change of the file system: the n-th from 0, or that of a path."""

    _CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")

    def __init__(self, last: int | str) -> None:
        self._left, self._path = (0, last) if isinstance(last, str) else (last, "")

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and bool(int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes or event in self._CHANGES:
            if self._path and not any(self._path in os.fsdecode(own) for own in arguments[:2] if _is_path(own)):
                return
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1


def _is_path(argument: object) -> TypeGuard[str | bytes]:
    return isinstance(argument, str | bytes)


def _child(request: Mapping[str, Any]) -> int:
    import resource

    import cuvee

    streams = (os.devnull, request["stdout"], request["stderr"])
    for number, (name, mode) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(name, mode | os.O_CREAT, 0o600), number)
    os.chdir(request["cwd"])
    if request["file_size"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], resource.RLIM_INFINITY))
    if request["files"] is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (request["files"], request["files"]))
    if request["user"] is not None:
        os.setgid(request["user"])
        os.setuid(request["user"])
    if request["die_at"] is not None:
        sys.addaudithook(_Mortal(request["die_at"]))
    sys.argv = ["cuvee", *request["arguments"]]
    code = 0
    try:
        cuvee.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve()
