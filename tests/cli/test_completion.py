"""Shell completion, tested in a real bash."""

import subprocess
from pathlib import Path

from ranks import DMNIST, run

ASK = """
source "$1"
COMP_WORDS=(dmnist "$2"); COMP_CWORD=1; COMP_LINE="dmnist $2"; COMP_POINT=${#COMP_LINE}
_tyro_dmnist
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_bash_completes_commands(tmp_path: Path) -> None:
    script = run([*DMNIST, "--tyro-print-completion", "bash"])
    assert script.code == 0
    path = tmp_path / "dmnist.bash"
    path.write_text(script.stdout)
    for word, whole in (("tr", "train"), ("eva", "evaluate"), ("ver", "verify")):
        asked = ["bash", "-c", ASK, "bash", str(path), word]
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.split() == [whole]
