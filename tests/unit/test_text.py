"""Text repair and validation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedline.core.text import repair_text
from embedline.errors import UnusableText


@pytest.mark.parametrize(
    ("broken", "repaired"),
    [
        ("The Mona Lisa doesnâ€™t have eyebrows.", "The Mona Lisa doesn’t have eyebrows."),
        ("schÃ¶n und grÃ¼n", "schön und grün"),
        ("Fish &amp; chips", "Fish & chips"),
        ("&lt;b&gt;bold&lt;/b&gt;", "<b>bold</b>"),
        ("<p>Fish &amp; chips", "<p>Fish & chips"),
        ("a\x00b\x1b[31mc", "abc"),
        ("one\r\ntwo", "one\ntwo"),
    ],
)
def test_mojibake_and_entities_and_control_characters_are_repaired(broken: str, repaired: str) -> None:
    assert repair_text(broken) == repaired


@pytest.mark.parametrize(
    "sound",
    [
        "plain",
        "naïve café",
        "“curly” – dashes — stay",
        "漢字かな交じり文",
        "emoji 👩‍👩‍👧 family",
        "AT&T",
        "tab\tand\nnewline",
        "١٢٣",
        "ﬁ",
    ],
)
def test_a_sound_text_is_left_as_it_is_but_for_ligatures(sound: str) -> None:
    assert repair_text(sound) in (sound, sound.replace("ﬁ", "fi"))


@pytest.mark.parametrize(
    "empty",
    [
        "",
        " ",
        "\n\t\r\n",
        "\u00a0\u2003\u3000",
        "\u200b\u200d\ufeff",
        "\x00\x01\x1f\x7f",
        "\ufffd\ufffd",
        "&nbsp;",
        "&#8203;",
        "\ue000",
    ],
)
def test_a_text_without_anything_printable_is_unusable(empty: str) -> None:
    with pytest.raises(UnusableText) as caught:
        repair_text(empty)
    assert caught.value.sqlstate == "EL002"
    assert caught.value.detail


@given(st.text())
def test_any_text_is_either_repaired_to_something_visible_or_unusable(text: str) -> None:
    try:
        repaired = repair_text(text)
    except UnusableText:
        return
    assert any(character.isprintable() and not character.isspace() for character in repaired)
    assert "\x00" not in repaired


@given(st.text(alphabet=st.characters(codec="ascii", categories=["L", "N", "Zs"]), min_size=1).filter(str.strip))
def test_plain_ascii_is_never_changed(text: str) -> None:
    assert repair_text(text) == text


def test_a_text_longer_than_one_repair_piece_keeps_its_length() -> None:
    text = "ä" * 2_500_000
    assert repair_text(text) == text
