"""``mixtura convert``: a dense checkpoint becomes a sparse one of equal cost, is trained sparse, and loads."""

from pathlib import Path

import pytest
from test_cli import here  # noqa: F401 (a fixture)

KINDS = ("wide", "parallel", "factorized", "doped")


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_checkpoint_costs_the_same_is_trained_sparse_and_generates(here, tiny_dense, tmp_path, kind):  # noqa: F811
    out, text = tmp_path / "out", tmp_path / "sums.txt"
    text.write_text("12 + 3 = 15\n" * 400)
    done = here("convert", tiny_dense, out, "--kind", kind, "--sparsity", "0.5", "--plot", "cost.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{kind}, s = 0.5" in done.stdout and "of the dense model's multiply-adds at 128 tokens" in done.stdout
    share = float(done.stdout.split(f"{out}: ")[1].split()[0])
    assert abs(share - 1) < 0.001
    assert (tmp_path / "cost.png").stat().st_size > 5000
    card = (out / "README.md").read_text()
    assert "import mixtura" in card and "2303.11525" in card and "multiply-adds of the forward pass" in card
    arguments = ("--text", text, "--steps", 4, "--batch", 2, "--length", 32, "--masks", "set")
    done = here("train", out, *arguments, "--out", "trained", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = here("generate", "trained", "12 + 3", "--tokens", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    import torch

    from mixtura.core.sparse_layers import masked_parameters
    from mixtura.lm import loading

    before, after = (masked_parameters(loading.load(path)[0]) for path in (out, tmp_path / "trained"))
    assert {n: m.active for n, m in before.items()} == {n: m.active for n, m in after.items()}
    assert any(not torch.equal(m.mask, after[n].mask) for n, m in before.items())
    assert not any(bool(m.parameter[~m.mask].any()) for m in after.values())


def test_groups_that_hardware_skips_are_kept_by_training(here, tiny_dense, tmp_path: Path):  # noqa: F811
    from mixtura.core.sparse_layers import masked_parameters
    from mixtura.lm import loading

    (tmp_path / "sums.txt").write_text("12 + 3 = 15\n" * 400)
    done = here("convert", tiny_dense, "out", "--kind", "doped", "--groups", "2:4", "--match", "layer", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Costs are equal layer by layer" in (tmp_path / "out" / "README.md").read_text()
    arguments = ("--text", "sums.txt", "--steps", 4, "--batch", 2, "--length", 32, "--out", "trained")
    done = here("train", "out", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = (masked_parameters(loading.load(tmp_path / path)[0]) for path in ("out", "trained"))
    for name, found in after.items():
        assert bool((found.mask.view(-1, 4).sum(-1) == 2).all()), name
    assert any(bool((found.mask != before[name].mask).any()) for name, found in after.items())


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(here, tiny_dense, tmp_path: Path):  # noqa: F811
    done = here("convert", tiny_dense, "out", "--kind", "parallel", "--sparsity", 0.75, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "parallel, s = 0.75, 4 branches a layer" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kind", "parallel", "--sparsity", 0.6), "gives 2.5: take 0.5 (2 branches)"),
        (("--sparsity", 1), "sparsity must be in [0, 1), got 1.0"),
        (("--length", 10_000), "length must be between 1 and the model's 256 positions"),
        (("--sparsity", 0.97), "the largest sparsity that fits is"),
        (("--groups", "2:4"), "fixes the density at 2/4: give match='layer'"),
        (("--groups", "2/4"), "--groups must be two numbers as in 2:4, got '2/4'"),
        (("--plot", "cost.bmp"), "--plot must end in"),
        (("--device", "warp"), "--device must be"),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line(here, tiny_dense, tmp_path: Path, arguments, message):  # noqa: F811
    done = here("convert", tiny_dense, "out", *arguments, cwd=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    # transformers' own bar may stand before it.
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr


def test_masks_of_a_dense_model_are_refused_and_a_sparse_one_is_not_converted_again(here, tiny_dense, tmp_path):  # noqa: F811
    text = tmp_path / "sums.txt"
    text.write_text("12 + 3 = 15\n" * 400)
    more = ("--text", text, "--steps", 2, "--batch", 2, "--length", 32, "--out", "t")
    done = here("train", tiny_dense, "--masks", "rigl", *more, cwd=tmp_path)
    assert done.returncode == 1 and "masks='rigl' is for a sparse model" in done.stderr
    assert here("convert", tiny_dense, "out", "--kind", "doped", cwd=tmp_path).returncode == 0
    done = here("convert", "out", "again", "--kind", "doped", cwd=tmp_path)
    assert done.returncode == 1 and "quantized or sparse already; convert the dense one" in done.stderr


def test_help_teaches_by_examples(here, tmp_path):  # noqa: F811
    said = here("convert", "--help", cwd=tmp_path).stdout
    assert "mixtura convert base out/parallel --kind parallel --sparsity 0.75" in said and "--dry-run" in said
