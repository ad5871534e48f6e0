import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from cluster import ROOT


def test_an_environment_that_was_not_completed_is_made_anew(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def is_made():
        plan = subprocess.run(["make", "--dry-run", "train"], cwd=tmp_path, text=True, capture_output=True, check=True).stdout
        return "-m venv" in plan

    def create(code):
        return subprocess.run([sys.executable, "-c", f"import venv; {code}"], cwd=tmp_path, stderr=subprocess.DEVNULL).returncode

    assert is_made()
    # As where ensurepip is missing, or Ctrl-C comes.
    assert create("venv.EnvBuilder._setup_pip = lambda *_: 1 / 0; venv.create('.venv', with_pip=True)") == 1
    assert (tmp_path / ".venv/bin/python").exists()
    assert is_made()
    assert create("venv.create('.venv', clear=True)") == 0
    assert not is_made()


def build(folder, kind, to):
    to.mkdir()
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    # The folders that this suite's own import path names would be no part of another checkout.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run([sys.executable, "-c", code, str(to)], cwd=folder, env=environ, text=True, capture_output=True)
    assert answer.returncode == 0, answer
    return to / answer.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a clone tells which files there are")
def test_a_source_distribution_has_every_file_of_a_clone_and_makes_the_wheel(tmp_path):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    files = listed.strip("\0").split("\0")
    for name in files:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    shutil.unpack_archive(build(tmp_path / "clone", "sdist", tmp_path / "sdist"), tmp_path)
    [folder] = tmp_path.glob("mnist_dist-*")
    assert [name for name in files if not (folder / name).exists()] == []
    with zipfile.ZipFile(build(folder, "wheel", tmp_path / "wheel")) as archive:
        packed = archive.namelist()
    expected = [name for name in files if name.startswith(("launch/", "mnist_dist/"))]
    expected += [f"mnist_dist/{name}" for name in files if name.startswith("configs/")]
    assert sorted(expected) == sorted(name for name in packed if ".dist-info/" not in name)
