"""Keys come after the follower has moved and enter the queue after the loss; resuming and processes change nothing."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mixtura.core.contrast import queue_contrast
from mixtura.multimodal.retrieval.crops import CropDataset, Tokens
from mixtura.multimodal.retrieval.encoder import EncoderConfig, TextEncoder
from mixtura.multimodal.retrieval.tokenizer import SearchTokenizer, train_tokenizer
from mixtura.multimodal.retrieval.train import (
    MomentumRetriever,
    UnsupervisedConfig,
    finetune,
    mine_hard_negatives,
    train_unsupervised,
)

TOPICS = [
    "lute viol harp flute oboe",
    "boat river sail oar mast",
    "bread flour oven yeast salt",
    "star moon comet sky sun",
]


def documents(n=60):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(TOPICS[i % 4].split(), 30)) for i in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(documents(), 340)


def make(tokenizer, **options):
    config = EncoderConfig(vocab_size=len(tokenizer), **{"width": 16, **options})
    return TextEncoder(config, SearchTokenizer(tokenizer.inner))


def test_the_follower_moves_first_the_keys_of_a_step_are_no_negatives_and_then_enter_the_queue(tokenizer):
    encoder = make(tokenizer)
    learner = MomentumRetriever(encoder, 12, momentum=0.6, temperature=0.1)
    data = CropDataset(tokenizer.ids(documents()))
    table, slow, queue = encoder.table.weight, encoder.table.weight.detach().clone(), torch.zeros(0, 16)
    optimizer = torch.optim.SGD([table], lr=5.0)
    for step in range(5):
        q, k = data.batch(step, 4, seed=0)
        loss = learner(q, k)
        slow = 0.6 * slow + 0.4 * table.detach()
        twin = make(tokenizer)
        twin.table.weight.data = slow.clone()
        keys = twin.embed(k).detach()
        if step:
            torch.testing.assert_close(loss, queue_contrast(encoder.embed(q), keys, queue, 0.1), rtol=1e-5, atol=1e-6)
        queue = torch.cat([queue, keys])[-12:]
        torch.testing.assert_close(learner.queue.ordered(), queue, rtol=0, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not learner.key_encoder.table.weight.requires_grad and learner.key_encoder.table.weight.grad is None


def test_training_brings_documents_of_a_topic_together_without_a_label(tokenizer):
    # Most words are of every topic, so that at first documents are alike for the wrong words.
    rng, encoder, filling = np.random.default_rng(0), make(tokenizer), ["a", "the", "of", "in", "with"]
    texts = [
        " ".join(rng.permutation([*rng.choice(TOPICS[i % 4].split(), 8), *rng.choice(filling, 12)])) for i in range(60)
    ]
    data = CropDataset(tokenizer.ids(texts))

    def gap():
        z = encoder.encode(texts)
        same = np.equal.outer(np.arange(60) % 4, np.arange(60) % 4)
        return (z @ z.T)[same].mean() - (z @ z.T)[~same].mean()

    before = gap()
    history = train_unsupervised(
        encoder, data, UnsupervisedConfig(steps=60, batch=32, queue=64, lr=0.02, temperature=0.2)
    )
    assert len(history.losses) == 60 and before < 0.25 and gap() > before + 0.2


def test_a_run_that_was_broken_off_ends_with_the_weights_of_one_that_was_not(tokenizer, tmp_path):
    data, config = CropDataset(tokenizer.ids(documents())), UnsupervisedConfig(steps=12, batch=8, queue=20, lr=0.01)
    whole, broken = make(tokenizer), make(tokenizer)
    train_unsupervised(whole, data, config)
    calls, batch = 0, data.batch

    def stops(step, size, *, seed):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return batch(step, size, seed=seed)

    data.batch = stops
    with pytest.raises(KeyboardInterrupt):
        train_unsupervised(broken, data, config, out=tmp_path, checkpoint_every=5)
    data.batch = batch
    again = make(tokenizer)
    history = train_unsupervised(again, data, config, out=tmp_path, checkpoint_every=5)
    assert history.resumed_at == 5 and torch.equal(again.table.weight, whole.table.weight)
    with pytest.raises(ValueError, match="holds a run with queue=24, this one has 32"):
        train_unsupervised(
            make(tokenizer), data, UnsupervisedConfig(steps=12, batch=8, queue=30, lr=0.01), out=tmp_path
        )


def _process(rank, path, tokenizer_json, texts, out):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    tokenizer = SearchTokenizer.load(tokenizer_json)
    learner = MomentumRetriever(make(tokenizer), 16)
    data = CropDataset(tokenizer.ids(texts))
    for step in range(3):
        q, k = data.batch(2 * step + rank, 4, seed=0)
        learner(q, k)
    torch.save(learner.queue.ordered(), f"{out}/{rank}.pt")
    dist.destroy_process_group()


class Halves:
    """Batches whose two halves are those of two processes."""

    def __init__(self, data):
        self.data, self.ids, self.way = data, data.ids, data.way

    def __len__(self):
        return len(self.data)

    def batch(self, step, size, *, seed):
        parts = [self.data.batch(2 * step + rank, size // 2, seed=seed) for rank in range(2)]
        joined = []
        for side in range(2):
            ids, lengths = ([getattr(part[side], name) for part in parts] for name in ("ids", "lengths"))
            joined.append(Tokens(np.concatenate(ids), np.concatenate(lengths)))
        return tuple(joined)


def _trainer(rank, path, tokenizer_json, texts, out):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    tokenizer = SearchTokenizer.load(tokenizer_json)
    encoder, data = make(tokenizer), CropDataset(tokenizer.ids(texts))
    train_unsupervised(encoder, data, UnsupervisedConfig(steps=5, batch=4, queue=16, lr=0.01))
    torch.save(encoder.table.weight.detach(), f"{out}/w{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one_with_the_joined_batch(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    args = (tmp_path / "meet", tmp_path / "t.json", documents(), tmp_path)
    mp.start_processes(_trainer, args, nprocs=2, start_method="fork")
    encoder, data = make(tokenizer), Halves(CropDataset(tokenizer.ids(documents())))
    train_unsupervised(encoder, data, UnsupervisedConfig(steps=5, batch=8, queue=16, lr=0.01))
    for rank in range(2):
        found = torch.load(tmp_path / f"w{rank}.pt", weights_only=True)
        # Adam divides by the gradient's size: where that is rounding alone, one step may turn about.
        assert ((found - encoder.table.weight).abs() < 1e-4).float().mean() > 0.99


def test_two_processes_fill_the_queue_as_one_with_the_joined_batch(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    args = (tmp_path / "meet", tmp_path / "t.json", documents(), tmp_path)
    # Forked, since two fresh interpreters take ten seconds to import torch.
    mp.start_processes(_process, args, nprocs=2, start_method="fork")
    learner, data = MomentumRetriever(make(tokenizer), 16), CropDataset(tokenizer.ids(documents()))
    for step in range(3):
        for rank in range(
            2
        ):  # without an optimizer the follower stays, so the order of two pushes is that of the ranks
            learner(*data.batch(2 * step + rank, 4, seed=0))
    queues = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(queues[0], queues[1])
    torch.testing.assert_close(queues[0], learner.queue.ordered(), rtol=0, atol=1e-6)


def test_fine_tuning_answers_questions_that_share_no_word_with_their_answer(tokenizer):
    encoder, texts = make(tokenizer), documents(40)
    asked = ["music", "water", "food", "night"]
    queries = [asked[i % 4] for i in range(40)]
    relevant = [{j for j in range(40) if j % 4 == i % 4} for i in range(40)]
    negatives = mine_hard_negatives(encoder, queries, relevant, texts)
    assert all(place % 4 != i % 4 for i, place in enumerate(negatives))
    finetune(encoder, queries, texts, [texts[i] for i in negatives], steps=40, batch=4, lr=0.02)
    best = (encoder.encode(asked) @ encoder.encode(texts).T).argmax(1)
    assert (best % 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="positives must have one text a query, got 1 for 40"):
        finetune(encoder, queries, ["a"], steps=1)
    with pytest.raises(ValueError, match="documents must be more than a query's 10 answers, got 10"):
        mine_hard_negatives(encoder, queries, relevant, texts[:10])
