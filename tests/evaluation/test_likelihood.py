"""Scores against a naive pass, and the real model against transformers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stable_lora_jax.data import Encoded, encode_all, load_task, load_tokenizer, make_batch, make_rows
from stable_lora_jax.evaluation import Evaluation, branch_log_likelihoods, evaluate, target_log_likelihoods
from stable_lora_jax.models import load_model
from tests.training.tiny_runs import adapted, naive_log_likelihoods, questions, trees_equal

EXAMPLES = questions(12)


@pytest.fixture(scope="module")
def expected():
    model = adapted()
    return [np.array(naive_log_likelihoods(model, example)) for example in EXAMPLES]


@pytest.mark.parametrize("max_tokens", [1, 100, 2048])
def test_equals_one_row_per_choice_in_the_order_given(expected, max_tokens):
    scores = evaluate(adapted(), EXAMPLES, max_tokens=max_tokens)
    assert scores.answer == tuple(example.answer for example in EXAMPLES)
    for found, wanted, count, example in zip(scores.log_likelihood, expected, scores.num_tokens, EXAMPLES, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)  # float32 sums of up to 5 tokens, in another order
        assert count.tolist() == [len(branch) for branch in example.branches]


def test_training_and_evaluation_score_alike(expected):
    batch = make_batch(EXAMPLES, num_rows=14)
    target = nnx.jit(target_log_likelihoods)(adapted(), batch)
    assert not np.asarray(target)[batch.branch < 0].any()
    sums, counts = branch_log_likelihoods(target, batch, 4)
    for row, (wanted, example) in enumerate(zip(expected, EXAMPLES, strict=True)):
        np.testing.assert_allclose(sums[row, 0, : len(wanted)], wanted, atol=1e-4)
        assert counts[row, 0, : len(wanted)].tolist() == [len(branch) for branch in example.branches]
    assert not counts[12:].any()


def test_branches_against_a_loop():
    random = np.random.default_rng(0)
    target, branch = random.normal(size=(5, 17)), random.integers(-1, 3, (5, 17)).astype(np.int32)
    owner = np.where(branch < 0, -1, random.integers(0, 2, (5, 17))).astype(np.int32)
    batch = make_rows([], num_rows=5, width=4, num_targets=17, num_documents=2)._replace(branch=branch, owner=owner)
    sums, counts = branch_log_likelihoods(jnp.asarray(target, jnp.float32), batch, 3)
    for row, question, choice in itertools.product(range(5), range(2), range(3)):
        chosen = target[row][(branch[row] == choice) & (owner[row] == question)]
        np.testing.assert_allclose(sums[row, question, choice], chosen.sum(), atol=1e-5)
        assert counts[row, question, choice] == len(chosen)


def test_figures_by_hand():
    scores = Evaluation(
        log_likelihood=(np.array([-4.0, -3.0]), np.array([-1.0, -9.0, -8.0]), np.array([-2.0, -1.0])),
        num_tokens=(np.array([4, 1]), np.array([1, 3, 1]), np.array([1, 1])),
        answer=(0, 1, 1),
    )
    assert scores.accuracy_sum == pytest.approx(1 / 3)  # the third alone
    assert scores.accuracy_token == pytest.approx(2 / 3)  # -1 > -3 in the first
    assert scores.nll_token == pytest.approx((4 + 9 + 1) / (4 + 3 + 1))
    assert scores.summary() == {
        "accuracy_sum": scores.accuracy_sum,
        "accuracy_token": scores.accuracy_token,
        "nll_token": scores.nll_token,
        "questions": 3,
    }


def test_dropout_is_off_and_the_model_stays_as_it_was(expected):
    model = adapted(dropout=0.5)
    model.train()
    graph, before = nnx.split(model)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(before, extract_fn=_plain))
    scores = evaluate(model, EXAMPLES)
    for found, wanted in zip(scores.log_likelihood, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    graph_after, after = nnx.split(model)
    assert graph_after == graph  # still in training mode
    assert trees_equal(nnx.to_pure_dict(after, extract_fn=_plain), before)


def _plain(variable):
    value = variable.get_value()
    return jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value


def test_a_row_may_be_longer_than_the_context_if_no_answer_is():
    example = Encoded((1,) * 40, tuple((i, i + 1, i + 2) for i in range(20)), 0)
    assert example.length > 64
    found, wanted = (evaluate(adapted(max_positions=size), [example]) for size in (64, 128))
    np.testing.assert_array_equal(found.log_likelihood, wanted.log_likelihood)


def test_errors():
    with pytest.raises(ValueError, match=r"no examples.*at least one"):
        evaluate(adapted(), [])
    with pytest.raises(ValueError, match="example 1 takes 70 positions; the model has 64"):
        evaluate(adapted(), [EXAMPLES[0], Encoded((1,) * 70, ((2,), (3,)), 0)])
    broken = adapted()
    broken.embed_tokens.embedding[5] = jnp.nan
    with pytest.raises(ValueError, match=r"Question 1 has log-likelihoods \[.*nan.*finite"):
        evaluate(broken, [Encoded((1, 2), ((2,), (3,)), 0), Encoded((1, 5), ((2,), (3,)), 0)])


def test_smollm2_equals_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from stable_lora_jax.assets.packaged import smollm2_gguf

    file = smollm2_gguf()
    examples = encode_all(load_tokenizer("smollm2-135m"), load_task("arc_easy", "validation")[::36][:16])
    scores = evaluate(load_model(file), examples)
    reference = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for example, found in zip(examples, scores.log_likelihood, strict=True):
        rows = [torch.tensor(example.prefix + branch) for branch in example.branches]
        # Padding stands on the right, where a causal model does not look.
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with torch.no_grad():
            log_p = torch.log_softmax(reference(tokens).logits, -1).numpy()
        first = len(example.prefix) - 1
        wanted = np.array(
            [log_p[i, np.arange(len(b)) + first, np.array(b)].sum() for i, b in enumerate(example.branches)]
        )
        np.testing.assert_allclose(found, wanted, atol=1e-2)  # float32 logits of 30 layers differ by up to 2e-3 a token
        assert found.argmax() == wanted.argmax()
