"""Outputs are whole or absent, nothing else is touched, and what a killed run left is cleared by the next."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from merging.errors import CuveeError
from merging.output import alone, just_begun, refuse_full_disk, scratch, staged, write_whole


def make(out: Path, content: str = "new", *, force: bool = False) -> None:
    """An output of one file beside its marker."""
    with staged(out, force=force) as folder:
        (folder / "weights").write_text(content)
        (folder / "cuvee.json").write_text("{}")


def content(out: Path) -> str:
    return (out / "weights").read_text()


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def abandoned(out: Path, *files: str) -> Path:
    """What a run killed long ago left beside `out`: a folder with these files."""
    run = out.parent / f".{out.name}.partial-0123abcd"
    for file in files:
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text(file)
    return run


def test_what_is_needed_on_the_way_lies_beside_out_and_goes(tmp_path: Path) -> None:
    out = tmp_path / "deeper" / "out"
    left = abandoned(out, "lock", "new/model/weights")
    with scratch(out) as folder, scratch(out) as other:
        assert folder != other and folder.is_relative_to(out.parent) and not left.exists()
        (folder / "weights").write_text("new")
        with staged(out) as staging:
            (staging / "cuvee.json").write_text("{}")
        assert (folder / "weights").exists(), "of a run at work"
    assert listing(tmp_path) == ["deeper", "deeper/out", "deeper/out/cuvee.json"]
    with scratch(tmp_path / "new" / "out"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(tmp_path: Path) -> None:
    refuse_full_disk(tmp_path / "deeper" / "out", 1, "it takes")
    with pytest.raises(CuveeError, match=rf"{tmp_path}: it takes 1000000000.0 GB, the disk has \d+\.\d GB free"):
        refuse_full_disk(tmp_path / "deeper" / "out", 10**18, "it takes")


def test_nothing_stands_at_out_before_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deeper" / "out"
    with staged(out) as folder:
        (folder / "weights").write_text("new")
        assert not out.exists()
        assert folder.is_relative_to(out.parent)  # the same disk, so that renaming copies nothing
    assert listing(tmp_path) == ["deeper", "deeper/out", "deeper/out/weights"]
    (tmp_path / "mine").mkdir()
    assert out.stat().st_mode == (tmp_path / "mine").stat().st_mode  # not the private mode of a temporary folder


@pytest.mark.parametrize("error", [CuveeError("x"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_no_trace(error: BaseException, tmp_path: Path) -> None:
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CuveeError
    with pytest.raises(kind) as raised, staged(tmp_path / "new" / "deeper" / "out") as folder:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text("{}")
        raise error
    assert listing(tmp_path) == []
    if isinstance(error, OSError):
        assert "cannot write: No space left on device" in str(raised.value)


def test_what_fails_leaves_the_earlier_output(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with pytest.raises(CuveeError), staged(tmp_path / "out", force=True):
        raise CuveeError("x")
    assert content(tmp_path / "out") == "old"
    assert listing(tmp_path) == ["out", "out/cuvee.json", "out/weights"]


def test_force_replaces_an_earlier_output_as_a_whole(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    (tmp_path / "out" / "more").mkdir()
    make(tmp_path / "out", "new", force=True)
    assert content(tmp_path / "out") == "new"
    assert listing(tmp_path) == ["out", "out/cuvee.json", "out/weights"]
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", force=True)


def _foreign_folder(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("x")


def _file(out: Path) -> None:
    out.write_text("x")


def _link_to_an_output(out: Path) -> None:
    make(out.with_name("real"), "old")
    out.symlink_to("real")


def _dead_link(out: Path) -> None:
    out.symlink_to("nowhere")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("place", [_foreign_folder, _file, _link_to_an_output, _dead_link])
def test_what_is_no_output_of_ours_is_never_replaced(
    place: Callable[[Path], None], force: bool, tmp_path: Path
) -> None:
    place(tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(CuveeError) as error, staged(tmp_path / "out", force=force):
        raise AssertionError("the work was begun")
    assert str(error.value).startswith(f"{tmp_path / 'out'}: ")
    assert listing(tmp_path) == before


def test_an_output_without_force_is_not_replaced(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with pytest.raises(CuveeError, match="exists already; choose another folder, or add --force"):
        make(tmp_path / "out")
    assert content(tmp_path / "out") == "old"


def test_of_two_runs_the_first_to_end_wins(tmp_path: Path) -> None:
    with pytest.raises(CuveeError, match="exists already"), staged(tmp_path / "out") as folder:
        make(tmp_path / "out", "other")
        (folder / "weights").write_text("new")  # the other run did not take ours for abandoned
    assert content(tmp_path / "out") == "other"
    assert listing(tmp_path) == ["out", "out/cuvee.json", "out/weights"]


def test_with_force_the_last_of_two_runs_wins(tmp_path: Path) -> None:
    with staged(tmp_path / "out", force=True) as folder:
        make(tmp_path / "out", "other", force=True)
        (folder / "weights").write_text("new")
        (folder / "cuvee.json").write_text("{}")
    assert content(tmp_path / "out") == "new"
    assert listing(tmp_path) == ["out", "out/cuvee.json", "out/weights"]


@pytest.mark.parametrize("name", ["out", "out[1]*?", "-rf", "x" * 200, "wörter\n"])
def test_what_killed_runs_left_is_cleared(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    abandoned(out, "lock", "new/weights", "new/1_Pooling/config.json")
    make(out)
    assert content(out) == "new"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_output_that_a_killed_run_had_set_aside_comes_back(tmp_path: Path) -> None:
    abandoned(tmp_path / "out", "lock", "old/weights", "old/cuvee.json", "new/weights")
    with pytest.raises(CuveeError, match="exists already"):
        make(tmp_path / "out")
    assert content(tmp_path / "out") == "old/weights"
    assert listing(tmp_path) == ["out", "out/cuvee.json", "out/weights"]


def test_what_others_left_stays(tmp_path: Path) -> None:
    """A folder that no run of ours made, and what another output's run left."""
    theirs = abandoned(tmp_path / "out", "notes.txt")
    another = abandoned(tmp_path / "out2", "lock", "new/weights")
    make(tmp_path / "out")
    assert listing(theirs) == ["notes.txt"]
    assert listing(another) == ["lock", "new", "new/weights"]


