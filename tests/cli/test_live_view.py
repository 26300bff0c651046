"""The live view: tokens by state and confidence."""

from coterie.cli.live_view import CONFIDENCE_COLOURS, END_GLYPH, MASK_GLYPH, LiveView
from coterie.decoding import Token
from coterie.engine.events import Denoised


def test_the_live_view_shows_the_last_tokens() -> None:
    view = LiveView(
        title="vanilla", decode_token=str, num_experts=8, moe_layers=(1, 2), eos_ids=(9,)
    )
    guessed = (Token(2, 7, 0.1),)
    view.update(Denoised(0, 1, committed=(Token(0, 5, 0.95),), provisional=guessed, experts=(4, 8)))
    assert view.answer_text().plain == f"5{MASK_GLYPH}7"
    assert [str(span.style) for span in view.answer_text().spans] == [
        CONFIDENCE_COLOURS[-1],
        "dim",
        f"dim italic {CONFIDENCE_COLOURS[0]}",
    ]
    view.update(Denoised(0, 2, committed=(Token(2, 9, 1.0),), edited=(Token(0, 6, 0.5),)))
    assert view.answer_text().plain == f"6{MASK_GLYPH}{END_GLYPH}"
    assert str(view.answer_text().spans[0].style) == f"underline {CONFIDENCE_COLOURS[2]}"
    assert (view.forwards, view.blocks, view.experts) == (2, 1, (4, 8))
