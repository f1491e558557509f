"""Parallel descriptions: no text twice, and no family of packages in two parts."""

import hashlib

import pytest

from mixtura.data import package_pairs as module
from mixtura.data.package_descriptions import Description, debian_descriptions, source_packages
from mixtura.data.package_pairs import families, package_pairs

FIRST = (
    "A library of tables, which stand for themselves and for nothing else at all."  # longer than what marks a family
)


def md5(text):
    return hashlib.md5(text.encode()).hexdigest()


def write(folder, entries, packages=""):
    """entries: (package, short, paragraphs, German short, German paragraphs or None)."""
    english, german = [], []
    for package, short, long, kurz, lang in entries:
        key = md5(short + long)
        english.append(f"Package: {package}\nDescription-md5: {key}\nDescription-en: {short}\n {long}\n")
        if lang is not None:
            german.append(f"Package: {package}\nDescription-md5: {key}\nDescription-de: {kurz}\n {lang}\n")
    (folder / "Translation-en").write_text("\n".join(english))
    (folder / "Translation-de").write_text("\n".join(german))
    if packages:
        (folder / "Packages").write_text(packages)


def many(n=400):
    """Sources of three packages each; the third shares its first paragraph with nobody."""
    entries, packages = [], []
    for i in range(n):
        for kind in ("", "-doc", "-dev"):
            name = f"tool{i}{kind}"
            entries.append((name, f"tool {i} {kind}", f"Does {i} {kind}.", f"Werkzeug {i} {kind}", f"Tut {i} {kind}."))
            packages.append(f"Package: {name}\nSource: tool{i} (1.0)\n" if kind else f"Package: {name}\n")
    return entries, "\n".join(packages)


def test_the_packages_of_a_source_stay_together_and_every_pair_is_in_one_part(tmp_path):
    entries, packages = many()
    write(tmp_path, entries, packages)
    part = package_pairs(["de"], folder=tmp_path)["de"]
    where = {}
    for name in ("train", "choose", "test"):
        for english, german in getattr(part, name):
            number = english.split()[1]
            assert german.split()[1] == number
            where.setdefault(number, set()).add(name)
    assert len(where) == 400 and all(len(names) == 1 for names in where.values())
    assert sum(len(getattr(part, name)) for name in ("train", "choose", "test")) == 1200
    assert 3 * 4 < len(part.test) < 3 * 32 and len(part.choose) > 3 * 4  # 4 %: 16 of 400 families, give or take
    other = package_pairs(["de"], folder=tmp_path, seed=1)["de"]
    assert set(other.test) != set(part.test)
    assert package_pairs(["de"], folder=tmp_path)["de"] == part


def test_descriptions_with_the_same_first_paragraph_are_a_family_without_any_source():
    entries = [
        Description(f"p{i}", f"k{i}", "s", text)
        for i, text in enumerate((FIRST, FIRST + "\nMore.", "Short.", "Short."))
    ]
    family = families(entries, {})
    assert family["k0"] == family["k1"] and len(set(family.values())) == 3  # too short to mark a family
    assert len(set(families(entries, {"p2": "p3"}).values())) == 2


def test_a_text_that_came_before_is_dropped_in_either_language(tmp_path):
    entries = [
        ("a", "one", "First.", "eins", "Erstens."),
        ("b", "two", "Second.", "eins", "Erstens."),  # the same translation of another text
        ("c", "three", "Third.", "drei", "Third."),  # the long part is not translated
        ("d", "four", "Fourth.", "vier", "Viertens."),
    ]
    write(tmp_path, entries)
    part = package_pairs(["de"], folder=tmp_path)["de"]
    assert sorted(part.train + part.choose + part.test) == [
        ("four\nFourth.", "vier\nViertens."),
        ("one\nFirst.", "eins\nErstens."),
    ]


def test_a_family_that_is_too_large_is_only_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARES", (0.5, 0.5))  # everything would be held out
    write(tmp_path, [(f"p{i}", f"s{i}", FIRST, f"k{i}", f"Eine {i}.") for i in range(50)])
    part = package_pairs(["de"], folder=tmp_path)["de"]
    assert len(part.train) == 50 and not part.test


def test_sources_are_read_from_packages_and_unknown_without(tmp_path):
    write(tmp_path, [("a", "one", "First.", "eins", "Erstens.")])
    assert source_packages(folder=tmp_path) == {}
    (tmp_path / "Packages").write_text("Package: a\nVersion: 1\n\nPackage: a-dev\nSource: a (1-2)\nVersion: 1\n")
    assert source_packages(folder=tmp_path) == {"a-dev": "a"}
    assert len(debian_descriptions(["de"], folder=tmp_path)["de"]) == 1


def test_english_is_no_translation(tmp_path):
    with pytest.raises(ValueError, match="languages must name at least one translation"):
        package_pairs(["en"], folder=tmp_path)
    with pytest.raises(ValueError, match=r"languages must be among \["):
        package_pairs(["tlh"], folder=tmp_path)
