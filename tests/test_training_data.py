"""Training rows and the tokenizer of the embedded model."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.problems import LARGEST, TASKS
from coterie.training.data import DRILL, NO_TARGET, BatchMaker, Course, Mixture
from coterie.training.vocabulary import ASSISTANT, END, HUMAN, MASK, ROLE_END, build

TOKENIZER = build(sample=500)
MIXTURE = Mixture(rows=4)


@given(st.text())
def test_the_tokenizer_loses_nothing(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@given(st.sampled_from(list(TASKS)), st.integers(0, 2**32))
def test_numbers_of_the_tables_are_one_token_each(task, seed):
    made = TASKS[task](random.Random(seed))
    for n in range(LARGEST + 1):
        assert len(TOKENIZER.encode(f" {n}").ids) == 1
    assert TOKENIZER.decode(TOKENIZER.encode(made.answer).ids) == made.answer


@given(st.integers(0, 1000), st.integers(0, 10**6))
def test_a_batch_is_a_pure_function_of_seed_and_number(seed, step):
    first, again = (BatchMaker(TOKENIZER, MIXTURE, seed)(step) for _ in range(2))
    for name in ("tokens", "positions", "visible", "targets", "weights", "tasks"):
        assert torch.equal(getattr(first, name), getattr(again, name))


@given(st.integers(0, 10**6))
def test_only_masked_positions_have_targets_and_every_noised_block_has_one(step):
    batch = BatchMaker(TOKENIZER, MIXTURE, 0)(step)
    mask = TOKENIZER.token_to_id(MASK)
    assert torch.equal(batch.tokens == mask, batch.targets != NO_TARGET)
    blocks = (batch.targets != NO_TARGET).unflatten(1, (-1, 32)).any(-1)  # [B, n]
    context = batch.visible.sum(1) - batch.visible.diagonal(dim1=1, dim2=2).long() > 0
    assert not (context & blocks).any()


@given(st.integers(0, 10**6))
def test_a_block_sees_itself_and_earlier_clean_blocks_alone(step):
    batch = BatchMaker(TOKENIZER, MIXTURE, 1)(step)
    index = batch.positions[:, ::32] // 32
    noised = (batch.targets != NO_TARGET).unflatten(1, (-1, 32)).any(-1)
    seen = batch.visible & ~torch.eye(8, dtype=torch.bool)
    assert batch.visible.diagonal(dim1=1, dim2=2).all()
    assert not (seen & noised[:, None, :]).any()
    assert (index[:, None, :] < index[:, :, None])[seen].all()


def test_a_sheet_is_the_chat_template_with_whole_blocks_and_mostly_answer():
    maker = BatchMaker(TOKENIZER, MIXTURE, 0)
    rng = random.Random(3)
    filled = answered = 0
    for _ in range(400):
        made = TASKS[rng.choice(list(TASKS))](rng)
        sheet = maker.sheet(made)
        text = TOKENIZER.decode(sheet.ids, skip_special_tokens=False)
        assert text.rstrip(END[-1]).startswith(
            f"{HUMAN}{made.prompt}{ROLE_END}{ASSISTANT}{made.answer}{END}"[:-1]
        )
        assert len(sheet.ids) % 32 == 0
        filled += len(sheet.ids) - sheet.end
        answered += sheet.end - sheet.start
    assert filled < 0.5 * answered


def test_drills_have_their_own_task_number():
    batch = BatchMaker(TOKENIZER, Mixture(rows=8, drills=1.0), 0)(0)
    assert batch.tasks is not None
    assert (batch.tasks == DRILL).any(1).all()


@given(st.integers(0, 20))
def test_a_course_draws_each_step_from_its_own_lesson(step):
    lessons = {0: MIXTURE, 10: Mixture(rows=2, drills=0.0)}
    drawn = Course(TOKENIZER, lessons, 4)(step)
    expected = BatchMaker(TOKENIZER, lessons[10 if step >= 10 else 0], 4)(step)
    assert torch.equal(drawn.tokens, expected.tokens)


def test_words_to_copy_and_operators_weigh_more_where_asked():
    mixture = Mixture(rows=4, content_weight=5.0, operator_weight=7.0, fill_weight=0.0)
    batch = BatchMaker(TOKENIZER, mixture, 0)(0)
    assert batch.tasks is not None
    answers = (batch.targets >= 0) & (batch.tasks != DRILL)
    for piece, weight in ((" +", 7.0), (" 4", 5.0), (" =", 1.0), (END, 0.0)):
        (token,) = TOKENIZER.encode(piece).ids
        found = batch.weights[answers & (batch.targets == token)]
        assert len(found)
        assert (found == weight).any()
        assert ((found == weight) | (piece == END)).all()
