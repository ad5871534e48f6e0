import os
import subprocess
from pathlib import Path

import pytest
from cluster import ROOT


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    folder = f"/tmp/slurm-test-{os.getpid()}"
    environ = {**os.environ, "DEV_CLUSTER_DIR": folder, "SLURM_CONF": f"{folder}/slurm.conf"}
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON"):
        environ.pop(name, None)
    script = str(ROOT / "slurm/dev_cluster.sh")
    subprocess.run([script, "up"], env=environ, check=True, timeout=90)
    subprocess.run([script, "status"], env=environ, check=True, timeout=30)
    yield environ
    subprocess.run([script, "down"], env=environ, check=True, timeout=120)
    assert not Path(folder).exists()
    assert subprocess.run([script, "status"], env=environ, timeout=30).returncode == 1
