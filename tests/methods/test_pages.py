from pathlib import Path

import pytest

from metakern.methods import METHODS
from metakern.methods.pages import page_of

DOCS = Path(__file__).parents[2] / "docs" / "methods"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page(name):
    assert (DOCS / f"{page_of(name)}.md").is_file()


@pytest.mark.parametrize("name", [name for name in METHODS if page_of(name) != name])
def test_a_page_of_several_methods_names_each(name):
    text = (DOCS / f"{page_of(name)}.md").read_text()
    stem = name
    for ending in ("-ft", "-es"):
        stem = stem.removesuffix(ending)
    assert name in text or (stem != name and stem in text)
