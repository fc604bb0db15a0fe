"""Incremental text against plain decoding: whatever the pieces, the text is the same."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.gateway.core.stops import StopFinder
from services.gateway.core.text import HELD_TOKENS_MAX, Detokenizer
from services.gateway.core.transcript import Transcript
from services.gateway.tokenizer import ModelText

DEMO = Tokenizer.from_file(
    str(Path(__file__).parents[2] / "deploy" / "demo_model" / "tokenizer.json")
)
WORDS = st.text(alphabet="aé€😀 \n.\u0301", max_size=30)


def metaspace_tokenizer() -> Tokenizer:
    """As Llama 2's: words with a leading mark, and single bytes for what is not in the list."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁to", "▁be", "be", "é"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


METASPACE = metaspace_tokenizer()


def metaspace_id(piece: str) -> int:
    token_id: int | None = METASPACE.token_to_id(piece)
    assert token_id is not None
    return token_id


TO, BE, REST = (metaspace_id(piece) for piece in ("▁to", "▁be", "be"))


def texts_of(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    """The deltas, token by token, and the flush."""
    detokenizer = Detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(WORDS)
def test_text_comes_back_whole_and_no_character_is_split(text: str) -> None:
    ids = DEMO.encode(text, add_special_tokens=False).ids
    deltas = texts_of(DEMO, ids)
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)


@given(st.lists(st.integers(3, DEMO.get_vocab_size() - 1), max_size=60))
def test_any_ids_decode_as_in_one_piece(ids: list[int]) -> None:
    text = "".join(texts_of(DEMO, ids))
    plain = DEMO.decode(ids)
    if "\ufffd" * (HELD_TOKENS_MAX - 1) not in plain:  # endless broken bytes are cut by a limit
        assert text == plain


def test_broken_bytes_do_not_hold_text_back_for_ever() -> None:
    byte = DEMO.encode("😀", add_special_tokens=False).ids[1]
    detokenizer = Detokenizer(DEMO)
    deltas = [detokenizer.push(byte) for _ in range(10 * HELD_TOKENS_MAX)]
    assert sum(map(bool, deltas)) == 10
    assert all(len(delta) == HELD_TOKENS_MAX for delta in deltas if delta)


def test_unfinished_character_at_the_end_is_told() -> None:
    ids = DEMO.encode("a😀", add_special_tokens=False).ids[:-1]
    assert "".join(texts_of(DEMO, ids)) == DEMO.decode(ids) == "a\ufffd"


def test_first_word_keeps_its_space_after_a_prompt() -> None:
    assert "".join(texts_of(METASPACE, [TO, BE])) == "to be"
    assert "".join(texts_of(METASPACE, [TO, BE], prompt=[TO])) == " to be"


def test_bytes_beside_words() -> None:
    euro = [metaspace_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert texts_of(METASPACE, [TO, *euro, REST]) == ["to", "", "", "€", "be", ""]


def test_special_tokens_are_shown_only_if_asked_for(model_text: ModelText) -> None:
    special = min(model_text.special_ids)
    ids = [special, *DEMO.encode("be", add_special_tokens=False).ids, special]
    assert "".join(texts_of(DEMO, ids)) == "be"
    shown = Detokenizer(DEMO, skip_special=False)
    text = "".join([*(shown.push(token_id) for token_id in ids), shown.flush()])
    assert text == DEMO.decode(ids, skip_special_tokens=False) != "be"


def test_a_prompt_cut_inside_a_character() -> None:
    face = DEMO.encode("😀", add_special_tokens=False).ids
    word = DEMO.encode(" be", add_special_tokens=False).ids
    assert "".join(texts_of(DEMO, [*face[2:], *word], prompt=face[:2])).endswith(" be")


# ------------------------------------------------------------------------------- stop strings


def slow_stop(text: str, stops: list[str], *, include: bool) -> tuple[str, int | None]:
    """The rule, character by character: (visible text, characters read at the stop)."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return (text[:end] if include else text[: end - len(longest)]), end
    return text, None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(places)]


@given(
    st.text(alphabet="ab ", max_size=40),
    st.lists(st.text(alphabet="ab ", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 1000), max_size=12),
    st.booleans(),
)
def test_stop_strings_whatever_the_pieces(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    expected, stop_end = slow_stop(text, stops, include=include)
    finder = StopFinder(stops, include=include)
    visible, read, stopped = "", 0, False
    for piece in pieces_of(text, cuts):
        released = finder.push(piece)
        visible += released.text
        assert expected.startswith(visible), "text was shown that a stop string takes back"
        read += len(piece)
        if released.stopped_by is not None:
            stopped = True
            assert stop_end is not None
            assert read - len(piece) < stop_end <= read, "stopped at the wrong piece"
            break
    if not stopped:
        visible += finder.flush()
        assert stop_end is None
    assert visible == expected


def test_held_text_is_as_short_as_can_be() -> None:
    finder = StopFinder(["END", "\n\n"])
    assert [finder.push(piece).text for piece in ("aE", "x", "EN", "EN", "\n", "b")] == [
        "a",
        "Ex",
        "",
        "EN",
        "EN",
        "\nb",
    ]


# --------------------------------------------------------------------------------- transcripts


@given(WORDS, st.lists(st.integers(1, 5), max_size=30), st.booleans())
def test_transcript_whatever_the_runs(text: str, sizes: list[int], chatty: bool) -> None:
    """Runs of any length, taken after each run or only at the end: the same text and count."""
    ids = DEMO.encode(text, add_special_tokens=False).ids
    transcript = Transcript(Detokenizer(DEMO), ["é€", "aa"])
    seen, start = "", 0
    for size in [*sizes, len(ids) + 1]:
        transcript.push(ids[start : start + size])
        start += size
        delta = transcript.take() if chatty else None
        seen += delta.text if delta else ""
    transcript.finish("length")
    last = transcript.take()
    seen += last.text if last else ""
    expected, stop_end = slow_stop(text, ["é€", "aa"], include=False)
    assert seen == expected
    assert transcript.finish_reason == ("length" if stop_end is None else "stop")
    if stop_end is None:
        assert transcript.output_tokens == len(ids)
    else:
        count = next(n for n in range(len(ids) + 1) if len(whole(ids[:n])) >= stop_end)
        assert transcript.output_tokens == count


def whole(ids: list[int]) -> str:
    """The text of ids without an unfinished character."""
    return DEMO.decode(ids).rstrip("\ufffd")


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    ids = DEMO.encode("stop and stop", add_special_tokens=False).ids
    first = len(DEMO.encode("stop", add_special_tokens=False).ids)
    transcript = Transcript(Detokenizer(DEMO), ["stop"], min_tokens=first)
    assert transcript.push(ids) == len(ids)
    delta = transcript.take()
    assert delta is not None
    assert (delta.text, delta.stop_reason) == ("stop and ", "stop")


@pytest.mark.parametrize("ending", [True, False])
def test_ending_token_counts_but_is_no_text(ending: bool) -> None:
    ids = DEMO.encode("be", add_special_tokens=False).ids
    transcript = Transcript(Detokenizer(DEMO, skip_special=False))
    transcript.push([*ids, 2], ending_token=ending)
    transcript.finish("stop")
    delta = transcript.take()
    assert delta is not None
    assert delta.text == ("be" if ending else "be" + DEMO.decode([2], skip_special_tokens=False))
    assert transcript.output_tokens == len(ids) + 1
    assert delta.stop_reason == (2 if ending else None)
    assert transcript.take() is None
