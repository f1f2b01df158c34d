"""The programs that README and documentation show, as they stand."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def programs(document: str = "README.md") -> list[str]:
    """Returns the Python programs of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
