"""A script without a guard, whose top level trains in two processes: for `test_functions`."""

import sys

from distributed_mnist import train

print("started")
result = train("fast", dataset=sys.argv[1], nproc=2, steps=2, out=sys.argv[2], device="cpu")
print(result.weights_sha256)
