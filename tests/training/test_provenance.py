"""What made a file."""

import re
import subprocess

from stable_lora_jax.training.provenance import commit, versions


def test_a_commit_says_whether_any_file_of_the_package_differs(tmp_path):
    for name in ("__init__.py", "optim/method.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    git = ["git", "-C", tmp_path, "-c", "user.name=me", "-c", "user.email=me@example.com"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *arguments], check=True)
    head = commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{10}", head or "")
    (tmp_path / "optim" / "method.py").write_text("changed")
    assert commit(tmp_path) == f"{head}+"
    assert commit(tmp_path, ("__init__.py",)) == head
    (tmp_path / "elsewhere").mkdir()
    assert commit(tmp_path / "elsewhere") is None  # a folder whose files git does not know


def test_versions_of_what_is_installed():
    assert versions("jax", "no-such-package").keys() == {"python", "jax"}
