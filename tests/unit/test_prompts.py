"""Prompts as bytes: UTF-8 or refused, lines as they are meant, one bad line at a time."""

from __future__ import annotations

import io
import json

import pytest

from mobile.cli.terminal import prompts
from mobile.errors import Refused

ODD = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh"  # what str.splitlines() would end a line at


@pytest.fixture
def stdin(monkeypatch):
    """Standard input of these bytes, decoded as a C locale does: bytes that are no text are let through."""

    def give(data: bytes) -> None:
        stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="surrogateescape")
        monkeypatch.setattr("sys.stdin", stream)

    return give


def test_only_a_line_feed_ends_a_line(tmp_path):
    (tmp_path / "text").write_bytes(f"{ODD}\r\nsecond\n\nthird".encode())
    assert prompts.of_file(str(tmp_path / "text")) == [ODD, "second", "third"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in (ODD, "second")]
    (tmp_path / "jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    assert prompts.of_file(str(tmp_path / "jsonl")) == [ODD, "second"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path, stdin):
    for data, expected in ((b"first\nsecond\n", ["first", "second"]), (b'{"prompt": "first"}\n', ["first"])):
        (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + data)
        assert prompts.of_file(str(tmp_path / "marked")) == expected
        stdin(b"\xef\xbb\xbf" + data)
        assert prompts.of_file("-") == expected
    stdin(b"\xef\xbb\xbfquestion\n")
    assert prompts.of_command_line("-") == "question"
    stdin(b"\xef\xbb\xbfquestion\n")
    assert next(prompts.Turns(interactive=False)) == "question"


@pytest.mark.parametrize("bad", [b"\xff", b"\xed\xa0\x80", b"caf\xe9", "text".encode("utf-16")])
def test_bytes_that_are_no_utf8_are_refused_with_their_line(tmp_path, stdin, bad):
    (tmp_path / "bad").write_bytes(b"fine\n" + bad + b"\n")
    with pytest.raises(Refused, match=r"^Line 2 of .*bad is not UTF-8 \(byte 0x"):
        prompts.of_file(str(tmp_path / "bad"))
    for read in (prompts.of_file, prompts.of_command_line):
        stdin(b"fine\n" + bad + b"\n")
        with pytest.raises(Refused, match=r"^Line 2 of standard input is not UTF-8"):
            read("-")


def test_a_prompt_on_the_command_line_that_is_no_utf8_is_refused():
    with pytest.raises(Refused, match="The prompt is no text: its character 4 is a byte that is not UTF-8"):
        prompts.of_command_line("Q: \udcff is")


@pytest.mark.parametrize("half", ["\\ud800", "\\udfff", "\\udc00\\ud800"])
def test_half_of_a_surrogate_pair_in_json_is_refused_and_a_whole_one_is_text(half):
    fine = '{"prompt": "\\ud83d\\ude00"}\n'
    assert prompts.parse(fine, "it") == ["\N{GRINNING FACE}"]
    with pytest.raises(Refused, match='The "prompt" in line 2 of it is no text: its character 2 '):
        prompts.parse(fine + f'{{"prompt": "a{half}"}}', "it")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' + "9" * 5000 + "}", "{", '{"prompt": null}'])
def test_json_that_is_no_prompt_is_refused_however_odd(line):
    with pytest.raises(Refused, match="ine 2 of it"):
        prompts.parse(f'{{"prompt": "fine"}}\n{line}', "it")


@pytest.mark.parametrize(
    ("data", "prompt"),
    [(b"one\ntwo\n", "one\ntwo"), (b"one\r\ntwo\r\n", "one\ntwo"), (b"one\n\n", "one\n"), (b"one\rtwo", "one\rtwo")],
)
def test_a_prompt_from_stdin_keeps_its_lines_but_not_the_end_of_the_last(stdin, data, prompt):
    stdin(data)
    assert prompts.of_command_line(None) == prompt


def test_after_a_turn_that_is_no_text_the_next_one_comes(stdin):
    stdin(f"{ODD}\r\n".encode() + b"\xff\n" + b"third\nlast")
    first, second, third, last = prompts.Turns(interactive=False)
    assert (first, third, last) == (ODD, "third", "last")
    assert isinstance(second, Refused)
    assert str(second).startswith("Line 2 of standard input is not UTF-8")


def test_a_stream_of_text_without_bytes_beneath_it_is_read_as_it_is(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond \udcff\nthird\n"))
    first, second, third = prompts.Turns(interactive=False)
    assert (first, third) == ("first", "third")
    assert isinstance(second, Refused)
