"""Towers of texts and pictures: what they know, what they refuse, and what small ones learn."""

import pytest
import torch

from mixtura.audio import ClipEmbedding, NamedSounds, SmallClip
from mixtura.audio.embed import JointEmbedding, Prompted, TextTower, load_encoder, load_tower, save_tower
from mixtura.audio.separate import SOUNDS


def test_a_query_is_the_sound_that_its_words_name():
    tower = NamedSounds({"guitar": ["acoustic guitar"], "electric guitar": [], "flute": ["recorder"]})
    found = tower.embed_text(
        ["the sound of a guitar", "Acoustic guitars", "electric guitar", "a recorder and a guitar"]
    )
    assert found[:3].tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    torch.testing.assert_close(found[3], torch.tensor([1.0, 0.0, 1.0]) / 2**0.5)


def test_an_unknown_sound_is_refused_with_what_is_known():
    tower = NamedSounds({"violin": [], "flute": []})
    with pytest.raises(ValueError, match=r"'a dog' names no sound that this model knows; it knows violin, flute"):
        tower.embed_text(["a dog"])
    with pytest.raises(ValueError, match=r"did you mean violin\?"):
        tower.embed_text(["the violn"])
    with pytest.raises(ValueError, match="'fiddle' names two sounds, 'violin' and 'flute'"):
        NamedSounds({"violin": ["fiddle"], "flute": ["fiddle"]})


def test_the_sounds_that_come_with_the_package_have_names_of_their_own():
    tower = NamedSounds(SOUNDS)
    assert torch.equal(tower.embed_text(list(SOUNDS)), torch.eye(len(SOUNDS)))


def pictures(n: int, seed: int):
    """Three patterns under noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    patterns = torch.zeros(3, 8, 8)
    patterns[0, :4], patterns[1, :, :4], patterns[2, 2:6, 2:6] = 1, 1, 1
    return (patterns[labels] * 0.7 + 0.3 * torch.rand(n, 8, 8, generator=rng)).clamp(0, 1), labels


def test_small_towers_bring_new_pictures_to_their_captions(tmp_path):
    captions = [[f"a {name}", f"one {name} here"] for name in ("roof", "wall", "door")]
    images, labels = pictures(120, 0)
    tower = SmallClip.train_on(images, labels, captions, steps=40, batch=32, side=8, width=4, dim=8)
    assert isinstance(tower, JointEmbedding)
    new, kinds = pictures(60, 1)
    texts = tower.embed_text(["a roof", "the wall", "a door"])
    found = (tower.embed_image(new) @ texts.mT).argmax(1)
    assert float((found == kinds).float().mean()) > 0.9  # one in three by chance
    torch.testing.assert_close(tower.embed_image(new).norm(dim=1), torch.ones(60))
    save_tower(tower, tmp_path)
    again = load_tower(tmp_path)
    assert isinstance(again, TextTower) and torch.equal(again.embed_text(["a roof", "the wall", "a door"]), texts)
    with pytest.raises(ValueError, match="'zzz' has no word of the captions"):
        tower.embed_text(["zzz"])
    with pytest.raises(ValueError, match=r"images must have shape \(n, 8, 8\)"):
        tower.embed_image(torch.zeros(2, 9, 9))


def test_a_tower_of_another_kind_is_not_saved(tmp_path):
    class Other:
        dim = 3

        def embed_text(self, texts):
            return torch.zeros(len(texts), 3)

    with pytest.raises(TypeError, match="a Other cannot be saved with the model"):
        save_tower(Other(), tmp_path)


def tiny_clip(path, side=16):
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tiny | {"vocab_size": 300, "max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=tiny | {"image_size": side, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(path)
    from mixtura.lm.tokens import byte_pair_tokenizer

    byte_pair_tokenizer(["a photo of a violin"] * 20, vocab_size=290).save_pretrained(path)
    return path


def test_clip_from_transformers_gives_unit_vectors_of_texts_and_pictures(tmp_path):
    tower = load_encoder(tiny_clip(tmp_path))
    for found in (tower.embed_text(["a violin"]), tower.embed_image(torch.rand(1, 20, 30))):
        assert found.shape == (1, 8)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(1))
    with pytest.raises(OSError, match="nothing"):
        ClipEmbedding(str(tmp_path / "nothing"))


def test_a_name_is_read_inside_its_phrase_and_a_clip_is_noted_where_it_lies(tmp_path, monkeypatch):
    tiny_clip(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    tower = load_encoder("clip")
    asked = Prompted(tower)
    want = tower.embed_text(["a photo of {violin}", "a photo of flute"])
    assert torch.equal(asked.embed_text(["{violin}", "flute"]), want)
    save_tower(asked, tmp_path / "t")
    assert not list((tmp_path / "t").rglob("*.safetensors"))
    monkeypatch.chdir(tmp_path / "t")  # the directory is known from anywhere
    torch.testing.assert_close(load_tower(tmp_path / "t").embed_text(["flute"]), want[1:])
    (tmp_path / "clip").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"the CLIP that .*tower\.json names, and there is no directory .*clip"):
        load_tower(tmp_path / "t")
    with pytest.raises(ValueError, match=r"prompt must hold \{\} once"):
        Prompted(tower, "a photo")


def test_what_reads_no_pictures_is_no_encoder(tmp_path):
    save_tower(NamedSounds({"violin": []}), tmp_path / "names")
    with pytest.raises(ValueError, match="of kind NamedSounds, which reads no pictures"):
        load_encoder(tmp_path / "names")
    pytest.importorskip("transformers").BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="holds a model of type 'bert', not 'clip'"):
        load_encoder(tmp_path / "bert")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none is no CLIP that can be read .*hf download openai/clip"):
        load_encoder(tmp_path / "none")
