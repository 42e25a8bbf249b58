"""The check of sentences finds long ones in prose, and nothing in code, tables and links."""

from __future__ import annotations

import importlib.util

from support.documents import ROOT


def test_a_long_sentence_is_found_where_its_paragraph_begins() -> None:
    spec = importlib.util.spec_from_file_location("check_words", ROOT / "docs" / "check_words.py")
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    text = """# A heading of many words is no sentence of prose

Four words stand here. Five words stand in [this](a/long/target.md)
sentence with `code of many words` and go on.

* An item of four.
* Another, which is too long for `most`.

    a line of code that is longer than any sentence may be

| a row | of many cells | that is longer than any sentence may be |

```sh
worldlm simulate quickstart model.preset=nano and so on and on and on
```
"""
    assert [line for line, _ in check.long_sentences(text, most=6)] == [3, 7]
    assert [line for line, _ in check.long_sentences(text, most=11)] == []
