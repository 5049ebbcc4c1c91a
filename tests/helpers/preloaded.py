"""What the warm server does once, before it forks the processes of tests.

It imports the modules that these processes need, also those that they would import late, and fills caches.
No process looks at all this again when it collects garbage.
"""

import gc
import importlib

from PIL import Image

from distributed_mnist.cli.parser import parse
from distributed_mnist.reporting import html_report

PROGRAM = ("api", "cli.main", "cli.workers", "cli.original_worker", "launcher.default_nproc")
LIBRARIES = (  # torch's DDP imports _dynamo when it is first used
    *("torch._dynamo", "torch._subclasses.schema_check_mode", "torch.utils.serialization.config"),
    *("cloudpickle", "encodings.idna", "numpy.ma", "pytest"),
)

for _name in (*(f"distributed_mnist.{name}" for name in PROGRAM), *LIBRARIES):
    importlib.import_module(_name)
parse(["train"])
Image.preinit()
html_report._template()
gc.collect()
gc.freeze()