def test_a_parent_that_cannot_hold_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CuveeError, match="file: is no folder; choose another"):
        make(tmp_path / "file" / "out")
    with pytest.raises(CuveeError, match="name too long"):
        make(tmp_path / ("x" * 300))
    assert listing(tmp_path) == ["file"]


def test_links_on_the_way_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    make(tmp_path / "link" / "out")
    assert content(tmp_path / "disk" / "out") == "new"


def test_a_relative_out_stays_where_the_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged(Path("out")) as folder:
        (folder / "weights").write_text("new")
        os.chdir("/")
    assert content(tmp_path / "out") == "new"


def test_one_process_at_a_time_is_alone_in_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "deeper" / "run"
    with alone(out), pytest.raises(CuveeError, match="another process is at work in it"), alone(out):
        pass
    with alone(out):
        assert just_begun(out)
        (out / "cuvee.json").touch()
    assert not just_begun(out) and not just_begun(tmp_path / "missing") and not just_begun(out / "cuvee.json")
    with pytest.raises(CuveeError, match="is no folder"), alone(out / "cuvee.json"):
        pass
    with pytest.raises(CuveeError, match="cannot write"), alone(out / "cuvee.json" / "run"):
        pass


def test_threads_that_write_one_file_do_not_take_each_others_halves(tmp_path: Path) -> None:
    file = tmp_path / "known.json"
    texts = [str(number) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(lambda text: write_whole(file, text), texts))
            assert file.read_text() in texts
    assert listing(tmp_path) == ["known.json"]
