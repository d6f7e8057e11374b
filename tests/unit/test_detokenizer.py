"""Text from tokens as they arrive: whole characters only, stop strings never shown, nothing lost."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.api.byte_tokenizer import ByteTokenizer
from llumnix.api.detokenizer import StopScanner, TextStream
from llumnix.api.tokenizer import ByteTable, TextTokenizer, load_tokenizer

TOKENIZER: TextTokenizer = ByteTokenizer()
TABLE = TOKENIZER.table


def shown(stream: TextStream, tokens: list[int], sizes: list[int]) -> tuple[str, list[str]]:
    """All text of a stream fed in pieces of these sizes, and the pieces."""
    pieces, at = [], 0
    for size in [*sizes, len(tokens)]:
        part, at = tokens[at : at + size], at + size
        pieces.append(stream.push(part, last=at >= len(tokens)).text)
        if at >= len(tokens):
            break
    return "".join(pieces), pieces


class TestText:
    def test_a_character_is_shown_when_its_last_byte_has_come(self) -> None:
        stream = TextStream(TABLE)
        assert [stream.push([byte]).text for byte in "a€".encode()] == ["a", "", "", "€"]

    def test_an_unfinished_character_at_the_end_is_replaced(self) -> None:
        stream = TextStream(TABLE)
        assert stream.push(list("a€".encode()[:-1]), last=True).text == "a�"

    @given(st.text(max_size=60), st.lists(st.integers(1, 7), max_size=60))
    @settings(max_examples=200, deadline=None)
    def test_pieces_add_up_to_the_text(self, text: str, sizes: list[int]) -> None:
        whole, pieces = shown(TextStream(TABLE), list(text.encode()), sizes)
        assert whole == text
        assert all("�" not in piece for piece in pieces) or "�" in text

    @given(st.lists(st.integers(0, 255), max_size=60), st.lists(st.integers(1, 5), max_size=60))
    @settings(max_examples=200, deadline=None)
    def test_bytes_that_are_no_text_come_out_as_one_decoding_of_all(
        self, data: list[int], sizes: list[int]
    ) -> None:
        assert shown(TextStream(TABLE), data, sizes)[0] == bytes(data).decode("utf-8", "replace")

    def test_special_tokens_are_skipped_unless_wanted(self) -> None:
        table = ByteTable([b"a", b"<end>"], frozenset({1}), False)
        assert TextStream(table).push([0, 1, 0]).text == "aa"
        assert TextStream(table, skip_special=False).push([0, 1, 0]).text == "a<end>a"

    def test_ids_without_a_piece_are_nothing(self) -> None:
        assert TextStream(TABLE).push([97, 5000, 98]).text == "ab"

    def test_one_leading_space_is_dropped_where_the_model_decodes_so(self) -> None:
        table = ByteTable([b" a", b" ", b""], frozenset(), True)
        stream = TextStream(table)
        assert [stream.push([token]).text for token in (2, 0, 0)] == ["", "a", " a"]


class TestStops:
    def test_a_stop_string_over_several_tokens_is_never_shown(self) -> None:
        stream = TextStream(TABLE, ["END"])
        deltas = [stream.push([byte]) for byte in b"xyEND"]
        assert [delta.text for delta in deltas] == ["x", "y", "", "", ""]
        assert deltas[-1].stopped and deltas[-1].tokens_used == 1

    def test_held_text_is_shown_once_it_cannot_become_a_stop(self) -> None:
        stream = TextStream(TABLE, ["ENDE"])
        assert [stream.push([byte]).text for byte in b"ENx"] == ["", "", "ENx"]

    def test_held_text_is_shown_at_the_end(self) -> None:
        stream = TextStream(TABLE, ["END"])
        assert stream.push(list(b"aEN"), last=True).text == "aEN"

    def test_tokens_after_the_match_do_not_count(self) -> None:
        delta = TextStream(TABLE, ["b"]).push(list(b"aabcc"))
        assert (delta.text, delta.tokens_used, delta.stopped) == ("aa", 3, True)

    def test_the_stop_string_is_kept_if_wanted(self) -> None:
        assert TextStream(TABLE, ["bc"], keep_stop=True).push(list(b"abcd")).text == "abc"

    def test_the_earliest_match_wins(self) -> None:
        assert TextStream(TABLE, ["cd", "b"]).push(list(b"abcd")).text == "a"

    def test_stops_count_only_from_the_least_length_on(self) -> None:
        delta = TextStream(TABLE, ["a"], min_tokens=3).push(list(b"aabaca"))
        assert (delta.text, delta.tokens_used) == ("aab", 4)

    def test_a_stop_string_ending_with_a_character_cut_by_the_end_is_found(self) -> None:
        stream = TextStream(TABLE, ["�"])
        delta = stream.push([ord("a"), 0xE2], last=True)
        assert (delta.text, delta.stopped) == ("a", True)

    @given(
        st.text(alphabet="abc", max_size=40),
        st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4),
        st.lists(st.integers(1, 4), max_size=40),
    )
    @settings(max_examples=400, deadline=None)
    def test_as_if_the_whole_text_had_been_searched(
        self, text: str, stops: list[str], sizes: list[int]
    ) -> None:
        stream = TextStream(TABLE, stops)
        tokens, seen, at, stopped = list(text.encode()), "", 0, False
        for size in [*sizes, len(tokens) + 1]:
            part, at = tokens[at : at + size], at + size
            delta = stream.push(part, last=at >= len(tokens))
            seen, stopped = seen + delta.text, delta.stopped
            if stopped or at >= len(tokens):
                break
        # the match that is complete first ends the text
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        first_end = min(end for end, _ in ends) if ends else None
        starts = [start for end, start in ends if end == first_end]
        assert seen == (text[: min(starts)] if starts else text)
        assert stopped == bool(ends)

    def test_many_long_stops_cost_microseconds(self) -> None:
        rng = Random(1)
        stops = ["".join(rng.choice("ab") for _ in range(256)) for _ in range(16)]
        scanner = StopScanner(stops, False)
        text = "".join(rng.choice("ab") for _ in range(2000))
        whole = "".join(scanner.push(char)[0] for char in text) + scanner.release()
        assert whole == text


def _vocabulary() -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    return {letter: index for index, letter in enumerate(letters)}


def test_byte_level_folders_decode_as_their_own_decoder_does(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(_vocabulary(), []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    loaded = _load(made, tmp_path)
    text = "Grüße, 世界! \n\t é€😀"
    tokens = loaded.encode(text)
    assert loaded.decode(tokens) == text
    rng = Random(2)
    for _ in range(200):
        ids = [rng.randrange(made.get_vocab_size()) for _ in range(rng.randint(1, 12))]
        expected = made.decode(ids, skip_special_tokens=True)
        assert "".join(shown(TextStream(loaded.table), ids, [1] * 20)[1]) == expected


def test_byte_fallback_folders_decode_as_their_own_decoder_does(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<s>", "▁", "▁the", "a", "b", "é", "."]
    vocabulary = {word: index for index, word in enumerate([*words, *[f"<0x{n:02X}>" for n in range(256)]])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    steps = tokenizers.decoders
    made.decoder = steps.Sequence(
        [steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>"])
    loaded = _load(made, tmp_path)
    euro = [vocabulary[f"<0x{byte:02X}>"] for byte in "€".encode()]
    for ids in ([1, 3, 4, 7], [2, 2, 4], [4, *euro, 5, 3], [*euro, 6]):
        assert "".join(shown(TextStream(loaded.table), ids, [1] * 9)[1]) == made.decode(
            ids, skip_special_tokens=True
        )


def _load(made: Any, folder: Path) -> TextTokenizer:
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return load_tokenizer(str(folder))
