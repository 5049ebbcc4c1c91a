"""Write the known answer of `dmnist verify`: run this after a change of its job or of exact arithmetic."""

import sys

from distributed_mnist.verify.answer import ANSWER_FILE, measure_answer, to_toml

if __name__ == "__main__":
    answer = measure_answer()
    ANSWER_FILE.write_text(to_toml(answer))
    sys.stdout.write(f"{answer.weights_sha256[-1]}\n")
