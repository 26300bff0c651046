"""Training rows and the tokenizer of the embedded model."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.lab.problems import MAX_NUMBER, PROBLEM_MAKERS
from coterie.lab.training.data import DRILL_TASK, IGNORE_INDEX, BatchMaker, Curriculum, DataMixture
from coterie.lab.training.vocabulary import (
    ASSISTANT,
    END_OF_TEXT,
    HUMAN,
    MASK_TOKEN,
    ROLE_END,
    build_tokenizer,
)

TOKENIZER = build_tokenizer(num_problems=500)
MIXTURE = DataMixture(rows=4)


@given(st.text())
def test_the_tokenizer_loses_nothing(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@given(st.sampled_from(list(PROBLEM_MAKERS)), st.integers(0, 2**32))
def test_numbers_of_the_tables_are_one_token_each(task, seed):
    made = PROBLEM_MAKERS[task](random.Random(seed))
    for n in range(MAX_NUMBER + 1):
        assert len(TOKENIZER.encode(f" {n}").ids) == 1
    assert TOKENIZER.decode(TOKENIZER.encode(made.answer).ids) == made.answer


@given(st.integers(0, 1000), st.integers(0, 10**6))
def test_a_batch_is_a_pure_function_of_seed_and_number(seed, step):
    first, again = (BatchMaker(TOKENIZER, MIXTURE, seed)(step) for _ in range(2))
    for name in ("tokens", "positions", "block_mask", "targets", "weights", "tasks"):
        assert torch.equal(getattr(first, name), getattr(again, name))


@given(st.integers(0, 10**6))
def test_only_masked_positions_have_targets_and_every_noised_block_has_one(step):
    batch = BatchMaker(TOKENIZER, MIXTURE, 0)(step)
    mask = TOKENIZER.token_to_id(MASK_TOKEN)
    assert torch.equal(batch.tokens == mask, batch.targets != IGNORE_INDEX)
    blocks = (batch.targets != IGNORE_INDEX).unflatten(1, (-1, 32)).any(-1)  # [B, n]
    context = batch.block_mask.sum(1) - batch.block_mask.diagonal(dim1=1, dim2=2).long() > 0
    assert not (context & blocks).any()


@given(st.integers(0, 10**6))
def test_block_attends_to_itself_and_earlier_clean_blocks(step):
    batch = BatchMaker(TOKENIZER, MIXTURE, 1)(step)
    index = batch.positions[:, ::32] // 32
    noised = (batch.targets != IGNORE_INDEX).unflatten(1, (-1, 32)).any(-1)
    seen = batch.block_mask & ~torch.eye(8, dtype=torch.bool)
    assert batch.block_mask.diagonal(dim1=1, dim2=2).all()
    assert not (seen & noised[:, None, :]).any()
    assert (index[:, None, :] < index[:, :, None])[seen].all()


def test_tokenized_problem_follows_the_chat_template():
    maker = BatchMaker(TOKENIZER, MIXTURE, 0)
    rng = random.Random(3)
    filled = answered = 0
    for _ in range(400):
        made = PROBLEM_MAKERS[rng.choice(list(PROBLEM_MAKERS))](rng)
        sheet = maker.tokenize(made)
        text = TOKENIZER.decode(sheet.ids, skip_special_tokens=False)
        assert text.rstrip(END_OF_TEXT[-1]).startswith(
            f"{HUMAN}{made.prompt}{ROLE_END}{ASSISTANT}{made.answer}{END_OF_TEXT}"[:-1]
        )
        assert len(sheet.ids) % 32 == 0
        filled += len(sheet.ids) - sheet.end
        answered += sheet.end - sheet.start
    assert filled < 0.5 * answered


def test_drills_have_their_own_task_number():
    batch = BatchMaker(TOKENIZER, DataMixture(rows=8, drill_row_share=1.0), 0)(0)
    assert batch.tasks is not None
    assert (batch.tasks == DRILL_TASK).any(1).all()


@given(st.integers(0, 20))
def test_curriculum_uses_the_mixture_of_each_step(step):
    lessons = {0: MIXTURE, 10: DataMixture(rows=2, drill_row_share=0.0)}
    drawn = Curriculum(TOKENIZER, lessons, 4)(step)
    expected = BatchMaker(TOKENIZER, lessons[10 if step >= 10 else 0], 4)(step)
    assert torch.equal(drawn.tokens, expected.tokens)


def test_content_and_operator_weights():
    mixture = DataMixture(rows=4, content_weight=5.0, operator_weight=7.0, fill_weight=0.0)
    batch = BatchMaker(TOKENIZER, mixture, 0)(0)
    assert batch.tasks is not None
    answers = (batch.targets >= 0) & (batch.tasks != DRILL_TASK)
    for piece, weight in ((" +", 7.0), (" 4", 5.0), (" =", 1.0), (END_OF_TEXT, 0.0)):
        (token,) = TOKENIZER.encode(piece).ids
        found = batch.weights[answers & (batch.targets == token)]
        assert len(found)
        assert (found == weight).any()
        assert ((found == weight) | (piece == END_OF_TEXT)).all()
