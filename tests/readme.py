"""The programs that the README shows, as they stand."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def programs() -> list[str]:
    """Returns the README's Python programs: on a pytree, with Flax, with Qwix, with Tunix."""
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
