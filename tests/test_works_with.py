"""The README's table of what works with what is that of the tests' marks."""

import works_with


def test_table_is_generated():
    text = works_with.README.read_text()
    assert works_with.PATTERN.search(text)
    assert works_with.table() in text, "run: python tests/works_with.py"


def test_every_area_has_rows():
    rows = works_with.rows()
    assert {r.area for r in rows} == set(works_with.AREAS)
    assert len({(r.area, r.what) for r in rows}) == len(rows)
