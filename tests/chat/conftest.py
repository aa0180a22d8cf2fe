import pydoc_data.topics
import sysconfig
from pathlib import Path

import pytest

from baltoro.chat.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def real_texts() -> list[str]:
    """Source code and prose that come with Python: the json and email packages and the language reference."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [path.read_text() for folder in ("json", "email") for path in sorted((library / folder).glob("*.py"))]
    return [*sources, *pydoc_data.topics.topics.values()]


@pytest.fixture(scope="session")
def tokenizer(real_texts: list[str]) -> Tokenizer:
    return Tokenizer.train(real_texts, 2048)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """No merges: id = byte, so that ids can be written by hand; control tokens begin at 256."""
    return Tokenizer({bytes([b]): b for b in range(256)})
