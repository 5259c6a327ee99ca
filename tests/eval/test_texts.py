"""Files to documents, documents to tokens, tokens to windows."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from eval.texts import TextError, prepended_bos, read_documents, tokenize, windows

WORDS = {word: index for index, word in enumerate(["<s>", "</s>", "?", "a", "b", "c", "user:", "hello"])}
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"


def word_tokenizer(prepends_bos: bool = False, **special: str) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel(WORDS, unk_token="?"))
    model.pre_tokenizer = WhitespaceSplit()
    if prepends_bos:
        model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="?", bos_token="<s>", **special)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_a_txt_file_is_one_document_with_its_line_breaks(tmp_path: Path) -> None:
    text = " = Title = \r\n\n one \n two \n"
    assert read_documents(write(tmp_path / "wiki.txt", text)) == [text]


def test_a_jsonl_file_holds_a_document_per_line(tmp_path: Path) -> None:
    # U+2028 ends a line for str.splitlines, and not for JSON lines.
    rows = [{"text": "one\ntwo \u2028 é"}, {"text": "three", "source": "elsewhere"}]
    path = write(tmp_path / "x.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_documents(path) == ["one\ntwo \u2028 é", "three"]


def test_a_parquet_file_holds_a_document_per_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", "two"]}), path)
    assert read_documents(path) == ["one", "two"]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"text": ""}\n\n{"text": " \\n"}\n{"text": "one"}\n')
    assert read_documents(path) == ["one"]


def test_chat_messages_are_rendered_without_the_bos_that_windows_will_add(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"messages": [{"role": "user", "content": "hello"}]}')
    tokenizer = word_tokenizer(chat_template=CHAT_TEMPLATE)
    assert read_documents(path, tokenizer) == ["user: hello "]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.csv", "a,b", "cannot read .csv; use .jsonl, .txt, .parquet"),
        ("x", "a", "cannot read a file without suffix"),
        ("x.txt", " \n", "there is no text in it"),
        ("x.jsonl", "", "there is no text in it"),
        ("x.jsonl", '{"text": "one"}\n{"text": "two"\n', "x.jsonl:2: not JSON"),
        ("x.jsonl", '{"content": "one"}', "x.jsonl:1: needs 'text' "),
        ("x.jsonl", '["one"]', "x.jsonl:1: needs 'text' "),
        ("x.jsonl", '{"messages": []}', "x.jsonl:1: 'messages' need a tokenizer with a chat template"),
        ("x.parquet", "PAR", "not a parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(TextError, match=says.replace(".", r"\.")):
        read_documents(write(tmp_path / name, text))


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nowhere\.txt: there is no such file"):
        read_documents(tmp_path / "nowhere.txt")


def test_text_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(TextError, match=r"not UTF-8 .* at byte 3"):
        read_documents(tmp_path / "x.txt")


def test_messages_the_chat_template_refuses_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"messages": [{"role": "user", "content": "hello"}]}')
    tokenizer = word_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TextError, match=r"x\.jsonl:1: .*roles must alternate"):
        read_documents(path, tokenizer)


def test_documents_are_joined_by_the_end_of_text_token() -> None:
    tokenizer = word_tokenizer(prepends_bos=True, eos_token="</s>")
    assert tokenize(["a b", "c"], tokenizer).tolist() == [3, 4, 1, 5]


def test_without_an_end_of_text_token_documents_are_joined_by_an_empty_line(assets: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models/pocket-llama-13m")
    tokenizer.eos_token = None
    assert tokenizer.decode(tokenize(["one", "two"], tokenizer)) == "one\n\ntwo"


def test_a_bos_counts_only_where_the_tokenizer_adds_it_by_itself() -> None:
    assert prepended_bos(word_tokenizer(prepends_bos=True)) == 0
    assert prepended_bos(word_tokenizer(prepends_bos=False)) is None


@pytest.mark.parametrize("length", [4, 5, 7, 8, 33])
def test_windows_cover_the_stream_once_up_to_a_ragged_tail(length: int) -> None:
    covered = windows(torch.arange(length), context=4).flatten().tolist()
    assert covered == list(range(length // 4 * 4))


def test_every_window_starts_with_bos_where_there_is_one() -> None:
    assert windows(torch.arange(10, 17), context=4, bos=0).tolist() == [[0, 10, 11, 12], [0, 13, 14, 15]]


def test_a_stream_shorter_than_a_window_is_one_short_window() -> None:
    assert windows(torch.arange(3), context=8).tolist() == [[0, 1, 2]]


def test_a_single_token_is_enough_after_a_bos_and_not_without() -> None:
    assert windows(torch.tensor([5]), context=8, bos=0).tolist() == [[0, 5]]
    with pytest.raises(TextError, match="1 tokens leaves none to predict"):
        windows(torch.tensor([5]), context=8)


def test_a_context_of_one_token_is_refused() -> None:
    with pytest.raises(TextError, match="context=1"):
        windows(torch.arange(8), context=1, bos=0)
