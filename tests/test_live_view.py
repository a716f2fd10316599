import pytest
import torch

from grpo.config import ModelSection
from grpo.denoise import denoise
from grpo.model import GPT
from grpo.noise import row_seeds
from grpo.tokenizer import build_tokenizer
from pipelines.live_view import MASK_TEXT, Recorder, legend, render, token_pieces

torch.set_num_threads(1)
TOKENIZER = build_tokenizer("bytes")
MASK, PAD = TOKENIZER.vocabulary.mask_id, TOKENIZER.vocabulary.pad_id


def test_pieces_join_to_the_decoded_text():
    text = [*"h\u00e9llo \u20ac".encode()]
    for ids in (text, [MASK, 0xC3, MASK, 0xA9, MASK], [0xE2, 0x82], [PAD, 65, 0xC3, PAD], []):
        pieces = token_pieces(ids, TOKENIZER)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == TOKENIZER.decode(ids, mask_text=MASK_TEXT)


def test_control_characters_are_visible():
    assert token_pieces([10, 9, 27, 65], TOKENIZER) == ["\u21b5\n", "\u2192   ", "\u00b7", "A"]


@pytest.fixture(scope="module")
def recorded():
    torch.manual_seed(0)
    model = GPT(ModelSection(n_layer=1, n_head=2, n_embd=16), TOKENIZER.vocabulary, block_size=16).eval()
    tokens = torch.full((3, 16), MASK)
    tokens[:, :4] = torch.tensor([*b"</sc"])
    recorder = Recorder(TOKENIZER, steps=3)
    texts = denoise(model, tokens, seeds=row_seeds(0, 0, 0, torch.arange(3)), steps=3, remasking="critic",
                    randomness=0.5, on_step=recorder)
    return recorder, texts


def test_frames_tell_what_became_of_each_token(recorded):
    recorder, texts = recorded
    for row in range(3):
        frames = recorder.sample(row, texts)
        assert [frame.title for frame in frames[:2]] == ["step 1 of 3, input", "step 1 of 3, filled"]
        assert len(frames) == 7 and frames[0].kinds == "pppp" + "m" * 12
        for before, filled, after in zip(frames[:-1:2], frames[1::2], frames[2::2], strict=True):
            for i, (was, kind) in enumerate(zip(before.kinds, filled.kinds, strict=True)):
                assert (was == "p") == (kind == "p") == (i < 4)
                assert (kind == "r") == (after.kinds[i] == "m")
                assert kind != "n" or was == "m"
                assert kind != "k" or was == "k"
        assert frames[1].kinds.count("r") == 8 and frames[3].kinds.count("r") == 4
        assert frames[-1].kinds == "pppp" + "k" * 12
        assert frames[-1].pieces == token_pieces(texts[row].tolist(), TOKENIZER)


def test_a_token_was_last_filled_in_the_last_step_whose_input_lacked_it(recorded):
    recorder, texts = recorded
    for row in range(3):
        inputs = [frame.kinds for frame in recorder.sample(row, texts)[:-1:2]]
        last = [max((step for step, kinds in enumerate(inputs, 1) if kinds[i] == "m"), default=0) for i in range(16)]
        assert recorder.last_filled(row) == last and set(last) == {0, 1, 2, 3}


def test_heat_is_the_critics_probability_where_it_judged(recorded):
    recorder, _ = recorded
    record, frame = recorder.records[0], recorder.frames(recorder.records[0], 1)[1]
    expected = (100 * record.scores[1].exp()).round().int().tolist()
    assert frame.heat == [-1] * 4 + expected[4:]
    assert set(recorder.frames(recorder.records[2], 1)[1].heat) == {-1}  # nobody judges the last step


def test_the_terminal_shows_each_token_in_its_kinds_style(recorded):
    recorder, _ = recorded
    frame = recorder.frames(recorder.records[0], 0)[1]
    text = render(frame)
    assert text.plain == "".join(frame.pieces)
    styles = [str(span.style) for span in text.spans]
    assert styles[0] == "cyan" and any("red" in style and "on rgb" in style for style in styles)
    assert "re-masked" in legend().plain
