from __future__ import annotations

from pathlib import Path

import pytest

from compress.calib import corpus


@pytest.fixture(autouse=True)
def _small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    files = corpus._library_files()[:40]  # all 600 take seconds
    monkeypatch.setattr(corpus, "_library_files", lambda: files)


def test_splits_share_no_document_and_hold_out_a_tenth() -> None:
    train, held_out = list(corpus.documents("train")), list(corpus.documents("eval"))
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train)
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.15


def test_the_seed_changes_the_order_and_nothing_else() -> None:
    first, again, other = (list(corpus.documents("train", seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


def test_documents_are_long_enough_to_say_something() -> None:
    assert min(map(len, corpus.documents("eval"))) >= corpus.MIN_CHARACTERS - 2  # counted before stripping


def test_library_has_no_installed_packages_and_no_tests() -> None:
    assert not {"site-packages", "test"} & {part for path in corpus._library_files() for part in Path(path).parts}
