"""A translator with experts learns to spell numbers in three languages, and is pruned for one of them."""

import torch

from mixtura.core.training import TrainConfig, fit
from mixtura.lm.model import MultitaskMoEConfig, MultitaskMoEForConditionalGeneration
from mixtura.lm.multitask import TaskMixture, multitask_tokenizer, translate
from mixtura.lm.prune_experts import expert_usage, prune

words = {
    "de": ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"],
    "fr": ["zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"],
    "it": ["zero", "uno", "due", "tre", "quattro", "cinque", "sei", "sette", "otto", "nove"],
}
digits = torch.randint(10, (400, 3), generator=torch.Generator().manual_seed(0)).tolist()
pairs = {
    ("en", language): [(" ".join(map(str, row)), " ".join(names[d] for d in row)) for row in digits]
    for language, names in words.items()
}
tokenizer = multitask_tokenizer([b for part in pairs.values() for _, b in part], 340, ["en", *words])
mixture = TaskMixture(tokenizer, pairs, batch_size=24, length=24)
torch.manual_seed(0)
config = MultitaskMoEConfig(
    vocab_size=len(tokenizer),
    d_model=48,
    heads=4,
    ffn=96,
    encoder_layers=2,
    decoder_layers=2,
    num_experts=8,
    initializer_range=0.1,
    pad_token_id=tokenizer.pad_token_id,
    eos_token_id=tokenizer.eos_token_id,
    decoder_start_token_id=tokenizer.eos_token_id,
)
model = MultitaskMoEForConditionalGeneration(config)
fit(model, lambda step: model(**mixture.batch_at(step)).loss, TrainConfig(steps=700, lr=1e-2), label="train")
model.eval()
for language in words:
    print(language, translate(model, tokenizer, ["4 0 7", "1 2 3"], language, length=24))

german = mixture.only(["de"])
small = prune(model, expert_usage(model, (german.batch_at(step) for step in range(8))), keep=2)
for name, it in (("8 experts", model), ("the 2 that German visits most", small)):
    print(name, translate(it, tokenizer, ["4 0 7", "1 2 3"], "de", length=24))
