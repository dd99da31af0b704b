"""Documents that are derived from code equal the code."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_generated_documents_are_up_to_date():
    spec = importlib.util.spec_from_file_location("fuse_docs", ROOT / "tools/docs.py")
    assert spec is not None
    assert spec.loader is not None
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    assert docs.stale() == [], "run `make docs`"
