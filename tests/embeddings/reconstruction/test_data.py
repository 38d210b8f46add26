"""What a reconstruction reads: ids as the embedding model will read them but for EOS, and nothing that is held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from embeddings.reconstruction.config import PretrainingConfig, load
from embeddings.reconstruction.data import Pairs, Texts, hold_out, read_sets
from embeddings.reconstruction.reader import Reader
from embeddings.training.data import TrainingSet
from merging.errors import CuveeError
from tests.embeddings.reconstruction import models
from tests.embeddings.reconstruction.runs import ROWS, rows, write_config
from tests.embeddings.runs import table

DRAW = np.random.default_rng(0)


def read(
    place: Path, more: str = "", data: str = "  - {file: pairs.jsonl}\n", objective: str = "cocoa"
) -> tuple[PretrainingConfig, Sequence[TrainingSet], Reader]:
    config = load(write_config(place, more, data), objective)
    reader = Reader(models.tokenizer(), models.EOS_ID, models.MASK, models.PAD)
    return config, read_sets(config, reader, place / "cache"), reader


def ids_of(text: str) -> list[int]:
    return [int(number) for number in models.tokenizer()(text, add_special_tokens=False)["input_ids"]]


def pairs_of(place: Path, more: str = "", data: str = "  - {file: pairs.jsonl}\n", reads: str = "query") -> Pairs:
    config, (found,), reader = read(place, more, data)
    return Pairs(found, reader, hold_out(config, [found]).rows[found.name], reads, config.max_length)


def test_a_pair_is_a_source_with_bos_and_a_target_without(tmp_path: Path) -> None:
    pairs, first = pairs_of(tmp_path), rows()[0]
    example = pairs.example(0, DRAW)
    assert list(example.source) == [models.BOS, *ids_of(first["query"])]
    assert example.target is not None and list(example.target) == ids_of(first["positive"])
    assert example.text == first["query"] and not example.prompt and example.where == "pairs: row 1"


def test_turned_around_the_document_is_the_source(tmp_path: Path) -> None:
    first = rows()[0]
    example = pairs_of(tmp_path, reads="document").example(1, DRAW)
    assert list(example.source) == [models.BOS, *ids_of(first["positive"])]
    assert example.target is not None and list(example.target) == ids_of(first["query"])
    both = pairs_of(tmp_path, reads="both")
    assert len(both.units) == 2 * (ROWS - 6) and len(both.held) == 6
    assert both.example(0, DRAW).text == first["query"] and both.example(1, DRAW).text == first["positive"]


@pytest.mark.parametrize("prompt", ["", ', prompt: {query: "w7 "}'], ids=["one table", "two tables"])
def test_turned_around_no_row_asks_what_a_held_out_one_asks(tmp_path: Path, prompt: str) -> None:
    write_config(tmp_path)
    first = rows()[:12]
    turned = [{"query": row["positive"], "positive": row["query"]} for row in first]
    table(tmp_path / "turned.jsonl", [*first, *turned])
    pairs = pairs_of(tmp_path, "", f"  - {{file: turned.jsonl{prompt}}}\n", "both")
    text = [row[side] for row in (*first, *turned) for side in ("query", "positive")]  # by unit
    asked = {text[unit] for unit in pairs.held}
    assert len(pairs.held) == 6 and not asked & {text[unit] for unit in pairs.units}


def test_a_prompt_stands_before_a_source_and_not_in_a_target(tmp_path: Path) -> None:
    data = '  - {file: pairs.jsonl, prompt: {query: "w7 ", document: "w9 "}}\n'
    first = rows()[0]
    example = pairs_of(tmp_path, data=data).example(0, DRAW)
    assert list(example.source) == [models.BOS, *ids_of("w7 " + first["query"])]
    assert example.target is not None and list(example.target) == ids_of(first["positive"])
    assert (example.prompt, example.text) == ("w7 ", first["query"])
    query, document = pairs_of(tmp_path, data=data).sides(0)
    assert query.source == example.source and document.source == [models.BOS, *ids_of("w9 " + first["positive"])]


def test_sources_leave_room_for_eos(tmp_path: Path) -> None:
    write_config(tmp_path)
    table(tmp_path / "long.jsonl", [{"query": "w7 " * 40, "positive": "w8 " * 40}] * 20)
    pairs = pairs_of(tmp_path, "", "  - {file: long.jsonl}\n")
    # every row asks what a held-out one asks
    assert len(pairs.units) == 0
    example = pairs.example(int(pairs.held[0]), DRAW)
    assert len(example.source) == 11 and example.target is not None and len(example.target) == 11  # 12 with BOS


def test_held_out_rows_and_their_texts_are_not_trained_on(tmp_path: Path) -> None:
    config, (found,), reader = read(tmp_path)
    held = hold_out(config, [found]).rows["pairs"]
    assert len(held) == 6 == len(set(held.tolist()))
    pairs, texts = Pairs(found, reader, held, "query", config.max_length), Texts(found, held)
    assert not set(pairs.units // 2) & set(held)
    forbidden = {rows()[row][key] for row in held for key in ("query", "positive")}
    assert len(texts.held) == len(forbidden)
    seen = {" ".join(models.words(texts.example(int(unit), DRAW).source)) for unit in texts.units}
    everything = {row[key] for row in rows() for key in ("query", "positive")}
    assert seen == everything - forbidden


def test_a_held_out_text_is_not_trained_on_behind_another_prompt_either(tmp_path: Path) -> None:
    write_config(tmp_path)
    turned = [{"query": row["positive"], "positive": row["query"]} for row in rows()[:12]]
    table(tmp_path / "turned.jsonl", [*rows()[:12], *turned])
    config, (found,), _ = read(tmp_path, "", '  - {file: turned.jsonl, prompt: {query: "w7 "}}\n')
    texts = Texts(found, hold_out(config, [found]).rows["turned"])
    held, seen = (
        {" ".join(models.words(texts.example(int(unit), DRAW).source)).removeprefix("w7 ") for unit in units}
        for units in (texts.held, texts.units)
    )
    assert len(held) >= 6 and seen and not held & seen


WORDLESS = ("</s>", "</s> </s>")


@pytest.mark.parametrize("prompt", ["", ', prompt: {query: "w7 ", document: "w9 "}'], ids=["plain", "prompts"])
def test_rows_without_a_token_are_left_out_and_counted_once(tmp_path: Path, prompt: str) -> None:
    """Nothing but EOS, which stands for no word: a source is empty then, or there is nothing to tell again."""
    write_config(tmp_path)
    wrong = [
        {"query": WORDLESS[0], "positive": "w9"},
        {"query": "w8", "positive": WORDLESS[1]},
        {"query": "w8 w9", "positive": ["w7", WORDLESS[0]]},
    ]
    table(tmp_path / "some.jsonl", [*rows()[:9], *wrong, *rows()[9:20]])
    data = f"  - {{file: some.jsonl{prompt}}}\n"
    config, (found,), _ = read(tmp_path, "", data)
    note = "some: 3 of 23 rows have a text without a token and are left out, first row 10, '</s>'"
    assert found.notes == (note,)
    for reads in ("query", "document", "both"):
        pairs = pairs_of(tmp_path, "", data, reads)
        assert {int(unit) // 2 for unit in (*pairs.units, *pairs.held)} == {*range(9), *range(12, 23)}
        assert all(own.target and own.source for own in (pairs.example(int(unit), DRAW) for unit in pairs.units))
    texts = Texts(found, hold_out(config, [found]).rows["some"])
    told = [texts.example(int(unit), DRAW) for unit in (*texts.units, *texts.held)]
    assert all(len(models.words(own.source)) > bool(own.prompt) for own in told)


def test_a_set_without_any_token_is_refused_at_its_line(tmp_path: Path) -> None:
    write_config(tmp_path)
    table(tmp_path / "none.jsonl", [{"query": "w7", "positive": WORDLESS[0]}] * 3)
    with pytest.raises(CuveeError, match=r"config\.yml:3: the data set 'none' has no row with tokens in all of its"):
        read(tmp_path, "", "  - {file: none.jsonl}\n")


def test_a_prompt_that_leaves_no_room_is_refused_at_its_line(tmp_path: Path) -> None:
    data = f'  - {{file: pairs.jsonl, prompt: {{query: "{"w7 " * 12}"}}}}\n'
    with pytest.raises(CuveeError, match=r"config\.yml:3: .*look at its texts, prompts and 'max_length'"):
        read(tmp_path, "", data)


def test_the_held_out_rows_are_those_of_the_seed(tmp_path: Path) -> None:
    config, sets, _ = read(tmp_path)
    same = hold_out(config, sets).rows["pairs"]
    np.testing.assert_array_equal(hold_out(config, sets).rows["pairs"], same)
    assert same.tolist() != hold_out(config.seeded(5), sets).rows["pairs"].tolist()


@pytest.mark.parametrize(("said", "count"), [("held_out: 0\n", 0), ("", 6), ("held_out: 47\n", 47)])
def test_how_many_rows_are_held_out(tmp_path: Path, said: str, count: int) -> None:
    config, sets, _ = read(tmp_path)
    text = config.text.replace("held_out: 6\n", said or "held_out: 6\n")
    (tmp_path / "config.yml").write_text(text, encoding="utf-8")
    assert len(hold_out(load(tmp_path / "config.yml", "cocoa"), sets)) == count


def test_unsaid_a_tenth_is_held_out_at_most(tmp_path: Path) -> None:
    config, sets, _ = read(tmp_path)
    (tmp_path / "config.yml").write_text(config.text.replace("held_out: 6\n", ""), encoding="utf-8")
    assert len(hold_out(load(tmp_path / "config.yml", "cocoa"), sets)) == ROWS // 10


def test_rows_that_are_all_held_out_are_refused_at_the_line(tmp_path: Path) -> None:
    config, sets, _ = read(tmp_path)
    (tmp_path / "config.yml").write_text(config.text.replace("held_out: 6", "held_out: 48"), encoding="utf-8")
    with pytest.raises(CuveeError, match=r"config\.yml:7: 48 held-out rows leave none of 48 to train on"):
        hold_out(load(tmp_path / "config.yml", "cocoa"), sets)


def test_graded_pairs_count_where_they_are_alike(tmp_path: Path) -> None:
    write_config(tmp_path)
    graded = [{"sentence1": f"w{7 + i}", "sentence2": f"w{20 + i}", "score": i / 9} for i in range(10)]
    table(tmp_path / "graded.jsonl", graded)
    config, (found,), reader = read(tmp_path, "", "  - {file: graded.jsonl, type: STS}\n")
    pairs = Pairs(found, reader, np.zeros(0, np.int64), "query", config.max_length)
    assert (pairs.units // 2).tolist() == [5, 6, 7, 8, 9]
    texts = Texts(found, np.zeros(0, np.int64))
    assert len(texts.units) == 20


def test_one_column_may_be_both_sides(tmp_path: Path) -> None:
    """A corpus of single texts, as text alone."""
    write_config(tmp_path)
    table(tmp_path / "corpus.jsonl", [{"text": row["query"]} for row in rows()])
    data = "  - {file: corpus.jsonl, columns: {query: text, positive: text}}\n"
    _, (found,), _ = read(tmp_path, "", data, "retromae")
    assert len(Texts(found, np.zeros(0, np.int64)).units) == ROWS


def test_a_row_that_is_wrong_is_told_with_file_and_line(tmp_path: Path) -> None:
    write_config(tmp_path)
    table(tmp_path / "wrong.jsonl", [*rows(2), {"query": "w7"}])
    with pytest.raises(CuveeError, match=r"wrong\.jsonl:3: has no 'positive'"):
        read(tmp_path, "", "  - {file: wrong.jsonl}\n")
